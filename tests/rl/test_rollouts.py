"""Rollouts: the first episode of each environment, by seed, with its mask."""

import pytest
import torch
from tensordict.nn import TensorDictModule

from tdconcepts.errors import BadValue
from tdconcepts.rl.rollouts import MASK, rollout_episodes


def test_rollout_episodes_masks_the_first_episode(env):
    lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
    from tdconcepts.rl import episode_returns

    td = rollout_episodes(env, lean, seeds=range(8))
    lengths = episode_returns(env, lean, range(8))["length"]
    assert td[MASK].sum(-1).tolist() == lengths.tolist()
    assert td.batch_size == torch.Size([8, int(lengths.max())])
    assert td["next", "done"].squeeze(-1)[torch.arange(8), lengths - 1].all()
    assert not td["observation"].requires_grad
    assert torch.equal(td["observation"], rollout_episodes(env, lean, seeds=range(8))["observation"])
    assert rollout_episodes(env, lean, max_steps=3).batch_size == torch.Size([8, 3])
    with pytest.raises(BadValue, match="8 seeds"):
        rollout_episodes(env, lean, seeds=range(3))


def test_rollout_episodes_of_one_environment():
    GymEnv = pytest.importorskip("torchrl.envs").GymEnv  # noqa: N806

    lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
    td = rollout_episodes(GymEnv("CartPole-v1", categorical_action_encoding=True), lean, seeds=[1])
    assert td.ndim == 1
    assert td[MASK].all()
    assert td["next", "done"][-1].all()
