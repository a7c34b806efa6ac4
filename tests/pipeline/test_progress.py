import io
import re

import pytest

from pipeline import progress
from pipeline.progress import Progress, ProgressLine, above_lines, duration, under_way
from tests.pipeline.conftest import Terminal


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_times_are_as_people_write_them() -> None:
    times = {0: "0 s", 7.4: "7 s", 59.6: "1 min 00 s", 200: "3 min 20 s", 7500: "2 h 05 min", 3_600_000: "42 days"}
    assert {seconds: duration(seconds) for seconds in times} == times


@pytest.mark.parametrize(
    ("total", "start", "steps", "line"),
    [
        (7213, 0, [(10, 1200)], "1,200 of 7,213 rows, 120/s, 50 s left"),
        (7213, 0, [(10, 1200), (0, 6013)], "7,213 of 7,213 rows, 721/s, 10 s"),
        (100, 60, [(10, 20)], "80 of 100 rows, 2/s, 10 s left"),  # what was there is done, and no speed
        # Workers of Ray are counted when they have saved a checkpoint, once a minute: between, the rate does not fall.
        (65_536, 0, [(60, 3600), (59, 0)], "3,600 of 65,536 rows, 60/s, 17 min 12 s left"),
        (100, 0, [(10, 0)], "0 of 100 rows, 0/s"),  # promises nothing
    ],
)
def test_the_line_says_rate_and_time_left(
    clock: Clock, total: int, start: int, steps: list[tuple[int, int]], line: str
) -> None:
    bar = Progress("pairs", total, "rows", start=start, stream=io.StringIO())
    for seconds, rows in steps:
        clock.now += seconds
        bar.advance(rows)
    assert bar.line() == line


def test_a_rate_of_bytes_has_their_unit(clock: Clock) -> None:
    bar = Progress("demo.zip", 100, "KiB", stream=io.StringIO())
    clock.now += 2
    bar.advance(50)
    assert bar.line() == "50 of 100 KiB, 25 KiB/s, 2 s left"


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("clip", 100, "samples", stream=stream) as bar:
        for _ in range(100):
            clock.now += 0.25
            bar.advance(1, "loss 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # after 10 s, after 20 s, at the end
    assert lines[0].startswith("  clip: 40 of 100 samples, 4/s")
    assert lines[0].endswith("loss 0.5")
    assert lines[2] == "  clip: 100 of 100 samples, 4/s, 25 s"
    assert "\r" not in stream.getvalue()
    with Progress("pairs", 10, "rows", start=10, stream=stream):  # nothing is to do, and nothing is said
        pass
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_has_one_line_rewritten(clock: Clock) -> None:
    stream = Terminal()
    with Progress("clip", 10, "samples", stream=stream) as bar:
        for _ in range(10):
            clock.now += 1
            bar.advance(1)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r\033[K") == 11


def test_a_line_fits_a_narrow_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wrapped would leave a row behind each time it is rewritten; letters of CJK take two cells."""
    monkeypatch.setenv("COLUMNS", "40")
    for note, kept in (("a note that is longer than the terminal is wide", 37), ("猫" * 30, 33)):
        stream = Terminal()
        with Progress("pairs", 10, "rows", stream=stream) as bar:
            clock.now += 10
            bar.advance(5, note)
            shown = stream.getvalue().rpartition("\033[K")[2]
        assert kept <= len(shown) < 40
        assert sum(2 if letter == "猫" else 1 for letter in shown) < 40


def test_lines_of_a_terminal_stand_below_each_other(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that knows the control sequences shows each stage on a row of its own, and what is said above them."""
    monkeypatch.setenv("COLUMNS", "40")
    terminal, rows = Terminal(), [""]

    def screen() -> list[str]:
        place = 0
        rows[:] = [""]
        for part in re.findall(r"\r|\n|\x1b\[[KA]|[^\r\n\x1b]+", terminal.getvalue()):
            if part == "\n":
                place += 1
                rows.extend([""] * (place + 1 - len(rows)))
            elif part == "\x1b[A":
                place -= 1
            else:
                rows[place] = "" if part.startswith("\x1b") else rows[place] + part.strip("\r")
        return [row for row in rows if row]

    with Progress("decoder", 100, "samples", stream=terminal) as decoder:
        with Progress("ar_prior", 50, "samples", stream=terminal) as prior:
            for bar in (decoder, prior, decoder):
                clock.now += 10
                bar.advance(10, "with a note that is longer than the terminal is wide")
            shown = screen()
            assert [row.split(":")[0] for row in shown] == ["  decoder", "  ar_prior"]
            assert all(len(row) < 40 for row in shown)
            with above_lines():
                terminal.write("codec done\n")
            assert [row.split(":")[0] for row in screen()] == ["codec done", "  decoder", "  ar_prior"]
        assert [row.split(":")[0] for row in screen()] == ["codec done", "  ar_prior", "  decoder"]
        assert screen()[1] == "  ar_prior: 10 of 50 samples, 0.5/s, 1 min 20 s left"


def test_how_far_a_stage_is_can_be_asked_while_it_is_under_way(clock: Clock) -> None:
    assert under_way("codec") == ""
    with Progress("codec buckets", 10, "columns", stream=io.StringIO()) as bar:
        clock.now += 10
        bar.advance(4)
        assert under_way("codec") == "buckets: 4 of 10 columns, 0.4/s, 15 s left"
        assert under_way("clip") == ""
        with Progress("clip", 10, "samples", stream=io.StringIO()):
            assert under_way("clip") == "0 of 10 samples, 0/s"
    assert under_way("codec") == ""


@pytest.mark.parametrize(("kind", "lines"), [(io.StringIO, 3), (Terminal, 10)])
def test_a_line_is_said_now_and_then_and_asked_for_only_then(clock: Clock, kind: type[io.StringIO], lines: int) -> None:
    stream, asked = kind(), []
    with ProgressLine(30.0, stream) as line:
        for i in range(10):
            clock.now += 10
            line.show(lambda i=i: asked.append(i) or f"at {i}")
    assert len(asked) == lines
    assert stream.getvalue().count("at ") == lines
    assert stream.getvalue().endswith("\r\033[K" if kind is Terminal else "  at 8\n")
