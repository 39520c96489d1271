"""Dag and ConceptGraph: order, levels, cycles, and do."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from tdconcepts.concepts.graphs import ConceptGraph, Dag, SetStage
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions import Do, intervene

SPRINKLER = Dag("srkw", [("s", "r"), ("s", "k"), ("r", "w"), ("k", "w")])


@given(st.lists(st.booleans(), min_size=15, max_size=15), st.permutations(range(6)))
def test_levels_are_the_longest_ways_and_the_order_respects_edges(bits, shuffled):
    names = [f"n{i}" for i in range(6)]
    pairs = [p for p, bit in zip(itertools.combinations(range(6), 2), bits, strict=True) if bit]
    edges = [(names[shuffled[i]], names[shuffled[j]]) for i, j in pairs]
    dag = Dag(names, edges)
    assert all(dag.order.index(one) < dag.order.index(other) for one, other in edges)

    def depth(name):
        return max((1 + depth(one) for one, other in edges if other == name), default=0)

    assert {name: i for i, level in enumerate(dag.levels) for name in level} == {n: depth(n) for n in names}
    assert Dag.from_adjacency(dag.adjacency, names).adjacency.equal(dag.adjacency)
    for name in names:
        assert set(dag.ancestors(name)) == {n for n in names if name in dag.descendants(n)}


def test_do_cuts_the_edges_into_a_concept_and_no_others():
    cut = SPRINKLER.do(["k"])
    assert set(SPRINKLER.edges) - set(cut.edges) == {("s", "k")}
    assert cut.roots == ("s", "k")
    assert SPRINKLER.ancestors("w") == ("s", "r", "k")
    assert SPRINKLER.descendants("s") == ("r", "k", "w")
    assert hash(pickle.loads(pickle.dumps(SPRINKLER))) == hash(SPRINKLER)
    assert cut != SPRINKLER


def test_a_cycle_is_shown():
    """torch_concepts puts all concepts of a cycle on one level, in silence."""
    with pytest.raises(BadValue, match=r"a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c"):
        Dag("abcd", [("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")])
    with pytest.raises(BadValue, match="a -> a"):
        Dag("a", [("a", "a")])


def graph():
    torch.manual_seed(0)
    return ConceptGraph(
        {
            "wet": Mod(nn.Bilinear(1, 1, 1), ["rain", "sprinkler"], ["wet"]),
            "sprinkler": Mod(nn.Linear(2, 1), ["season"], ["sprinkler"]),
            "rain": Mod(nn.Linear(2, 1), ["season"], ["rain"]),
            "season": Mod(nn.Linear(3, 2), ["observation"], ["season"]),
        }
    )


def test_a_graph_runs_in_topological_order_whatever_the_order_it_is_given_in():
    g, x = graph(), torch.randn(4, 3)
    assert list(g.module) == ["season", "sprinkler", "rain", "wet"]
    assert g.in_keys == ["observation"]
    td = g(TensorDict({"observation": x}, [4]))
    season = g["season"].module(x)
    expected = g["wet"].module(g["rain"].module(season), g["sprinkler"].module(season))
    assert torch.equal(td["wet"], expected)


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_do_sets_an_entry_and_what_depends_on_it_follows(batch):
    g = graph()
    td = TensorDict({"observation": torch.randn(*batch, 3)}, batch)
    done, plain = g.do({"rain": 0.5})(td.copy()), g(td.copy())
    assert torch.equal(done["rain"], torch.full((*batch, 1), 0.5))
    assert torch.equal(done["sprinkler"], plain["sprinkler"])
    torch.testing.assert_close(done["wet"], g["wet"].module(done["rain"], done["sprinkler"]))
    inside = intervene(g, at="rain", strategy=Do(0.5))(td.copy())
    torch.testing.assert_close(inside["wet"], done["wet"])
    assert ("season", "rain") not in g.do({"rain": 0.5}).dag.edges
    assert g.do({"season": torch.tensor([1.0, 2.0])})["wet"] is g["wet"]


def test_do_of_a_tensor_and_the_dtype_of_the_rest():
    g = graph().double()
    td = g.do({"season": torch.tensor([1.0, 2.0])})(TensorDict({"observation": torch.randn(2, 3).double()}, [2]))
    assert td["season"].tolist() == [[1, 2], [1, 2]]
    assert td["wet"].dtype is torch.float64


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Dag("ab", [("a", "c")]), BadKey, "no concept 'c'"),
        (lambda: Dag("ab", [("a", "b", "a")]), BadType, r"not an edge\n.*\('a', 'b', 'a'\)"),
        (lambda: Dag("ab", ["ab"]), BadType, "not an edge\n.*'ab'"),
        (lambda: Dag("ab", [("a", 1)]), BadType, "not an edge"),
        (lambda: Dag("ab", {"a": "b"}), BadType, "not an edge"),
        (lambda: Dag("ab", None), BadType, "edges of a graph"),
        (lambda: Dag.from_adjacency([[0, 1], [0, 0]], "ab"), BadType, "adjacency"),
        (lambda: Dag(["a", "a"], []), BadValue, "one name"),
        (lambda: SPRINKLER.parents("x"), BadKey, "no concept 'x'"),
        (lambda: SPRINKLER.do(["x"]), BadKey, "no concept 'x'"),
        (lambda: Dag.from_adjacency(torch.zeros(2, 3), "ab"), BadValue, r"\[2, 2\]"),
        (lambda: ConceptGraph({}), BadType, "stages of a graph"),
        (lambda: ConceptGraph({"a": nn.Linear(2, 2)}), BadType, "the stage 'a'"),
        (lambda: ConceptGraph({n: Mod(nn.Identity(), ["x"], ["y"]) for n in "ab"}), BadValue, "two stages write 'y'"),
        (
            lambda: ConceptGraph({"a": Mod(nn.Identity(), ["b"], ["a"]), "b": Mod(nn.Identity(), ["a"], ["b"])}),
            BadValue,
            "cycle",
        ),
        (
            lambda: ConceptGraph({"a": Mod(nn.Identity(), ["x"], ["z"])}),
            BadKey,
            r"(?s)'a' writes no entry.*{'z': stage}",
        ),
        (lambda: graph().do(["rain"]), BadType, r"values of stages\n.*\['rain'\]"),
        (lambda: graph().do({"rain": "1"}), BadType, "value of a row\n.*'1'"),
        (lambda: graph().do({"rain": None}), BadType, "value of a row"),
        (lambda: graph().do({"rains": 1.0}), BadKey, "did you mean 'rain'"),
        (lambda: graph().do({"rain": float("nan")}), BadValue, "nan"),
        (lambda: SetStage("a", torch.zeros(2, 2)), BadValue, "value of a row"),
        (lambda: SetStage("a", 1.0, "b")(TensorDict({"c": torch.zeros(1)})), BadKey, "'b'"),
        (lambda: SetStage("a", 1.0)(TensorDict({}).lock_()), BadValue, "locked"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_a_set_value_follows_the_entry_where_the_tensordict_has_no_batch_and_is_a_copy():
    stage = SetStage("b", 1.0, like="a")
    for batch in ([], [3]):
        td = stage(TensorDict({"a": torch.zeros(3, 2)}, batch))
        assert td["b"].shape == (3, 1)
        td["b"][0] = 7
        assert stage.value.tolist() == [1]
        assert td["b"].flatten().tolist() == [7, 1, 1]
