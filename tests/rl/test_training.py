"""The training loops: what they keep, what they judge, how they stop."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.rl.training import DQN, PPO, Keeper, _step, gym_envs


def episodes(*returns):
    return TensorDict({"return": torch.tensor(returns)}, batch_size=[len(returns)])


def test_the_best_is_kept():
    scores = iter([episodes(1.0, 3.0), episodes(4.0, 8.0), episodes(3.0, 3.0)])
    notes = []
    keeper = Keeper(lambda policy: next(scores), lambda e: bool(e["return"].min() > 3.5), lambda *n: notes.append(n))
    policy = nn.Linear(1, 1)
    stops = []
    for frames in (10, 20, 30):
        nn.init.constant_(policy.weight, frames)
        stops.append(keeper.look(frames, frames / 30, policy))
    assert stops == [False, True, False]
    agent = keeper.agent(seed=5)
    assert agent.policy.weight.item() == 20
    assert agent.policy is not policy
    assert (agent.critic, agent.seed, agent.frames, agent.mean_return) == (None, 5, 30, 6.0)
    assert agent.history[0] == {"frames": 10, "mean": 2.0, "min": 1.0}
    assert notes[-1] == ("training the agent", 1.0, "mean return 6")


def test_a_step_adds_up_the_losses_and_clips():
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 1.0)
    x = weight.weight.sum()
    losses = TensorDict({"loss_a": 3 * x, "loss_b": 4 * x, "entropy": 100 * x.detach()})
    _step(losses, torch.optim.SGD(weight.parameters(), lr=0.1), weight, 2.0)
    torch.testing.assert_close(weight.weight.data, torch.tensor([[0.8]]))


def test_environments():
    pytest.importorskip("torchrl")
    pytest.importorskip("gymnasium")
    env = gym_envs("Pendulum-v1", 2, seed=3)
    assert env.batch_size == (2,)
    rollout = env.rollout(3)
    env.close()
    assert rollout["action"].shape == (2, 3, 1)
    for wrong in (("Pendulum-v1", 0), ("Pendulum-v1", "2"), (None, 2)):
        with pytest.raises(BadValue, match="no environments"):
            gym_envs(*wrong)
    with pytest.raises(BadValue, match="no environment 'Pendulum-v9'"):
        gym_envs("Pendulum-v9", 2)
    for seed in ("a", -1, 1.5):
        with pytest.raises(BadType, match="not a seed"):
            gym_envs("Pendulum-v1", 2, seed)


def test_settings_are_values():
    assert dataclasses.replace(PPO(), gamma=0.9).gamma == 0.9
    assert DQN() == DQN()
