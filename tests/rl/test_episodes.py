"""Episodes by seed: the same start for the same seed, one episode each, whatever the number of slots."""

import pytest
import torch
from tensordict.nn import TensorDictModule

from tdconcepts.errors import BadValue

pytest.importorskip("torchrl")
from tdconcepts.rl import cartpole_env, compare_returns, episode_returns, rollout_episodes
from tdconcepts.rl.episodes import run_episodes


def lean(observation):
    """Push towards the side the pole leans to: about 40 steps."""
    return (observation[..., 2] > 0).long()


POLICY = TensorDictModule(lean, ["observation"], ["action"])


def by_hand(seed: int, max_steps: int = 1000) -> tuple[float, int, bool]:
    """Plain gymnasium, one environment, one episode."""
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    total = 0.0
    for step in range(1, max_steps + 1):
        observation, reward, terminated, truncated, _ = env.step(int(observation[2] > 0))
        total += reward
        if terminated or truncated:
            return total, step, True
    return total, max_steps, False


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_equals_plain_gymnasium_whatever_the_number_of_slots(slots):
    env, seeds = cartpole_env(slots), [3, 11, 4, 100, 7]
    found = episode_returns(env, POLICY, seeds)
    expected = [by_hand(seed) for seed in seeds]
    assert found.batch_size == torch.Size([5])
    assert found["return"].tolist() == [r for r, _, _ in expected]
    assert found["length"].tolist() == [n for _, n, _ in expected]
    assert found["finished"].all()


def test_an_unbatched_environment_runs_one_seed_after_the_other():
    from torchrl.envs import GymEnv

    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    first, second = (episode_returns(env, POLICY, [5, 6, 5])["return"] for _ in range(2))
    assert torch.equal(first, second)
    assert first[0] == first[2]


def test_a_transformed_environment_is_seeded_slot_by_slot_too():
    from torchrl.envs import RewardSum, TransformedEnv

    env = TransformedEnv(cartpole_env(2), RewardSum())
    assert episode_returns(env, POLICY, [9, 2])["return"].tolist() == [by_hand(9)[0], by_hand(2)[0]]


def test_a_batched_environment_need_not_be_started_before():
    from torchrl.envs import GymEnv, RewardSum, SerialEnv, TransformedEnv

    def make():
        return GymEnv("CartPole-v1", categorical_action_encoding=True)

    def summed():
        return TransformedEnv(make(), RewardSum())

    found = [
        episode_returns(env, POLICY, [5, 6], max_steps=12)
        for env in (SerialEnv(2, make), TransformedEnv(SerialEnv(2, make), RewardSum()), SerialEnv(2, summed))
    ]
    assert found[0]["length"].tolist() == [12, 12]
    assert all(torch.equal(one["return"], found[0]["return"]) for one in found)
    compared = compare_returns(SerialEnv(2, make), POLICY, {"same": POLICY}, [5, 6], max_steps=12)
    assert compared.of("same")["return"].tolist() == [12, 12]
    assert rollout_episodes(SerialEnv(2, make), POLICY, seeds=[5, 6], max_steps=3).shape[0] == 2


def test_episodes_are_cut_at_max_steps_and_it_shows():
    found = episode_returns(cartpole_env(2), POLICY, [0, 1], max_steps=5)
    assert found["length"].tolist() == [5, 5]
    assert not found["finished"].any()


def test_record_keeps_what_the_policy_saw_and_did():
    _, seen = run_episodes(cartpole_env(2), POLICY, [3, 11, 4], without=["terminated"])
    assert len(seen.starts) == len(seen.states) == 2
    assert set(seen.states[0].keys()) == {"observation", "done", "truncated"}
    assert not run_episodes(cartpole_env(2), POLICY, [3], max_steps=2)[1].states
    for start, states, actions, alive in zip(seen.starts, seen.states, seen.actions, seen.alive, strict=True):
        assert torch.equal(states["observation"][0], start["observation"])
        assert torch.equal(lean(states["observation"]), actions)
        assert alive[0].all()
        assert (alive.long().diff(dim=0) <= 0).all()


def test_sampling_repeats_for_a_seed_and_leaves_the_global_state_alone():
    def coin(observation):
        return torch.randint(0, 2, observation.shape[:-1])

    policy, env = TensorDictModule(coin, ["observation"], ["action"]), cartpole_env(4)
    before = torch.get_rng_state()
    first, second = (episode_returns(env, policy, range(4), greedy=False)["return"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_run():
    env = cartpole_env(2)
    with pytest.raises(BadValue, match="no episode"):
        episode_returns(env, POLICY, [])
    with pytest.raises(BadValue, match="no episode"):
        episode_returns(env, POLICY, [1], max_steps=0)


def test_a_reward_for_each_agent_is_refused():
    class TwoRewards:
        batch_size, action_key, reward_key, done_keys = torch.Size([2]), "action", "reward", ["done"]

        def set_seed(self, seed):
            pass

        def reset(self):
            from tensordict import TensorDict

            return TensorDict({"observation": torch.zeros(2, 4)}, batch_size=[2])

        def step_and_maybe_reset(self, td):
            td["next"] = {"reward": torch.zeros(2, 3), "done": torch.zeros(2, 1, dtype=torch.bool)}
            return td, td

    with pytest.raises(BadValue, match="one reward and one done flag"):
        episode_returns(TwoRewards(), POLICY, [0, 1])
    TwoRewards.done_keys = [("left", "done"), ("right", "done")]
    with pytest.raises(BadValue, match="one done flag"):
        episode_returns(TwoRewards(), POLICY, [0, 1])
