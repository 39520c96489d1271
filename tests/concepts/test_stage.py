"""BlockStage and ConceptModel: entries in, entries out, checked."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
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


def test_a_bare_module_is_a_tensordictmodule_that_writes_tensors_as_they_are():
    layer = nn.Linear(3, 2)
    stage, plain = wrapped(layer, "encoder", "x", ("g", "y")), TensorDictModule(layer, ["x"], [("g", "y")])
    td, other = (TensorDict({"x": torch.ones(4, 3)}, [4]) for _ in range(2))
    assert stage(td) is td
    assert torch.equal(td["g", "y"], plain(other)["g", "y"])
    assert type(stage).forward is TensorDictModule.forward
    assert torch.equal(stage(x=td["x"]), td["g", "y"])
    out = TensorDict(batch_size=[4])
    assert stage(other, tensordict_out=out) is out
    assert list(out.keys(True, True)) == [("g", "y")]
    two = wrapped(nn.LSTM(3, 2, batch_first=True), "encoder", "x", ["h", "_"])
    td = two(TensorDict({"x": torch.ones(4, 5, 3)}, [4]))
    assert td["h"].shape == (4, 5, 2)
    with pytest.raises(RuntimeError, match="more out_keys than tensors"):
        wrapped(layer, "encoder", "x", ["a", "b"])(other)


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
    assert wrapped(stage, "head", "x", "y") is stage
    with pytest.raises(BadValue, match="has its keys"):
        wrapped(stage, "head", "x", "y", given="x")
    with pytest.raises(BadType, match="no module"):
        wrapped(3, "head", "x", "y")


def test_a_model_can_be_cut_by_keys():
    first, second = wrapped(nn.Identity(), "", "a", "b"), wrapped(nn.Identity(), "", "b", "c")
    model = ConceptModel({"one": first, "two": second}, ConceptSpec(["a"]), "b")
    assert model["one"] is first
    assert model.select_subsequence(out_keys=["b"]).out_keys == ["b"]
