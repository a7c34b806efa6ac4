from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from pydantic import NonNegativeFloat

from pipeline.errors import UserError
from pipeline.parse import MAX_ALIASED, load_yaml, overlay, parse, read_count


@dataclass(frozen=True)
class Inner:
    guidance: NonNegativeFloat = 1.0
    kind: Literal["a", "bee"] = "a"

    def __post_init__(self) -> None:
        if self.guidance > 1 and self.kind == "bee":
            raise ValueError(f"guidance: {self.guidance} is too high for a bee")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    sizes: tuple[int, ...] = ()
    limit: float | None = None
    hosts: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_values_of_every_kind() -> None:
    given = {
        "name": "n",
        "count": 3,
        "flag": True,
        "sizes": [1, 2],
        "limit": 1,
        "hosts": {"a": "b"},
        "inner": {"guidance": "1e-4"},
    }
    assert parse(Outer, given) == Outer("n", 3, True, (1, 2), 1.0, {"a": "b"}, Inner(1e-4))
    assert parse(Outer, {"name": "n", "limit": None, "inner": None}) == Outer("n")
    assert parse(Outer, {"name": "n", "hosts": {1: "b"}}) == Outer("n", hosts={"1": "b"})


def test_numbers_that_yaml_takes_for_text_and_whole_ones_with_a_point() -> None:
    given = {
        "name": "1e3",
        "count": "2e6",
        "sizes": [3.0, "1E2", "1.5k", "2_000"],
        "limit": "1e-4",
        "inner": {"guidance": ".5"},
    }
    assert parse(Outer, given) == Outer("1e3", 2_000_000, sizes=(3, 100, 1500, 2000), limit=1e-4, inner=Inner(0.5))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "n", "inner": {"guidence": 1}}, "inner.guidence: unknown key; did you mean guidance?"),
        ({"name": "n", "count": "many"}, "count: expected a whole number, got 'many'"),
        ({"name": "n", "count": 1.5}, "count: expected a whole number, got 1.5"),
        ({"name": "n", "count": True}, "count: expected a whole number, got True"),
        ({"name": "n", "flag": 1}, "flag: expected true or false, got 1"),
        ({"name": "n", "sizes": 3}, "sizes: expected a list, got 3"),
        ({"name": "n", "sizes": [1, "x"]}, "sizes[1]: expected a whole number, got 'x'"),
        ({"name": "n", "inner": {"kind": "be"}}, "inner.kind: 'be' is not one of a, bee; did you mean bee?"),
        ({"name": "n", "inner": {"guidance": -1}}, "inner.guidance: -1 is below 0"),
        ({"name": "n", "inner": {"guidance": 2, "kind": "bee"}}, "inner: guidance: 2.0 is too high for a bee"),
        ({"name": "n", "inner": {"guidance": float("inf")}}, "inner.guidance: expected a finite number, got inf"),
        ({"name": "n", "inner": 3}, "inner: expected a mapping, got 3"),
        ({"name": "n", "hosts": {"a": 1}}, "hosts.a: expected text, got 1"),
        ({"name": "n", "limit": "one"}, "limit: expected a number, got 'one'"),
        ({"name": "n", "count": "1.5"}, "count: expected a whole number, got '1.5'"),
        ({"nam": "n"}, "nam: unknown key; did you mean name?"),
        (3, "expected a mapping, got 3"),
        ({}, "name: missing; it has no default"),
    ],
)
def test_mistakes_are_one_line(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, value)
    assert str(caught.value) == message


def test_counts_are_read_as_people_write_them() -> None:
    counts = {"650M": 650_000_000, "1.5B": 1_500_000_000, "1G": 10**9, "10k": 10_000, "7000": 7000, "7_000": 7000}
    counts |= {"7,000": 7000, "1e6": 10**6, "1.5e3": 1500, "0": 0}
    assert {text: read_count(text) for text in counts} == counts
    assert [read_count(text) for text in ("", "M", "650m", "-3", "0.2", "650 M", "650MB", "1e", "nan")] == [None] * 9


def test_an_overlay_is_deep() -> None:
    assert overlay({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 3}, "d": {"e": 1}}) == {
        "a": {"b": 3, "c": 2},
        "d": {"e": 1},
    }


def test_a_single_value_is_read_by_the_type_of_its_field() -> None:
    assert parse(float, 3, "--set scale") == 3.0
    with pytest.raises(UserError, match=r"^--set scale: expected a number, got 'x'$"):
        parse(float, "x", "--set scale")
    with pytest.raises(UserError, match=r"^--guidance: -1 is below 0$"):
        parse(Inner, {"guidance": -1}, "--")


def laughs(level: str, last: str) -> str:
    """556 bytes that stand for 9^9 values."""
    return f"a0: &a0 {last}\n" + "".join(
        f"a{i}: &a{i} {level.format(','.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 9)
    )


@pytest.mark.parametrize(
    "text",
    [
        laughs("[{}]", "[x,x,x,x,x,x,x,x,x]"),
        laughs("{{<<: [{}]}}", "{x: 1}"),
        "a: &a [*a]",
        "a: &a {b: [c, *a]}",
        "[" * 100_000,
    ],
)
def test_a_document_that_multiplies_itself_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"write them out|nested too deeply") as refused:
        load_yaml(text)
    assert "\n" not in str(refused.value)


def test_aliases_in_measure_are_read() -> None:
    assert load_yaml("a: &b {c: 1}\nd: *b\ne: {<<: *b, f: [*b, *b]}") == {
        "a": {"c": 1},
        "d": {"c": 1},
        "e": {"c": 1, "f": [{"c": 1}, {"c": 1}]},
    }
    most = MAX_ALIASED // 1000 - 1
    assert len(load_yaml(f"a: &a [{','.join('x' * 999)}]\nb: [{','.join(['*a'] * most)}]")["b"]) == most
