"""Reading rows: TensorDicts and streams give the same, and what is wrong is named."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.representations import reading
from tdconcepts.representations.reading import Reader, Stream, batches, check_keys, features, stacked


def make(n=6):
    x = torch.arange(n * 2.0).view(n, 2)
    return TensorDict({"a": x, ("b", "c"): x[:, :1] + 1, "y": torch.arange(n)}, batch_size=[n])


def rows(stream):
    found = list(stream())
    return [torch.cat([r.x[i] for r in found]) for i in range(len(found[0].x))], torch.cat([r.y for r in found])


@pytest.mark.parametrize("form", ["whole", "pieces", "shaped", "small pieces"])
def test_every_form_gives_the_same_rows(form, monkeypatch):
    td = make()
    data = {"pieces": [td[:4], td[4:]], "shaped": td.reshape(2, 3)}.get(form, td)
    if form == "small pieces":
        monkeypatch.setattr(reading, "_CHUNK", 1)
        monkeypatch.setattr(reading, "_LEAST", 2)
    stream = Stream(Reader(["a", ("b", "c")], "y"), data, "two passes")
    for _ in range(2):
        x, y = rows(stream)
        assert torch.equal(x[0], td["a"].double())
        assert torch.equal(x[1], td["b", "c"].double())
        assert torch.equal(y, td["y"].double().unsqueeze(-1))


def test_masked_rows_are_not_looked_at():
    td = make().set("mask", torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    td["a"][1] = float("nan")
    x, y = rows(Stream(Reader(["a"], "y", "mask"), td))
    assert torch.equal(y.flatten(), torch.tensor([0.0, 2, 3, 5]).double())
    assert x[0].shape == (4, 2)
    td["mask"] = td["mask"].unsqueeze(-1)
    assert torch.equal(rows(Stream(Reader(["a"], "y", "mask"), td))[1], y)


def test_entries_of_one_width_are_stacked():
    a, b = torch.ones(3, 2), torch.zeros(3, 1)
    assert [(places, x.shape) for places, x in stacked([a, b, a])] == [([0, 2], (2, 3, 2)), ([1], (1, 3, 1))]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda td: td.exclude("a"), BadKey, "no entry 'a'"),
        (lambda td: td.exclude("y"), BadKey, "no entry 'y'"),
        (lambda td: td.set("a", td["a"].long()), BadType, "int64"),
        (lambda td: td.set("a", td["a"].unsqueeze(-1)), BadValue, r"\[6, 2, 1\]"),
        (lambda td: td.set("a", td["a"].index_fill(0, torch.tensor([2, 4]), float("nan"))), BadValue, "2 of 6 rows"),
        (lambda td: td.set("y", torch.zeros(6, 2, 2)), BadValue, "the label"),
        (lambda td: td.set("y", torch.full((6,), float("inf"))), BadValue, "'y' is not finite"),
        (lambda td: td.set("mask", torch.ones(6)), BadValue, "no mask"),
        (lambda td: td[:0].set("mask", torch.ones(0, dtype=torch.bool)), BadValue, "no rows"),
        (lambda td: td[0], BadValue, "batch size"),
    ],
)
def test_bad_rows(change, error, text):
    td = make().set("mask", torch.ones(6, dtype=torch.bool))
    with pytest.raises(error, match=text):
        list(Stream(Reader(["a"], "y", "mask"), change(td))())


def test_bad_data():
    with pytest.raises(BadType, match="not data"):
        list(batches(3))
    with pytest.raises(BadType, match="something else"):
        list(batches([1]))
    with pytest.raises(BadType, match="several passes"):
        list(batches(iter([make()]), "LogisticProbe"))
    with pytest.raises(BadKey, match="twice"):
        check_keys(["a", "a"])
    assert features(make().reshape(2, 3), "a").shape == (6, 2)
