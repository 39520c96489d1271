"""SVERL: the three games by their definitions, on tables small enough to enumerate; and acting without features."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.agents import cartpole_policy
from tdconcepts.rl.sverl import Hidden, Sverl, sverl_outcome
from tdconcepts.rl.targets import probability, state_value

KEY = ("attribution", "observation")


def shapley(value, n):
    """By the formula, over subsets of the others."""
    found = []
    for i in range(n):
        total = 0.0
        for size in range(n):
            for some in itertools.combinations([j for j in range(n) if j != i], size):
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                total = total + weight * (value({*some, i}) - value(set(some)))
        found.append(total)
    return torch.stack([torch.as_tensor(one) for one in found])


def critic():
    torch.manual_seed(0)
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double(), ["observation"], ["state_value"]
    )


def table():
    torch.manual_seed(1)
    return TensorDict(observation=torch.randint(0, 2, (7, 3)).double(), batch_size=[7])


@pytest.mark.parametrize("match", ["exact", "marginal"])
def test_prediction_by_the_definition(match):
    module, states = critic(), table()
    td = states[:4].copy().reshape(2, 2)
    found = Sverl(module, state_value(), states, match=match)(td)[KEY]
    seen = states["observation"]
    for place in itertools.product(range(2), range(2)):
        s = td["observation"][place]

        def value(some, s=s):
            keep = torch.tensor([f in some for f in range(3)])
            if match == "exact":
                rows = seen[(seen == s)[:, keep].all(-1)]
            else:
                rows = torch.where(keep, s, seen)
            return module.module(rows).mean()

        torch.testing.assert_close(found[place], shapley(value, 3))


def test_behaviour_is_of_the_logged_action():
    policy = cartpole_policy(8)
    torch.manual_seed(0)
    states = TensorDict(observation=torch.randint(0, 2, (9, 4)).float(), batch_size=[9])
    td = states[:2].copy().set("action", torch.tensor([0, 1]))
    found = Sverl(policy, probability(policy), states, match="exact")(td.copy())[KEY]
    seen = states["observation"]
    for i in range(2):
        s, a = td["observation"][i], td["action"][i]

        def value(some, s=s, a=a):
            keep = torch.tensor([f in some for f in range(4)])
            rows = TensorDict(observation=seen[(seen == s)[:, keep].all(-1)])
            rows.auto_batch_size_(1)
            return policy(rows)["logits"].softmax(-1)[:, a].mean()

        torch.testing.assert_close(found[i], shapley(value, 4))


@pytest.mark.parametrize("match", ["exact", "marginal"])
def test_many_orders_come_near_all_subsets_and_groups_are_one_feature(match):
    module, states = critic(), table()
    td = states[:4].copy()
    whole = Sverl(module, state_value(), states, match=match)(td.copy())[KEY]
    draws = torch.Generator().manual_seed(0)
    near = Sverl(module, state_value(), states, match=match, n_samples=400, generator=draws)(td.copy())[KEY]
    assert (near - whole).abs().max() < 0.02
    torch.testing.assert_close(near.sum(-1), whole.sum(-1))
    grouped = Sverl(module, state_value(), states, match=match, mask=torch.tensor([0, 1, 1]))(td.copy())[KEY]
    assert torch.equal(grouped[:, 1], grouped[:, 2])
    torch.testing.assert_close(grouped[:, 0] + grouped[:, 1], whole.sum(-1))


def test_a_state_that_nobody_visited_stands_for_itself():
    module, states = critic(), table()
    td = TensorDict(observation=torch.full((1, 3), 5.0).double(), batch_size=[1])
    found = Sverl(module, state_value(), states, match="exact")(td)[KEY]
    gap = module.module(td["observation"]) - module.module(states["observation"]).mean()
    torch.testing.assert_close(found[0], (gap / 3).expand(1, 3)[0].detach())


# ------------------------------------------------------------------------------------------------------- the outcome


class Fixed:
    """Two slots, three steps; what is seen is [seed, 1], the reward is the action."""

    batch_size, action_key, reward_key, done_keys = torch.Size([2]), "action", "reward", ["done"]

    def set_seed(self, seed):
        self.seed = seed

    def reset(self):
        seen = torch.tensor([float(self.seed), 1.0]).expand(2, 2)
        return TensorDict({"observation": seen, "time": torch.zeros(2)}, batch_size=[2])

    def step_and_maybe_reset(self, td):
        time = td["time"] + 1
        done = (time == 3).unsqueeze(-1)
        td["next"] = TensorDict({"reward": td["action"].unsqueeze(-1), "done": done}, batch_size=[2])
        return td, TensorDict({"observation": td["observation"], "time": time % 3}, batch_size=[2])


def test_outcome_by_the_definition():
    policy = TensorDictModule(lambda o: o[..., 0] * o[..., 1], ["observation"], ["action"])
    states = TensorDict(observation=torch.tensor([[2.0, 5.0]]), batch_size=[1])
    found = sverl_outcome(Fixed(), policy, states, [4, 4, 7, 7], episodes=2)
    for i, seed in enumerate([4, 4, 7, 7]):

        def value(some, seed=seed):
            return 3.0 * (seed if 0 in some else 2.0) * (1.0 if 1 in some else 5.0)

        torch.testing.assert_close(found[KEY][i], shapley(value, 2).double())
        assert (found["outcome"][i], found["blind"][i]) == (3.0 * seed, 30.0)
    draws = torch.Generator().manual_seed(0)
    sampled = sverl_outcome(Fixed(), policy, states, [4, 4], n_samples=3, episodes=1, generator=draws)
    torch.testing.assert_close(sampled[KEY].sum(-1), sampled["outcome"] - sampled["blind"])


def test_hidden_draws_from_the_visited_states():
    seen = []

    def act(observation):
        seen.append(observation)
        return observation[..., 0]

    policy = TensorDictModule(act, ["observation"], ["action"])
    states = TensorDict(observation=torch.tensor([[1.0, 10.0], [2.0, 20.0]]), batch_size=[2])
    blind = Hidden(policy, states, {"observation": torch.tensor([True, False])}, torch.Generator().manual_seed(0))
    td = TensorDict(observation=torch.zeros(500, 2), batch_size=[500])
    assert blind(td) is td
    assert (td["observation"] == 0).all()
    assert (seen[0][:, 0] == 0).all()
    assert set(seen[0][:, 1].tolist()) == {10.0, 20.0}
    assert 200 < int((seen[0][:, 1] == 10.0).sum()) < 300


def test_on_cartpole_the_position_is_worth_nothing(agent, env):
    from tdconcepts.rl import rollout_episodes

    visited = rollout_episodes(env, agent.policy, seeds=range(8), max_steps=60).select("observation").reshape(-1)
    pole = torch.tensor([0, 0, 1, 1])  # the cart, and the pole
    found = sverl_outcome(env, agent.policy, visited, range(8), mask=pole, episodes=1, max_steps=100)
    scores = found[KEY].mean(0)
    assert found["outcome"].mean() > 95
    assert found["blind"].mean() < 60
    assert scores[2] > 2 * scores[0]
    torch.testing.assert_close(found[KEY][:, 0] + found[KEY][:, 2], found["outcome"] - found["blind"])


def test_bad_input():
    module, states = critic(), table()
    with pytest.raises(BadValue, match="not a match"):
        Sverl(module, state_value(), states, match="near")
    with pytest.raises(BadValue, match="no visited states"):
        Sverl(module, state_value(), states[:0])
    with pytest.raises(BadType, match="visited states are a TensorDict"):
        Sverl(module, state_value(), states["observation"])
    with pytest.raises(BadKey, match="in the visited states"):
        Sverl(module, state_value(), TensorDict(x=torch.zeros(3), batch_size=[3]), match="exact")
    with pytest.raises(BadValue, match="not a number of samples"):
        Sverl(module, state_value(), states, n_samples=0)
    wide = TensorDictModule(nn.Linear(20, 1), ["observation"], ["state_value"])
    many = TensorDict(observation=torch.zeros(2, 20), batch_size=[2])
    with pytest.raises(BadValue, match="too many features"):
        Sverl(wide, Target("state_value"), many)(many.copy())
    with pytest.raises(BadValue, match="what is seen"):
        Hidden(module, states, {"observation": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(BadValue, match="no episodes"):
        sverl_outcome(Fixed(), module, states, episodes=0)
