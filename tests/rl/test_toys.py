"""Toy tasks: a cue that must be remembered, agents that must meet."""

import pickle

import pytest
import torch
from tensordict import TensorDict

from tdconcepts import Ablate, Gradient, Target
from tdconcepts.errors import BadValue
from tdconcepts.rl import TemporalProbe, compare_returns, lstm_recall, multiagent_meeting, rollout_episodes, toys
from tdconcepts.rl.toys import MEETING_STEPS, meeting_env, recall_env

torchrl = pytest.importorskip("torchrl")


@pytest.mark.parametrize("make", [lambda: recall_env(3, seed=1), lambda: meeting_env(3, agents=2, seed=1)])
def test_they_are_environments_of_torchrl(make):
    from torchrl.envs.utils import check_env_specs

    check_env_specs(make())
    first, second = make(), make()
    torch.manual_seed(0)
    one = first.rollout(30, break_when_any_done=False)
    torch.manual_seed(0)
    two = second.rollout(30, break_when_any_done=False)
    assert (one.select("next") == two.select("next")).all()


def test_the_cue_is_seen_once_and_asked_for_at_the_end():
    env = recall_env(8, delay=2, seed=0)
    td = env.reset()
    cue = (td["observation"][:, 0] > 0).long()
    rewards, done = [], []
    for _ in range(4):
        td = env.step(td.set("action", cue))["next"]
        rewards.append(td["reward"][:, 0])
        done.append(bool(td["done"].all()))
        assert td["observation"][:, 0].eq(0).all()
    assert torch.stack(rewards).T.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 8
    assert done == [False, False, False, True]
    td = env.reset()
    cue = (td["observation"][:, 0] > 0).long()
    for _ in range(4):
        td = env.step(td.set("action", 1 - cue))["next"]
    assert td["reward"].eq(-1).all()


def test_the_agents_move_by_their_own_actions():
    env = meeting_env(2, agents=3, seed=0)
    td = env.reset()
    before = td["agents", "observation"].clone()
    action = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1).expand(2, 3, 1)
    td = env.step(td.set(("agents", "action"), action))["next"]
    after = td["agents", "observation"]
    torch.testing.assert_close(after[..., 0] - before[..., 0], 0.1 * action[..., 0])
    place = after[..., 0]
    torch.testing.assert_close(after[..., 1], (place.sum(-1, keepdim=True) - place) / 2)
    torch.testing.assert_close(td["reward"], -(place - place.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True))


def test_the_lstm_remembers_and_its_memory_is_used():
    agent = lstm_recall(seed=0)
    assert agent.mean_return == 1.0
    env = recall_env(32, seed=9)
    rollout = rollout_episodes(env, agent.policy, max_steps=8)
    cue = lambda td: td["observation"][:, :1, 0].expand(td.batch_size)  # noqa: E731
    probe = TemporalProbe("memory", cue, name="cue").fit(rollout)
    assert probe.scores["by_step"].min() > 0.9
    result = compare_returns(env, agent.policy, {"no memory": {"memory": Ablate()}}, range(32), max_steps=8)
    assert result.difference("no memory")[2] < -0.3
    tested = probe.causal_test(env, agent.policy, range(32), controls=1, max_steps=8)  # the other directions suffice
    assert tested.names == ("unpatched", "without cue", "without cue: control 0")


@pytest.mark.parametrize("share_params", [True, False])
def test_agents_meet_and_are_explained(share_params):
    agent = multiagent_meeting(seed=0, share_params=share_params)
    assert agent.mean_return > -2.5  # without moving: about -8
    td = meeting_env(4, seed=5).reset()
    explain = Gradient(agent.policy, Target(("agents", "action"), (0, 0)))
    out = explain(td.select("agents"))["attribution", "agents", "observation"]
    assert out[:, 0].abs().sum() > 0
    assert out[:, 1:].abs().sum() == 0  # an agent acts by its own observation
    assert MEETING_STEPS == 20


def test_a_seed_repeats_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    for train in (lstm_recall, multiagent_meeting):
        one, two = (train(seed=3, updates=25).policy for _ in range(2))
        assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("train", [lstm_recall, multiagent_meeting])
def test_the_last_update_is_judged(train):
    assert len(train(updates=1).history) == 1
    with pytest.raises(BadValue, match="no updates"):
        train(updates=0)


def test_environments_pickle():
    env = toys.MeetingEnv(2, 3, 0)
    again = pickle.loads(pickle.dumps(env))
    assert type(again) is toys.MeetingEnv
    assert isinstance(again.reset(), TensorDict)


def test_errors():
    with pytest.raises(BadValue, match="no such environments"):
        recall_env(0)
    with pytest.raises(BadValue, match="no such environments"):
        recall_env(2, delay=-1)
    for agents in (1, "two"):
        with pytest.raises(BadValue, match="no such environments"):
            meeting_env(2, agents=agents)
    with pytest.raises(AttributeError):
        _ = toys.Nothing
