"""What stands behind --pairs and --gpus, and what is said of a slip."""

import pytest

from pipeline.cost.fleet import DEVICES, Fleet, parse_count, parse_fleet
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [("650M", 650_000_000), ("1.5B", 1_500_000_000), ("1G", 10**9), ("10k", 10_000), ("7000", 7000), ("7_000", 7000)],
)
def test_a_number_of_pairs(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "650m", "0", "-3", "0.2", "650 M", "1e9", "650MB"])
def test_no_number_of_pairs(text: str) -> None:
    with pytest.raises(UserError, match="not a number of pairs; write it as 650M") as e:
        parse_count(text)
    assert "\n" not in str(e.value)


def test_a_fleet() -> None:
    assert parse_fleet("64xH100") == Fleet(64, "H100")
    assert parse_fleet("1xB200").device == DEVICES["B200"]


@pytest.mark.parametrize("text", ["", "64", "H100", "0xH100", "64H100", "64 x H100", "-1xH100"])
def test_no_fleet(text: str) -> None:
    with pytest.raises(UserError, match="not a number of GPUs; write it as 64xH100"):
        parse_fleet(text)


def test_an_unknown_gpu() -> None:
    with pytest.raises(UserError, match="unknown kind T4; known are A100, H100, H200, B200"):
        parse_fleet("64xT4")


def test_newer_gpus_are_no_slower_and_fp32_is_much_slower_than_bf16() -> None:
    devices = list(DEVICES.values())
    assert [d.peak for d in devices] == sorted(d.peak for d in devices)
    assert all(d.fp32 < d.peak / 10 for d in devices)
