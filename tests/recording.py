"""``python -m tests.recording FILE``: records ``unclip peek`` in a terminal as an animated SVG, in minutes.

The run is real, in an empty folder. Its time is not: the film is short, and stops for what has to be read.
"""

import html
import os
import pty
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyte

COLUMNS, ROWS = 112, 32
SHORTEST_S = 0.1  # of a screen, in the film
MOST_SCREENS = 150
READING_S = 0.12  # for each line that was not on the screen before
END_S = 8.0
CELL, LINE = 8, 18  # pixels
MARGIN = 12
Screen = tuple[str, ...]  # lines
# A window of its own colours, which is read on a light page and on a dark one.
STYLE = """\
text{{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#e6edf3;white-space:pre}}
.film{{animation:film {seconds:.1f}s step-end infinite}}
@keyframes film{{{keyframes}}}
@media (prefers-reduced-motion:reduce){{.film{{animation:none;transform:translateY({last}px)}}}}"""


def record(command: list[str], folder: Path) -> Iterator[tuple[float, bytes]]:
    """Runs a command in a pseudo-terminal, and yields what it writes with the seconds since its start."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (ROWS, COLUMNS))
    began = time.monotonic()
    size = {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=folder, env=os.environ | size) as process:
        os.close(its)
        with open(ours, "rb", buffering=0) as terminal:
            while data := _read(terminal.fileno()):
                yield time.monotonic() - began, data
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # what Linux says where others say the end of the file
        return b""


def screens(written: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, Screen]]:
    """Yields the screen after each write, with its time."""
    terminal = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(terminal)
    for at, data in written:
        stream.feed(data)
        yield at, tuple(line.rstrip() for line in terminal.display)


def film(shown: list[tuple[float, Screen]]) -> list[tuple[float, Screen]]:
    """Returns at most MOST_SCREENS screens, and the last one, with the seconds that each is shown."""
    step = shown[-1][0] / MOST_SCREENS
    frames: list[tuple[float, Screen]] = []
    last = 0.0
    for at, screen in shown:
        if frames and (screen == frames[-1][1] or at - last < step):
            frames[-1] = (frames[-1][0], screen)
            continue
        frames.append((0.0, screen))
        last = at
    before: set[str] = set()
    for i, (_, screen) in enumerate(frames):
        fresh = len(set(screen) - before) - 1  # one is the line of progress
        before = set(screen)
        frames[i] = (END_S if i == len(frames) - 1 else max(SHORTEST_S, READING_S * fresh), screen)
    return frames


def svg(title: str, frames: list[tuple[float, Screen]]) -> str:
    """Returns an animated SVG, in which every line of text stands once."""
    lines = {line: f"l{i}" for i, line in enumerate(dict.fromkeys(line for _, screen in frames for line in screen))}
    lines.pop("", None)
    seconds = sum(lasts for lasts, _ in frames)
    height, width = ROWS * LINE, COLUMNS * CELL
    at, keyframes, strip = 0.0, "", ""
    for i, (lasts, screen) in enumerate(frames):
        keyframes += f"{100 * at / seconds:.3f}%{{transform:translateY({-i * height}px)}}"
        at += lasts
        used = [f'<use href="#{lines[line]}" y="{row * LINE}"/>' for row, line in enumerate(screen) if line]
        strip += f'<g transform="translate(0,{i * height})">{"".join(used)}</g>\n'
    style = STYLE.format(seconds=seconds, keyframes=keyframes, last=-(len(frames) - 1) * height)
    texts = "".join(
        f'<text id="{name}" y="{LINE - 5}" textLength="{len(line) * CELL}" xml:space="preserve">'
        f"{html.escape(line, quote=False)}</text>\n"
        for line, name in lines.items()
    )
    whole = f'width="{width + 2 * MARGIN}" height="{height + 2 * MARGIN}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 2 * MARGIN} {height + 2 * MARGIN}" {whole}>\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}\n</style>\n"
        f'<rect {whole} rx="8" fill="#0d1117" stroke="#30363d"/>\n<defs>\n{texts}</defs>\n'
        f'<svg x="{MARGIN}" y="{MARGIN}" width="{width}" height="{height}">\n<g class="film">\n{strip}</g>\n</svg>\n'
        "</svg>\n"
    )


def main(target: Path) -> None:
    """Records the command, from its prompt on."""
    program = Path(sys.executable).with_name("unclip")
    with tempfile.TemporaryDirectory() as folder:
        written = [(0.0, b"$ unclip peek\r\n"), *record([str(program), "peek"], Path(folder))]
    shown = [(at, tuple(line.replace(folder, "~") for line in screen)) for at, screen in screens(written)]
    frames = film(shown)
    faster = shown[-1][0] / sum(lasts for lasts, _ in frames[:-1])
    target.write_text(svg(f"unclip peek in a terminal, {faster:.0f} times as fast", frames))
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB, {len(frames)} screens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
