"""Edits under a condition: which rows they reach."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Ablate, Add, Replace, Site, Steps, When, patch


def policy():
    torch.manual_seed(0)
    return TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), ["x"], ["hidden"]),
        TensorDictModule(nn.Linear(4, 2), ["hidden"], ["y"]),
    )


def batch(shape=(5,)):
    torch.manual_seed(1)
    return TensorDict(x=torch.randn(*shape, 3), step_count=torch.arange(5).reshape(*shape, 1), batch_size=shape)


def nan(value, td):
    value.fill_(float("nan"))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1)])
@pytest.mark.parametrize("where", ["hidden", Site("0.0"), Site("1", "input")])
def test_only_where_it_holds(where, shape):
    model, td = policy(), batch(shape)
    chosen = td["step_count"].squeeze(-1) % 2 == 1
    plain = model(td.copy())["y"]
    with patch(model, {where: Ablate()}) as m:
        edited = m(td.copy())["y"]
    for condition in (Steps(1, every=2), "chosen", lambda td: td["step_count"] % 2 == 1):
        with patch(model, {where: When(Ablate(), condition)}) as m:
            out = m(td.copy().set("chosen", chosen))["y"]
        torch.testing.assert_close(out, torch.where(chosen[..., None], edited, plain))


def test_other_rows_stay_bit_by_bit():
    value = torch.randn(5, 3)
    before = value.clone()
    out = When(nan, Steps(3))(value, batch())
    assert out[:3].equal(before[:3])
    assert out[3:].isnan().all()
    assert value.equal(before)


def test_one_row():
    td = batch()[2]
    assert When(Replace(1.0), Steps(2, 3))(torch.zeros(4), td).eq(1).all()
    assert When(Replace(1.0), Steps(3))(torch.zeros(4), td).eq(0).all()


def test_what_it_reads():
    assert When(Add("vector"), "chosen").in_keys == ["vector", "chosen"]
    assert When(nan, Steps(key=("agent", "step"))).in_keys == [("agent", "step")]
    with patch(policy(), {"hidden": When(Add("vector"), "chosen")}) as m:
        assert m.in_keys == ["x", "vector", "chosen"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_copies(again):
    edit = When(Ablate([1]), Steps(1, 4, 2, key="t"))
    assert again(edit) == edit
    assert repr(again(edit)) == repr(edit)


def test_steps():
    td = batch()
    assert Steps()(td).all()
    assert Steps(1, 4)(td).flatten().tolist() == [False, True, True, True, False]
    assert Steps(1, every=3)(td).flatten().tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("arguments", [(-1,), (3, 3), (0, None, 0)])
def test_bad_steps(arguments):
    with pytest.raises(BadValue, match="never reached"):
        Steps(*arguments)


def test_errors():
    td, value = batch(), torch.zeros(5, 3)
    with pytest.raises(BadType, match="not an edit"):
        When(3, Steps())
    with pytest.raises(BadType, match="not a condition"):
        When(Ablate(), 3)
    with pytest.raises(BadKey, match="StepCounter"):
        When(Ablate(), Steps(key="t"))(value, td)
    with pytest.raises(BadKey, match="decide"):
        When(Ablate(), "chosen")(value, td)
    with pytest.raises(BadKey, match="TensorDict"):
        When(Ablate(), Steps())(value, None)
    with pytest.raises(BadValue, match="each row"):
        When(Ablate(), lambda td: True)(value, td)
    with pytest.raises(BadValue, match="each row"):
        When(Ablate(), "x")(value, td)
    with pytest.raises(BadValue, match="does not fit"):
        When(Ablate(), Steps())(torch.zeros(4, 3), td)
