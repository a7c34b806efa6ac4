"""Tests the drawing of the lineage against another library's graphs, and the table of costs."""

import re
from itertools import combinations

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.graph.artifacts import Artifact
from pipeline.ledger import Ledger
from pipeline.report.lineage import BOX, TALL, direct_inputs, draw_lineage, levels, lineage_section

EMPTY = '<td class="n"></td>'


def graph(edges: dict[int, set[int]]) -> dict[str, Artifact]:
    """Returns stages of these numbers, each with lower ones as inputs."""
    return {
        f"s{i}": Artifact(f"s{i}", f"{i:064x}", {f"s{j}": f"{j:064x}" for j in sorted(inputs)}, {}, Ledger())
        for i, inputs in edges.items()
    }


graphs = st.integers(1, 9).flatmap(
    lambda n: st.fixed_dictionaries({i: st.sets(st.integers(0, i - 1)) if i else st.just(set()) for i in range(n)})
)


@given(graphs)
def test_arrows_are_the_transitive_reduction_and_point_down(edges: dict[int, set[int]]) -> None:
    theirs = networkx.transitive_reduction(networkx.DiGraph([(f"s{j}", f"s{i}") for i in edges for j in edges[i]]))
    direct = direct_inputs(graph(edges))
    assert {(parent, name) for name, parents in direct.items() for parent in parents} == set(theirs.edges)
    depth = {name: i for i, row in enumerate(levels(direct)) for name in row}
    assert depth.keys() == direct.keys()
    assert all(depth[parent] < depth[name] for name, parents in direct.items() for parent in parents)


@given(graphs)
def test_boxes_lie_inside_and_apart(edges: dict[int, set[int]]) -> None:
    svg = draw_lineage(graph(edges))
    [(width, height)] = re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)
    boxes = [(float(x), float(y)) for x, y in re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)"', svg)]
    assert len(boxes) == len(edges)
    assert all(0 <= x <= int(width) - BOX and 0 <= y <= int(height) - TALL for x, y in boxes)
    assert all(abs(x - a) >= BOX or abs(y - b) >= TALL for (x, y), (a, b) in combinations(boxes, 2))


def test_an_input_that_is_not_there_is_not_drawn() -> None:
    assert direct_inputs({"pairs": graph({0: set(), 1: {0}})["s1"]}) == {"pairs": []}
    with pytest.raises(ValueError, match="nothing is made yet"):
        draw_lineage({})
    assert lineage_section({}) == ""


def test_the_cost_is_workers_times_hours() -> None:
    made = graph({0: set(), 1: {0}})
    times = {
        "s0": {"seconds": 1800.0, "workers": 4, "written_bytes": 5e6},
        "s1": {"seconds": 3600.0, "utilisation": 0.5},
    }
    page = lineage_section({name: Artifact(**{**vars(a), "times": times[name]}) for name, a in made.items()})
    assert '<td class="n">30 min 00 s</td><td class="n">4</td><td class="n">2.00</td>' in page
    assert "50%" in page
    assert f'<td>all</td><td></td>{3 * EMPTY}<td class="n">3.00</td>' in page
