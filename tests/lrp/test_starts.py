"""Where relevance starts: its number, its pull-back, several conditions."""

import copy
import pickle

import pytest
import torch

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.lrp.conditions import Conditions, Which, which
from tdconcepts.lrp.starts import Started

Y = torch.tensor([[1.0, -2.0], [0.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("relevance", [False, True])
@pytest.mark.parametrize("start", ["value", "ones"])
def test_number_and_flow(start, relevance):
    y = Y.clone().requires_grad_()
    values, several = Started(Target("y", [0, 1]), start, relevance).read(y, None, 1)
    assert several
    began = Y if start == "value" else torch.ones_like(Y) if relevance else (Y != 0).double()
    assert values.equal(began)
    flow = began if relevance else torch.ones_like(Y) if start == "value" else began / torch.where(Y == 0, 1, Y)
    assert torch.autograd.grad(values.sum(), y)[0].equal(flow)


def test_it_is_the_target_in_all_else():
    target = Target("y", "argmax")
    started = Started(target, "ones", True)
    assert (started.of, started.select, started.by, started.moves) == ("y", "argmax", None, True)
    assert started.hold(Y, 1).equal(Y.argmax(1))
    for other in (copy.deepcopy(started), pickle.loads(pickle.dumps(started))):
        assert other.read(Y, None, 1)[0].equal(torch.ones(2, dtype=torch.float64))


def test_conditions_are_counted_as_targets():
    one, y = Which(3), Y[:, 0].clone().requires_grad_()
    spread = one.spread(y)
    assert spread.equal(Y[:, :1].expand(2, 3))
    for n in range(3):
        (found,) = torch.autograd.grad(spread[:, n].sum(), y, retain_graph=True)
        assert found.equal(torch.ones(2, dtype=torch.float64))
        assert one.rows.equal(torch.eye(3, dtype=torch.float64)[n].expand(2, 3))
    assert which() is None


def test_several_targets_under_several_conditions():
    conditions = Conditions(None, [{"0": 1}, {"0": 2}])
    with conditions.acting(), pytest.raises(BadValue, match="several targets under several conditions"):
        Started(Target("y", [0, 1]), "value", True).read(Y, None, 1)
