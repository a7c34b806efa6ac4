import ipaddress

import pytest

from pipeline.data.fetch.addresses import is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::8.8.8.8", True), ("2002:808:808::1", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fd00:ec2::254", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("64:ff9b::127.0.0.1", False), ("2002:7f00:1::1", False),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", False),  # Teredo of 10.0.0.1
        # metadata of clouds: Azure, Oracle, Alibaba, AWS and GCP
        ("168.63.129.16", False), ("168.63.129.15", True), ("192.0.0.192", False), ("100.100.100.200", False),
        ("fd20:ce::254", False), ("::ffff:168.63.129.16", False), ("64:ff9b::a83f:8110", False),
        ("2002:a83f:8110::1", False),
        # ways to write an IPv4 address into an IPv6 one
        ("::127.0.0.1", False), ("::8.8.8.8", False), ("::ffff:0:127.0.0.1", False), ("::ffff:0:8.8.8.8", False),
        ("64:ff9b:1::a9fe:a9fe", False), ("64:ff9b:1::808:808", False), ("::ffff:8.8.8.8", True),
        ("2606:4700::5efe:7f00:1", False), ("2606:4700::200:5efe:a9fe:a9fe", False),
        ("2606:4700::5efe:808:808", True), ("2606:4700::300:5efe:a00:1", False), ("2002:808:808:0:0:5efe:a00:1", False),
        ("2001:0:808:808:8000:63bf:f7f7:f7f7", False),  # Teredo, which nobody serves pictures from
        # what else IANA keeps for special purposes
        ("0.1.2.3", False), ("192.0.0.9", False), ("192.0.2.1", False), ("192.31.196.1", False),
        ("192.52.193.1", False), ("192.88.99.1", False), ("192.175.48.1", False), ("198.18.0.1", False),
        ("198.19.255.255", False), ("198.51.100.1", False), ("203.0.113.1", False), ("240.0.0.1", False),
        ("100::1", False), ("100:0:0:1::1", False), ("2001:2::1", False), ("2001:20::1", False), ("2001:1::1", False),
        ("2001:db8::1", False), ("2620:4f:8000::1", False), ("3fff::1", False), ("3fff:fff::1", False),
        ("5f00::1", False), ("fec0::2", False), ("fc00::1", False), ("febf::1", False), ("ff0e::1", False),
        ("4000::1", False), ("e000::1", False), ("2001:4860:4860::8888", True), ("2a00:1450:4001::1", True),
        ("3fff:1000::1", True), ("192.0.1.1", True), ("172.32.0.1", True), ("100.128.0.1", True),
        ("223.255.255.1", True),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public
