"""BlockStage and ConceptModel: entries in, entries out, checked."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing
from torch import nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, ConceptModel, as_size, as_spec, beside, check_block, wrapped
from tdconcepts.errors import BadKey, BadType, BadValue


class Sum(BlockStage):
    def compute(self, *entries):
        return sum(entries), entries[0] - entries[1]


def test_entries_in_entries_out():
    stage = Sum(["a", ("g", "b")], ["s", ("g", "d")])
    td = TensorDict({"a": torch.ones(2, 3), "g": {"b": torch.full((2, 3), 3.0)}}, [2])
    assert stage(td) is td
    assert td["s"].unique().tolist() == [4]
    assert td["g", "d"].unique().tolist() == [-2]


@pytest.mark.parametrize(
    ("td", "error", "text"),
    [
        (TensorDict({"a": torch.zeros(1), "bb": torch.zeros(1)}), BadKey, "did you mean 'bb'"),
        (TensorDict({"a": torch.zeros(1), "b": torch.zeros(1)}).lock_(), BadValue, "locked"),
    ],
)
def test_bad_calls(td, error, text):
    with pytest.raises(error, match=text):
        Sum(["a", "b"], ["s", "d"])(td)


def test_a_model_runs_its_stages_as_tensordict_does(monkeypatch):
    """With few steps where nobody could tell: not where somebody listens, or where there is something to skip."""
    torch.manual_seed(0)
    first, last = wrapped(nn.Linear(3, 2), "encoder", "x", ("g", "b")), wrapped(nn.Identity(), "head", ("g", "b"), "y")
    model = ConceptModel({"first": first, "stage": Sum(["x", "x"], ["s", "d"]), "last": last}, ConceptSpec(["a"]), "y")
    assert type(first) is TensorDictModule
    whole, data = TensorDictSequential(*model.module.children()), TensorDict({"x": torch.ones(4, 3)}, [4])
    td, other = model(data.copy()), whole(data.copy())
    assert all(torch.equal(td[key], other[key]) for key in [*model.out_keys, "x"])
    run, calls = TensorDictModule.forward, []
    monkeypatch.setattr(
        TensorDictModule, "forward", lambda self, *args, **kw: calls.append(1) or run(self, *args, **kw)
    )
    model(data.copy())
    assert not calls  # what is wrapped around it has not run
    heard = []
    first.register_forward_hook(lambda module, given, out: heard.append(out))
    out = model(data.copy())
    assert heard == [out]
    assert calls == [1]
    given = td.copy().set("y", torch.zeros(4, 2))
    with set_skip_existing(True):
        assert model(given)["y"].count_nonzero() == 0
    with pytest.raises(KeyError, match="'x'"):
        model(TensorDict(batch_size=[4]))
    out = TensorDict(batch_size=[4])
    assert model(data.copy(), tensordict_out=out) is out
    assert set(out.keys(True, True)) == set(model.out_keys)
    model.select_out_keys("y")
    assert set(model(data.copy()).keys(True, True)) == {"x", "y"}
    two = ConceptModel({"one": wrapped(nn.LSTM(3, 2, batch_first=True), "e", "x", ["h", "_"])}, ConceptSpec(["a"]), "h")
    assert two(TensorDict({"x": torch.ones(4, 5, 3)}, [4]))["h"].shape == (4, 5, 2)
    with pytest.raises(RuntimeError, match="more out_keys than tensors"):
        ConceptModel({"one": wrapped(nn.Linear(3, 2), "e", "x", ["a", "b"])}, ConceptSpec(["a"]), "a")(data.copy())


def test_the_small_checks():
    assert as_spec(["a"]) == ConceptSpec(["a"])
    assert beside(("x", "y", "z"), "w") == ("x", "y", "w")
    with pytest.raises(BadValue, match="'n': 0"):
        as_size(m=1, n=0)
    with pytest.raises(BadType, match=r"td\['k'\]\.float"):
        check_block(torch.zeros(2, dtype=torch.int), (2,), "k")
    with pytest.raises(BadValue, match=r"\[\*B, 3, 2\]"):
        check_block(torch.zeros(5, 2, 2), (3, 2), "k")
    with pytest.raises(BadKey, match="one key"):
        Sum(["a"], ["s", "s"])


def test_a_bare_module_is_wrapped_and_one_with_keys_is_not():
    assert wrapped(nn.Identity(), "head", "a", "b").in_keys == ["a"]
    stage = Sum(["a", "b"], ["s", "d"])
    assert wrapped(stage, "head", "x", "y", writes=[]) is wrapped(stage, "head", "x", "d") is stage
    with pytest.raises(BadKey, match=r"(?s)out_keys \['s', 'd'\].*'u' or 'v'.*\(net, \['a', 'b'\], \['y'\]\)"):
        wrapped(stage, "head", "x", "y", writes=["u", "v"])
    with pytest.raises(BadValue, match="has its keys"):
        wrapped(stage, "head", "x", "y", given="x")
    with pytest.raises(BadType, match="no module"):
        wrapped(3, "head", "x", "y")


def test_a_model_can_be_cut_by_keys():
    first, second = wrapped(nn.Identity(), "", "a", "b"), wrapped(nn.Identity(), "", "b", "c")
    model = ConceptModel({"one": first, "two": second}, ConceptSpec(["a"]), "b")
    assert model["one"] is first
    assert model.select_subsequence(out_keys=["b"]).out_keys == ["b"]
