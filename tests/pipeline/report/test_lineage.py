"""Tests what a stage is said to be made from against another library's graphs, and the table of costs."""

import networkx
from hypothesis import given
from hypothesis import strategies as st

from pipeline.graph.artifacts import Artifact
from pipeline.ledger import Ledger
from pipeline.report.lineage import direct_inputs, lineage_section

EMPTY = '<td class="n"></td>'


def graph(edges: dict[int, set[int]]) -> dict[str, Artifact]:
    """Returns stages of these numbers, each with lower ones as inputs."""
    return {
        f"s{i}": Artifact(f"s{i}", f"{i:064x}", {f"s{j}": f"{j:064x}" for j in sorted(inputs)}, {}, Ledger())
        for i, inputs in edges.items()
    }


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.fixed_dictionaries({i: st.sets(st.integers(0, i - 1)) if i else st.just(set()) for i in range(n)})
    )
)
def test_inputs_are_the_transitive_reduction(edges: dict[int, set[int]]) -> None:
    theirs = networkx.transitive_reduction(networkx.DiGraph([(f"s{j}", f"s{i}") for i in edges for j in edges[i]]))
    direct = direct_inputs(graph(edges))
    assert {(parent, name) for name, parents in direct.items() for parent in parents} == set(theirs.edges)
    assert direct.keys() == graph(edges).keys()


def test_the_cost_is_workers_times_hours_and_an_input_that_is_not_there_is_not_named() -> None:
    made = graph({0: set(), 1: {0}, 2: {0, 1}})
    times = {"s1": {"seconds": 1800.0, "workers": 4, "written_bytes": 5e6}, "s2": {"seconds": 3600, "utilisation": 0.5}}
    page = lineage_section({name: Artifact(**{**vars(made[name]), "times": took}) for name, took in times.items()})
    assert '<td class="n">30 min 00 s</td><td class="n">4</td><td class="n">2.00</td>' in page
    assert "50%" in page
    assert f'<td>all</td><td></td><td></td>{3 * EMPTY}<td class="n">3.00</td>' in page
    assert page.count("<td>s1</td>") == 2  # itself, and from where the next one comes
    assert "<td>s0</td>" not in page
    assert lineage_section({}) == ""
