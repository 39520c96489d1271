"""Descriptions of experiments: how many, in which order, what they are called, and what is refused."""

import pickle

import pytest
import torch

from tdconcepts.errors import BadType, BadValue
from tdconcepts.experiments import each, every, grid, product
from tdconcepts.experiments.table import check_experiments
from tdconcepts.hooks import Ablate, Add, Scale, Site

SHAPES = {"a": [3], "b": [2, 4], Site("c.0"): [6], Site("c.1"): [6]}


def shapes(where):
    if where == Site("c.*"):
        return [*shapes(Site("c.0")), *shapes(Site("c.1"))]
    return [(where, torch.Size(SHAPES[where]))]


def spans(table):
    return [{dim: span.tolist() for dim, span in move.spans.items()} for move in table.moves]


def test_every():
    table = every(["a", Site("c.*")], Ablate()).resolve(shapes)
    assert table.n == 15
    assert table.names[:4] == ("'a'[0]", "'a'[1]", "'a'[2]", "c.0[0]")
    assert [move.members.tolist() for move in table.moves] == [[0, 1, 2], [*range(3, 9)], [*range(9, 15)]]
    assert spans(table)[0] == {-1: [[0, 1], [1, 2], [2, 3]]}


def test_units_and_blocks():
    table = every(Site("c.0"), Ablate(), [0, -1], groups=3).resolve(shapes)
    assert table.names == ("c.0[0]", "c.0[2]")
    assert spans(table) == [{-1: [[0, 2], [4, 6]]}]


def test_grid():
    table = grid("b", None, Ablate()).resolve(shapes)
    assert table.names == ("'b'[0, :]", "'b'[1, :]")
    assert spans(table) == [{-2: [[0, 1], [1, 2]]}]


def test_each():
    table = each([Site("c.*"), "a"], [Scale(2.0), Add(1.0)]).resolve(shapes)
    assert table.n == 6
    assert table.names[:3] == ("c.0 #0", "c.0 #1", "c.1 #0")
    assert all(len(move.edits) == 2 and not move.spans for move in table.moves)


def test_sum():
    table = (every("a", Ablate()) + each("b", Scale(2.0))).resolve(shapes)
    assert table.n == 4
    assert table.moves[1].members.tolist() == [3]


def test_product():
    table = product(every("a", Ablate()), each("b", [Scale(2.0), Scale(3.0)])).resolve(shapes)
    assert table.n == 6
    assert table.names == tuple(f"'a'[{i}] & 'b' #{j}" for i in range(3) for j in range(2))
    of = [{} for _ in range(6)]
    for move in table.moves:
        for i, member in enumerate(move.members.tolist()):
            edit = move.edits[i if len(move.edits) > 1 else 0]
            of[member][move.where] = move.spans[-1][i].tolist() if move.spans else edit.factor
    assert of == [{"a": [i, i + 1], "b": f} for i in range(3) for f in (2.0, 3.0)]


def test_product_of_three():
    table = product(*[every("a", Ablate()) for _ in range(3)]).resolve(shapes)
    assert table.n == len(set(table.names)) == 27
    assert table.names[5] == "'a'[0] & 'a'[1] & 'a'[2]"
    found = [[0] * 3 for _ in range(27)]
    for position, move in enumerate(table.moves):
        for i, member in enumerate(move.members.tolist()):
            found[member][position] = int(move.spans[-1][i, 0])
    assert found == [[i, j, k] for i in range(3) for j in range(3) for k in range(3)]


def test_data():
    made = product(every("a", Ablate()), each("b", Scale(2.0))) + grid(Site("c.*"), [0], Add(1.0))
    assert pickle.loads(pickle.dumps(made)) == made
    assert eval(repr(every("a", Ablate()))) == every("a", Ablate())
    assert made.wheres() == ["a", "b", Site("c.*")]
    assert made.edits() == [Ablate(), Scale(2.0), Add(1.0)]


def test_errors():
    with pytest.raises(BadValue, match="from the end"):
        every("a", Ablate(), dim=0)
    with pytest.raises(BadValue, match="blocks"):
        every("a", Ablate(), groups=0)
    with pytest.raises(BadValue, match="equal blocks"):
        every("a", Ablate(), groups=2).resolve(shapes)
    with pytest.raises(BadValue, match="do not exist"):
        every("a", Ablate(), [3]).resolve(shapes)
    with pytest.raises(BadValue, match="no dim -2"):
        grid("a", [0], Ablate()).resolve(shapes)
    with pytest.raises(BadType, match="not an edit"):
        every("a", 0.0)
    with pytest.raises(BadType, match="not an edit"):
        each("a", [Ablate])
    with pytest.raises(BadValue, match="no edit"):
        each("a", [])
    with pytest.raises(BadValue, match="no site"):
        each([], Ablate())
    with pytest.raises(BadValue, match="nothing to multiply"):
        product()
    with pytest.raises(BadType, match="way out"):
        check_experiments([Ablate()])
    with pytest.raises(BadType, match="description"):
        every("a", Ablate()) + Ablate()
