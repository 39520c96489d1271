"""Edited observations: at the reset, at every step, and once only."""

import pickle

import pytest
import torch

from tdconcepts import Ablate, Add, Scale, Steps, When
from tdconcepts.errors import BadKey, BadType
from tdconcepts.rl import cartpole_env, edit_observation, observing

torchrl = pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")


def far(value, td):
    value[..., 2] += 100


@pytest.mark.parametrize("edit", [Add(torch.tensor([0.0, 0.0, 100.0, 0.0])), far])
def test_every_observation_is_edited_once(edit):
    env = edit_observation(cartpole_env(3, seed=0), "observation", edit)
    torch.manual_seed(0)
    rollout = env.rollout(60, break_when_any_done=False)  # random actions: many resets, of one slot at a time
    env.close()
    assert rollout["next", "done"].sum() > 3
    for angle in (rollout["observation"][..., 2], rollout["next", "observation"][..., 2]):
        assert (angle - 100).abs().max() < 0.5
    assert rollout["observation"][..., 0].abs().max() < 5


def test_the_first_observation_and_the_simulator():
    plain, edited = cartpole_env(2, seed=0), edit_observation(cartpole_env(2, seed=0), "observation", Scale(2.0))
    one, other = plain.reset(seed=[1, 2]), edited.reset(seed=[1, 2])
    torch.testing.assert_close(other["observation"], 2 * one["observation"])
    action = torch.tensor([0, 1])
    one, other = plain.step(one.set("action", action)), edited.step(other.set("action", action))
    torch.testing.assert_close(other["next", "observation"], 2 * one["next", "observation"])
    plain.close()
    edited.close()


def test_on_a_schedule():
    from torchrl.envs import StepCounter, TransformedEnv

    counted = TransformedEnv(cartpole_env(1, seed=0), StepCounter())
    env = edit_observation(counted, "observation", When(Ablate(), Steps(3)))
    rollout = env.rollout(6)
    env.close()
    assert rollout["observation"][0].ne(0).any(-1).tolist() == [True] * 3 + [False] * 3


def test_the_transform_pickles():
    transform = observing._transform()("observation", Ablate([1]))
    again = pickle.loads(pickle.dumps(transform))
    assert type(again) is observing.EditObservation
    assert again.edit == transform.edit


def test_errors():
    env = cartpole_env(1)
    with pytest.raises(BadKey, match="no observation"):
        edit_observation(env, "pixels", Ablate())
    with pytest.raises(BadType, match="not an environment"):
        edit_observation(None, "observation", Ablate())
    with pytest.raises(BadType, match="not an edit"):
        edit_observation(env, "observation", 3)
    with pytest.raises(AttributeError):
        _ = observing.Nothing
    env.close()
