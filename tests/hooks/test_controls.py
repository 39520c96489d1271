"""Controls of edits: as far, in another direction."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts.errors import BadType
from tdconcepts.hooks import Ablate, Add, MatchedNorm, RemoveDirection, patch
from tdconcepts.hooks.controls import _rotation


def shift(value, td):
    value[..., 0] += 1


@pytest.mark.parametrize("edit", [Ablate([1, 2]), Add(torch.arange(4.0)), shift])
def test_every_row_moves_as_far(edit):
    x = torch.randn(3, 5, 4).double()
    before = x.clone()
    own = x.clone()
    new = edit(own, None)
    moved = (own if new is None else new) - x
    found = MatchedNorm(edit, seed=3)(x, None) - x
    torch.testing.assert_close(found.norm(dim=-1), moved.norm(dim=-1))
    assert not torch.allclose(found, moved)
    torch.testing.assert_close(found @ found.mT, moved @ moved.mT)  # rows keep their angles to each other
    assert x.equal(before)


def test_a_direction_becomes_another_one():
    x, u = torch.randn(9, 4).double(), torch.tensor([0.0, 2.0, 0.0, 0.0]).double()
    turned = _rotation(4, 7)[:, 1]
    torch.testing.assert_close(MatchedNorm(RemoveDirection(u), 7)(x, None), x - x[:, 1:2] * turned)


def test_rotations():
    turns = torch.stack([_rotation(3, seed) for seed in range(2000)])
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).double().expand(2000, 3, 3))
    assert turns.mean(0).abs().max() < 0.06  # uniform: no direction is preferred
    torch.testing.assert_close(turns.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.03, rtol=0)
    assert _rotation(3, 5).equal(turns[5])


def test_in_a_patch_and_copies():
    net = TensorDictModule(torch.nn.Linear(3, 2), ["x"], ["y"])
    td = TensorDict(x=torch.randn(4, 3), v=torch.randn(4, 2), batch_size=[4])
    edit = MatchedNorm(Add("v"), 1)
    assert edit.in_keys == ["v"]
    with patch(net, {"y": edit}) as m:
        out = m(td.copy())["y"]
    torch.testing.assert_close((out - net(td.copy())["y"]).norm(dim=-1), td["v"].norm(dim=-1))
    for again in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert again == edit


def test_errors():
    with pytest.raises(BadType, match="not an edit"):
        MatchedNorm(3)
    with pytest.raises(BadType, match="whole numbers"):
        MatchedNorm(Ablate())(torch.zeros(2, 3, dtype=torch.long), None)
