"""The importance of states and the highlights of a rollout."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.rl.importance import StateImportance, highlights


def test_importance_by_the_formulas():
    torch.manual_seed(0)
    td = TensorDict(q=torch.randn(2, 3, 4).double(), batch_size=[2, 3])
    for kind in ("range", "second", "entropy"):
        found = StateImportance("q", kind, ("score", kind))(td)["score", kind]
        for q, one in zip(td["q"].reshape(-1, 4), found.flatten(), strict=True):
            low, *_, second, high = q.sort().values
            p = q.softmax(0)
            by_hand = {
                "range": high - low,
                "second": high - second,
                "entropy": (p * p.log()).sum() + torch.tensor(4.0).double().log(),
            }
            torch.testing.assert_close(one, by_hand[kind])
    even = StateImportance("q", "entropy")(TensorDict(q=torch.zeros(1, 5), batch_size=[1]))["importance"]
    assert even.abs().max() < 1e-6


def rollout():
    scores = torch.tensor([[0.0, 9.0, 8.0, 0.1, 0.2, 5.0, 4.0], [7.0, 0.0, 0.0, 0.0, 99.0, 98.0, 97.0]])
    td = TensorDict(importance=scores, x=torch.zeros(2, 7, 1), batch_size=[2, 7])
    td["collector", "mask"] = torch.ones(2, 7, dtype=torch.bool)
    td["collector", "mask"][1, 4:] = False
    return td


def test_windows_do_not_overlap_and_stay_in_the_episode():
    found = highlights(rollout(), 10, context=1)
    assert [(one.trajectory, one.step, one.start, one.stop) for one in found][:3] == [
        ((0,), 1, 0, 3),
        ((1,), 0, 0, 2),
        ((0,), 5, 4, 7),
    ]
    assert all(one.trajectory == (0,) or one.stop <= 4 for one in found)
    taken = set()
    for one in found:
        steps = {(one.trajectory, t) for t in range(one.start, one.stop)}
        assert not steps & taken
        taken |= steps
    assert [one.importance for one in found] == sorted((one.importance for one in found), reverse=True)
    assert len(highlights(rollout(), 2)) == 2
    assert highlights(rollout()[0], 1, context=0)[0].trajectory == ()


def test_diversity():
    td = rollout()
    td["x"][0, 5] = 1.0
    found = highlights(td, 10, context=1, state="x", distance=0.5)
    assert [(one.trajectory, one.step) for one in found] == [((0,), 1), ((0,), 5)]
    assert len(highlights(td, 10, context=1, state="x")) == 2


def test_bad_input():
    for wrong in ({"k": 0}, {"context": -1}):
        with pytest.raises(BadValue, match="no highlights"):
            highlights(rollout(), **wrong)
    with pytest.raises(BadKey, match="no entry 'q'"):
        highlights(rollout(), importance="q")
    with pytest.raises(BadValue, match="not a kind"):
        StateImportance(kind="most")
    with pytest.raises(BadKey, match="no entry 'action_value'"):
        StateImportance()(rollout())
    with pytest.raises(BadValue, match="two actions or more"):
        StateImportance("x")(rollout())
    with pytest.raises(BadValue, match="the last of them time"):
        highlights(rollout()[0, 0])
    with pytest.raises(BadValue, match="NoneType"):
        highlights(None)
