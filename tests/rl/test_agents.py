"""The reference agent: its stages, its seed, its score, and what it leaves alone."""

import random

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type

from tdconcepts import errors
from tdconcepts.errors import BadValue, MissingExtra, TdConceptsError
from tdconcepts.rl import cartpole_env, cartpole_policy, episode_returns, ppo_cartpole


def test_the_policy_in_stages():
    policy = cartpole_policy(width=8)
    td = policy(TensorDict({"observation": torch.randn(2, 3, 4)}, batch_size=[2, 3]))
    shapes = {key: list(td[key].shape) for key in policy.out_keys}
    assert shapes == {"hidden": [2, 3, 8], "concept": [2, 3, 8], "logits": [2, 3, 2], "action": [2, 3]} | {
        "action_log_prob": [2, 3]
    }
    assert torch.equal(td["action"], td["logits"].argmax(-1))


def test_the_policy_samples_where_it_is_asked_to():
    policy, td = cartpole_policy(), TensorDict({"observation": torch.zeros(500, 4)}, batch_size=[500])
    with set_interaction_type(InteractionType.RANDOM):
        assert 100 < int(policy(td)["action"].sum()) < 400


def test_the_environment_starts_slot_by_slot():
    pytest.importorskip("torchrl")
    one, several = cartpole_env(1), cartpole_env(3, seed=7)
    assert several.batch_size == torch.Size([3])
    starts = several.reset(seed=[7, 8, 9])["observation"]
    assert torch.equal(starts[1:2], one.reset(seed=[8])["observation"])
    with pytest.raises(BadValue, match="no environments"):
        cartpole_env(0)


def test_it_learns(agent):
    assert agent.mean_return >= 475
    assert agent.history[-1]["min"] >= 400
    assert agent.frames < 102_400
    fresh = episode_returns(cartpole_env(16), agent.policy, range(500, 516))
    assert fresh["return"].mean() >= 450
    value = agent.critic(TensorDict({"observation": torch.zeros(3, 4)}, batch_size=[3]))["state_value"]
    assert value.shape == (3, 1)
    assert float(value.detach().mean()) > 10.0  # a balanced pole is worth more than the first steps


def test_a_seed_repeats_and_leaves_the_global_state_alone():
    pytest.importorskip("torchrl")
    before, python = torch.get_rng_state(), random.getstate()
    notes = []
    first = ppo_cartpole(seed=3, frames=2048, progress=lambda *note: notes.append(note))
    second, other = ppo_cartpole(seed=3, frames=2048), ppo_cartpole(seed=4, frames=2048)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    states = [agent.policy.state_dict() for agent in (first, second, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    one, another = (state["module.1.module.0.weight"] for state in (states[0], states[2]))
    assert (one - another).norm() > 10.0  # other initial weights, not other data only
    assert first.history == second.history
    assert notes[-1][:2] == ("training the agent", 1.0)
    assert all(0.0 < done <= 1.0 for _, done, _ in notes)


def test_a_budget_below_one_batch():
    with pytest.raises(BadValue, match="below one batch"):
        ppo_cartpole(frames=100)


def test_a_missing_extra_names_the_command(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    for call in (cartpole_env, ppo_cartpole):
        with pytest.raises(MissingExtra, match=r"pip install 'tdconcepts\[rl\]'") as caught:
            call()
        assert isinstance(caught.value, ImportError)
        assert isinstance(caught.value, TdConceptsError)
