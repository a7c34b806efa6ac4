"""Where the results come from and what they cost: a drawing of the graph, tables of times and of requests."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import direct
from pipeline.progress import duration
from pipeline.report.markup import attempt, note, number, section, table, text

BOX, TALL, ACROSS, DOWN = 124, 52, 12, 34  # SVG units: width and height of a box, the space between boxes
LOOK = (
    "Look for stages whose keys differ between two reports: what hangs below them was made again. In the first table, "
    "look for the stage that takes most of the time."
)
ASKED = ("stage", "requests", "MB read", "MB written")
Artifacts = Mapping[str, Artifact]


def lineage_section(artifacts: Artifacts) -> str:
    """The graph of what is made and its cost; "" before anything is."""
    if not artifacts:
        return ""
    drawing = attempt(
        "The drawing of the lineage", lambda: f'<div class="scroll" tabindex="0">{draw(artifacts)}</div>\n'
    )
    costs = attempt("The cost", _cost, artifacts), attempt("The requests", _requests, artifacts)
    return section("lineage", "Lineage and cost", LOOK, drawing, *costs)


def direct_inputs(artifacts: Artifacts) -> dict[str, list[str]]:
    """Of each stage the inputs that it does not also have through another of its inputs."""
    return direct({name: [i for i in made.inputs if i in artifacts] for name, made in artifacts.items()})


def levels(direct: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Stages by the longest way from a stage without inputs, so that every arrow points down."""
    depth: dict[str, int] = {}

    def deep(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((deep(i) for i in direct[name]), default=-1)
        return depth[name]

    rows: list[list[str]] = [[] for _ in range(1 + max(map(deep, direct)))]
    for name in direct:
        rows[depth[name]].append(name)
    return rows


def draw(artifacts: Artifacts) -> str:
    """The graph as SVG, from top to bottom: a box a stage with its key and its time. Raises ValueError for none."""
    if not artifacts:
        raise ValueError("nothing is made yet")
    inputs = direct_inputs(artifacts)
    rows = levels(inputs)
    width = max(map(len, rows)) * (BOX + ACROSS) + ACROSS
    place: dict[str, tuple[float, float]] = {}  # middle of the top of each box
    for i, row in enumerate(rows):
        wanted = {
            name: sum(place[p][0] for p in inputs[name]) / len(inputs[name]) if inputs[name] else width / 2
            for name in row
        }
        row = sorted(row, key=lambda name: wanted[name])
        # Below what they come from, side by side, and inside.
        left = sum(wanted.values()) / len(row) - (len(row) - 1) * (BOX + ACROSS) / 2
        most = width - ACROSS - BOX / 2 - (len(row) - 1) * (BOX + ACROSS)
        left = min(max(left, ACROSS + BOX / 2), most)
        place |= {name: (left + j * (BOX + ACROSS), ACROSS + i * (TALL + DOWN)) for j, name in enumerate(row)}
    lines = [_line(place[parent], place[name]) for name in inputs for parent in inputs[name]]
    boxes = [_box(name, artifacts[name], place[name]) for name in inputs]
    height = len(rows) * (TALL + DOWN) - DOWN + 2 * ACROSS
    said = "; ".join(f"{name} from {', '.join(own)}" for name, own in inputs.items() if own)
    label = html.escape(f"The lineage: {said or ', '.join(inputs)}", quote=True)
    return (
        f'<svg class="lineage" viewBox="0 0 {width} {height}" style="min-width:{width}px;max-width:{width}px" '
        f'role="img" aria-label="{label}">\n' + "".join(lines + boxes) + "</svg>"
    )


def _line(parent: tuple[float, float], child: tuple[float, float]) -> str:
    x, y, to_x, to_y = parent[0], parent[1] + TALL, *child
    middle = (y + to_y) / 2
    path = f"M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
    return f'<path d="{path}" fill="none" stroke="var(--quiet, #5f6670)"/>\n'


def _box(name: str, artifact: Artifact, at: tuple[float, float]) -> str:
    x, y = at
    took = artifact.times.get("seconds")
    words = (
        (name, 17, "600 12px"),
        (artifact.key[:12], 32, "11px"),
        ("" if took is None else duration(took), 46, "11px"),
    )
    lines = "".join(
        f'<text x="{x:g}" y="{y + down:g}" text-anchor="middle" fill="var(--ink, #1c1e21)" '
        f'style="font:{font} system-ui,sans-serif">{text(word)}</text>'
        for word, down, font in words
    )
    rectangle = (
        f'<rect x="{x - BOX / 2:g}" y="{y:g}" width="{BOX}" height="{TALL}" rx="6" fill="var(--paper, #fff)" '
        'stroke="var(--line, #e2e5e9)"/>'
    )
    return f"<g>{rectangle}{lines}</g>\n"


def _cost(artifacts: Artifacts) -> str:
    """Time, workers and bytes of every stage, and their sum."""
    rows, total = [], 0.0
    for name, artifact in artifacts.items():
        took = artifact.times
        if "seconds" not in took:
            continue
        workers = max(1, int(took.get("workers", artifact.environment.get("workers", 1))))
        hours = workers * took["seconds"] / 3600
        total += hours
        written = number(took["written_bytes"] / 1e6) if took.get("written_bytes") else ""
        rate = number(took["samples_per_second"]) if "samples_per_second" in took else ""
        used = f"{took['utilisation']:.0%}" if took.get("utilisation") else ""
        rows.append((text(name), duration(took["seconds"]), number(workers), f"{hours:.2f}", written, rate, used))
    if not rows:
        return note("No stage has written down how long it took.")
    rows.append(("all", "", "", f"{total:.2f}", "", "", ""))
    head = ("stage", "time", "workers", "worker hours", "MB of shards", "samples/s", "of the matmul peak")
    said = (
        "What a stage took when it was made; one that was fresh cost nothing this time. A worker of a data stage has "
        "one core, a training's has the cores or the GPU that its settings give it."
    )
    return f"<h3>Cost</h3>\n{table(head, rows, numeric=(1, 2, 3, 4, 5, 6))}{note(said)}"


def _requests(artifacts: Artifacts) -> str:
    """Requests to the store and bytes of every stage, and their sum, unless some stage's are not known."""
    total: Counter[str] = Counter()
    for artifact in artifacts.values():
        total.update(artifact.requests)
    if not total:
        return ""
    rows = [(text(name), *_asked(artifact.requests)) for name, artifact in artifacts.items()]
    rows.append(("all", *_asked(total if all(artifact.requests for artifact in artifacts.values()) else {})))
    said = (
        "What the run that made a stage asked of the store, in all workers of data stages, but for decoders of "
        "embeddings, and in the first worker of a training. Bytes are those of the store's objects: pictures fetched "
        "from where the list says are not among them. - is for what was not counted then."
    )
    return f"<h3>Requests to the store</h3>\n{table(ASKED, rows, numeric=(1, 2, 3))}{note(said)}"


def _asked(counts: Mapping[str, int]) -> tuple[str, str, str]:
    """The cells of these counts (see pipeline.store.base.COUNTS), or of none."""
    if not counts:
        return "-", "-", "-"
    requests = sum(count for name, count in counts.items() if not name.startswith("bytes_"))
    return number(requests), number(counts["bytes_read"] / 1e6), number(counts["bytes_written"] / 1e6)
