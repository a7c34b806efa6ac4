"""Says which addresses are on the public internet, by a table of our own that is the same on every Python.

The standard library's ``is_global`` changes with its version and knows no cloud. The networks are those of IANA's
registries of special-purpose addresses (iana-ipv4-special-registry and iana-ipv6-special-registry), anycast services
included, since no image lies there, and what clouds use besides.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address

_REFUSED_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this host
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by a carrier's customers; metadata of Alibaba (100.100.100.200)
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # metadata of Azure, in a network that is public otherwise
            "169.254.0.0/16",  # link-local; metadata of AWS, Azure, GCP, Oracle and others
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments; metadata of Oracle (192.0.0.192)
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and the broadcast address
        ),
    )
)
# Of IPv6 only this is global unicast. Outside are loopback, IPv4-compatible ::/96, IPv4-translated ::ffff:0:0:0/96,
# local NAT64 64:ff9b:1::/48, 100::/64, SRv6 5f00::/16, private fc00::/7 (with metadata of AWS, fd00:ec2::254, and GCP,
# fd20:ce::254), link-local fe80::/10, site-local fec0::/10 and multicast ff00::/8.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks, AMT, AS112, DRIP
            "2001:db8::/32",  # documentation
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")
_ISATAP = 0x00005EFE  # begins the last 64 bits (RFC 5214, 6.1); two bits of them may be set
_ISATAP_MASK = 0xFCFFFFFF


def is_public(ip: IPv4Address | IPv6Address) -> bool:
    """Returns whether an address is on the public internet. One that holds an IPv4 address is, if that one is too."""
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _REFUSED_4)
    number = int(ip)
    last = IPv4Address(number & 0xFFFFFFFF)
    if ip.ipv4_mapped or ip in _NAT64:
        return is_public(last)
    if ip in _6TO4 and not is_public(IPv4Address(number >> 80 & 0xFFFFFFFF)):
        return False
    if number >> 32 & _ISATAP_MASK == _ISATAP and not is_public(last):
        return False
    return ip in _GLOBAL_6 and not any(ip in network for network in _REFUSED_6)
