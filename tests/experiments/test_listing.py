"""Experiments as a TensorDict: what is listed runs as what was described."""

import pytest
import torch
from experiments.models import CASES, mlp, pipeline
from tensordict import NonTensorData, NonTensorStack, TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import Sweep, every, product
from tdconcepts.experiments.listing import as_experiments, as_tensordict
from tdconcepts.hooks import Ablate, Add, Replace, Scale, Site

SHAPES = lambda where: [(where, torch.Size([6]))]  # noqa: E731


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    make, experiments = CASES[name]
    model, td = make(2)
    sweep = Sweep(model, experiments)
    again = Sweep(model, sweep.table(td))
    assert again.names(td) == sweep.names(td)
    assert again.plan(td).name == sweep.plan(td).name
    for key in sweep.out_keys:
        torch.testing.assert_close(again(td.copy())[key], sweep(td.copy())[key])


def test_entries():
    table = as_tensordict(every(Site("0"), Ablate(), [1, 4], dim=-2).resolve(lambda w: [(w, torch.Size([5, 3]))]))
    assert table.batch_size == (2,)
    assert table["experiment"].tolist() == [0, 1]
    assert table[1]["name"] == "0[4, :]"
    assert table[1]["site"] == Site("0")
    assert table[1]["index"] == (slice(4, 5), slice(None))
    assert table[1]["value"] == Ablate()


def test_pairs_have_two_rows():
    table = as_tensordict(product(every("a", Ablate(), [0, 1]), every("b", Scale(2.0), [3])).resolve(SHAPES))
    assert table["experiment"].tolist() == [0, 0, 1, 1]
    assert [row["site"] for row in table.unbind(0)] == ["a", "b", "a", "b"]


def test_a_selection():
    model, td = mlp(3)
    sweep = Sweep(model, every([Site("0"), Site("2.0")], Ablate()))
    some = torch.tensor([1, 3, 7])
    part = Sweep(model, sweep.table(td)[some])
    assert part.names(td) == tuple(sweep.names(td)[i] for i in some)
    torch.testing.assert_close(part(td.copy())["sweep", "y"], sweep(td.copy())["sweep", "y"][:, some])


def test_made_by_hand():
    model, td = pipeline(3)
    values = torch.randn(4).double()
    table = TensorDict(
        {
            "site": NonTensorStack("hidden", "hidden", "concepts", "x"),
            "index": torch.tensor([0, -1, 2, 1]),
            "value": values,
        },
        batch_size=[4],
    )
    out = Sweep(model, table)(td.copy())["sweep", "y"]
    edits = [("hidden", 0), ("hidden", 4), ("concepts", 2), ("x", 1)]
    for i, (key, unit) in enumerate(edits):
        alone = Sweep(model, every(key, Replace(float(values[i])), [unit]))(td.copy())["sweep", "y"]
        torch.testing.assert_close(out[:, i], alone[:, 0])


def test_one_thing_for_all_rows_names_and_indices():
    site, edit = NonTensorData(Site("1"), batch_size=[3]), NonTensorData(Ablate(), batch_size=[3])
    index = NonTensorStack(*[NonTensorData(i) for i in ((), slice(1, 3), (slice(None, 2),))])
    table = TensorDict({"site": site, "value": edit, "index": index}, batch_size=[3])
    resolved = as_experiments(table).resolve(SHAPES)
    assert resolved.names == ("1", "1[1:3]", "1[:2]")
    assert [move.spans.get(-1, torch.zeros(0)).tolist() for move in resolved.moves] == [[], [[1, 3], [0, 2]]]
    named = table.set("name", NonTensorStack("one", "two", "three"))
    assert as_experiments(named).resolve(SHAPES).names == ("one", "two", "three")
    assert repr(as_experiments(named)) == "<3 changes in 3 experiments>"
    assert as_experiments(table).wheres() == [Site("1")] * 3
    assert as_experiments(table).edits() == [Ablate()] * 3


def test_the_changes_of_an_experiment_keep_their_order():
    table = TensorDict(
        {
            "site": NonTensorData("a", batch_size=[2]),
            "value": NonTensorStack(*[NonTensorData(edit) for edit in (Add(1.0), Scale(3.0))]),
            "experiment": torch.zeros(2, dtype=torch.long),
        },
        batch_size=[2],
    )
    moves = as_experiments(table).resolve(SHAPES).moves
    assert [move.edits for move in moves] == [(Add(1.0),), (Scale(3.0),)]


@pytest.mark.parametrize(
    ("entries", "error", "match"),
    [
        ({"value": torch.zeros(2)}, BadKey, "without 'site'"),
        ({"site": NonTensorStack("a", "a")}, BadKey, "without 'value'"),
        (
            {"site": NonTensorStack("a", "a"), "value": torch.zeros(2), "where": torch.zeros(2)},
            BadKey,
            "no entry 'where'",
        ),
        (
            {"site": NonTensorData(1.5, batch_size=[2]), "value": torch.zeros(2)},
            BadType,
            "not a site",
        ),
        ({"site": NonTensorStack("a", "a"), "value": NonTensorStack("b", "c")}, BadType, "not an edit"),
        ({"site": NonTensorStack("a", "a"), "value": torch.zeros(2), "index": torch.zeros(2)}, BadType, "not an index"),
    ],
)
def test_bad_tables(entries, error, match):
    with pytest.raises(error, match=match):
        as_experiments(TensorDict(entries, batch_size=[2]))


def test_bad_rows():
    good = TensorDict({"site": NonTensorStack("a", "a"), "value": torch.zeros(2)}, batch_size=[2])
    with pytest.raises(BadValue, match="rows"):
        as_experiments(good[0])
    with pytest.raises(BadValue, match="do not exist"):
        as_experiments(good.clone().set("index", torch.tensor([0, 6]))).resolve(SHAPES)
    with pytest.raises(BadValue, match="fewer dims"):
        as_experiments(good.clone().set("index", NonTensorStack(*[NonTensorData((0, 0))] * 2))).resolve(SHAPES)
    with pytest.raises(BadValue, match="one site"):
        as_experiments(good).resolve(lambda where: [])
