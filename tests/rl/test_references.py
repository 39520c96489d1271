"""Reference agents: they learn in seconds, the same from the same seed, and their stages have names."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts import Do, GroundTruth, intervene
from tdconcepts.errors import BadValue
from tdconcepts.rl import cartpole_concepts, cartpole_env, concept_cartpole, dqn_cartpole, episode_returns, ppo_pendulum

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")


@pytest.fixture(scope="module")
def speaking():
    return concept_cartpole(seed=0, randint=0.25)


def test_a_policy_that_speaks_in_concepts(speaking):
    assert speaking.mean_return >= 450
    env = cartpole_env(8)
    env.set_seed(0)
    torch.manual_seed(0)
    td = env.rollout(100, speaking.policy, break_when_any_done=False)
    right = (td["concepts"] > 0.5) == cartpole_concepts(td).bool()
    clear = td["observation"][..., [2, 3, 0, 1]].abs() > torch.tensor([0.02, 0.1, 0.1, 0.1])
    assert right[clear].float().mean() > 0.96  # .975 to .997, by the starts of the episodes
    env.close()


def test_its_concepts_are_what_it_acts_by(speaking):
    """With the lean always said to be to the right, it falls."""
    env = cartpole_env(8)
    told = intervene(speaking.policy, "concepts", strategy=Do([1.0, 1.0, 0.5, 0.5]), among=[0, 1])
    returns = episode_returns(env, told, range(8))["return"]
    assert returns.mean() < 100
    env.close()


def test_it_can_be_corrected(speaking):
    """It has learnt with true concepts mixed in: it balances by four bits, if not as long as by four probabilities."""
    env = cartpole_env(8)
    corrected = intervene(speaking.policy, "concepts", strategy=GroundTruth("labels"))
    assert episode_returns(env, corrected, range(8))["return"].mean() > 60  # a random policy has 22
    assert not speaking.policy.training
    td = speaking.policy(env.reset())
    assert not td["teaching", "mask"].any()
    env.close()


def test_dqn_learns():
    agent = dqn_cartpole(seed=1, frames=6144)
    assert agent.critic is None
    assert agent.mean_return > 100  # a random policy has 22
    td = agent.policy(TensorDict(observation=torch.zeros(3, 4), batch_size=[3]))
    assert td["action_value"].shape == (3, 2)
    assert td["action"].equal(td["action_value"].argmax(-1))


def test_pendulum_learns():
    agent = ppo_pendulum(seed=1)
    assert agent.mean_return > -500  # a random policy has -1200
    td = agent.policy(TensorDict(observation=torch.zeros(3, 3), batch_size=[3]))
    assert td["action"].shape == (3, 1)
    assert td["action"].abs().max() <= 2


@pytest.mark.parametrize(("train", "frames"), [(dqn_cartpole, 1280), (ppo_pendulum, 2048), (concept_cartpole, 1024)])
def test_a_seed_repeats_and_leaves_the_global_state_alone(train, frames):
    before = torch.get_rng_state()
    one, two, other = (train(seed=seed, frames=frames).policy for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("train", [dqn_cartpole, ppo_pendulum, concept_cartpole])
def test_a_budget_below_one_batch(train):
    with pytest.raises(BadValue, match="below one batch"):
        train(frames=10)
