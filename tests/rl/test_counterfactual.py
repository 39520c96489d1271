"""Branches from a logged step: the simulator's true state by each way, and refusals where there is none."""

import pytest
import torch
from tensordict.nn import TensorDictModule

from tdconcepts.errors import BadKey, BadType, BadValue

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")
from tdconcepts.rl import cartpole_env, rollout_episodes
from tdconcepts.rl.counterfactual import counterfactual, restore_state

LEAN = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])


def gym_env(name="CartPole-v1"):
    from torchrl.envs import GymEnv

    return GymEnv(name, categorical_action_encoding=True)


def logged(env=None, seed=3):
    if env is None:
        return rollout_episodes(cartpole_env(1), LEAN, seeds=[seed])[0]
    return rollout_episodes(env, LEAN, seeds=[seed])


def by_hand(seed, episode, step, action):
    """Plain gymnasium: the prefix, then the other action, then the policy."""
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    if not torch.equal(torch.as_tensor(observation), episode["observation"][0]):
        observation, _ = env.reset()  # torchrl's set_seed resets once, and env.reset() once more
    for at in range(step):
        observation, *_ = env.step(int(episode["action"][at]))
    total, states = 0.0, []
    while True:
        observation, reward, terminated, truncated, _ = env.step(action)
        total += reward
        states.append(torch.as_tensor(observation))
        if terminated or truncated:
            return total, torch.stack(states)
        action = int(observation[2] > 0)


@pytest.mark.parametrize("slots", [1, 3, None])
@pytest.mark.parametrize(("restore", "tolerance"), [("replay", 0.0), ("unwrapped", 1e-4)])
def test_equals_plain_gymnasium(slots, restore, tolerance):
    env, step = gym_env() if slots is None else cartpole_env(slots), 10
    episode = logged(env if slots is None else None)
    old = int(episode["action"][step])
    found = counterfactual(env, episode, step, [1 - old, old], LEAN, seed=3, restore=restore)
    assert found["action"].tolist() == [old, 1 - old, old]
    for i, action in enumerate([old, 1 - old, old]):
        total, states = by_hand(3, episode, step, action)
        assert found["return"][i] == total
        assert found["length"][i] == len(states)
        mask = found["rollout", "collector", "mask"][i]
        assert int(mask.sum()) == len(states)
        branch = found["rollout", "next", "observation"][i][mask]
        torch.testing.assert_close(branch, states, rtol=tolerance, atol=tolerance)
    assert found["finished"].all()
    assert found["difference"].tolist() == (found["return"] - found["return"][0]).tolist()
    assert found["return"][0] == len(episode) - step


def test_what_gym_environments_do_with_auto_reset_false_is_wrong():
    env, step = gym_env(), 10
    episode = logged(env)
    env.reset()
    wrong = env.rollout(1, LEAN, auto_reset=False, tensordict=episode[step].exclude("next", "action"))
    assert torch.equal(wrong["observation"][0], episode["observation"][step])  # it echoes the log,
    assert not torch.allclose(wrong["next", "observation"][0], episode["next", "observation"][step])  # and is elsewhere
    right = counterfactual(env, episode, step, [0], LEAN, seed=3)
    assert torch.equal(right["rollout", "next", "observation"][0, 0], episode["next", "observation"][step])


def test_an_environment_that_can_be_told_its_state():
    from torchrl.envs import PendulumEnv

    env = PendulumEnv()
    push = TensorDictModule(lambda th: torch.sin(th).unsqueeze(-1), ["th"], ["action"])
    env.set_seed(0)
    with torch.no_grad():
        episode = env.rollout(12, push)
    found = counterfactual(env, episode, 4, torch.tensor([[2.0], [-2.0]]), push, max_steps=8)
    assert torch.allclose(found["rollout", "next", "th"][0], episode["next", "th"][4:12])
    assert found["rollout"].shape == (3, 8)
    assert len(set(found["return"].tolist())) == 3


def test_refusals():
    episode = logged(gym_env())
    hidden = gym_env("Acrobot-v1")
    act = TensorDictModule(lambda o: torch.zeros(o.shape[:-1]).long(), ["observation"], ["action"])
    swings = rollout_episodes(hidden, act, seeds=[1], max_steps=10)
    with pytest.raises(BadValue, match="does not hold the simulator's state"):
        counterfactual(hidden, swings, 3, [1], act, max_steps=2)
    assert counterfactual(hidden, swings, 3, [1], act, seed=1, max_steps=2)["length"].tolist() == [2, 2]
    with pytest.raises(BadValue, match="not the one that this seed starts"):
        counterfactual(gym_env(), episode, 10, [0], LEAN, seed=4)
    false = episode.clone()
    false["observation"][10, 1] += 0.1
    with pytest.raises(BadValue, match="is not the simulator's"):
        counterfactual(gym_env(), false, 10, [0], LEAN)
    with pytest.raises(BadValue, match="no way 'set_state' here"):
        restore_state(gym_env(), episode, 1, restore="set_state")
    with pytest.raises(BadValue, match="no way 'replay' here"):
        restore_state(gym_env(), episode, 1, restore="replay")

    from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv

    counted = TransformedEnv(gym_env(), Compose(RewardSum(), StepCounter()))
    with pytest.raises(BadValue, match="StepCounter"):
        counterfactual(counted, episode, 10, [0], LEAN)
    summed = TransformedEnv(gym_env(), RewardSum())
    assert counterfactual(summed, episode, 10, [0], LEAN, max_steps=3)["length"][0] == 3

    class Nothing:
        batch_size, action_key, step_and_maybe_reset = torch.Size([]), "action", None

    with pytest.raises(BadValue, match="can't be restored"):
        restore_state(Nothing(), episode, 1)
    with pytest.raises(BadType, match="not an environment"):
        counterfactual(None, episode, 1, [0], LEAN)


def test_bad_input():
    env = gym_env()
    episode = logged(env)
    with pytest.raises(BadValue, match="no such step"):
        counterfactual(env, episode, len(episode), [0], LEAN, seed=3)
    with pytest.raises(BadValue, match="not the other actions"):
        counterfactual(env, episode, 0, [], LEAN, seed=3)
    for action in ([2], [-1], [0.5]):
        with pytest.raises(BadValue, match="not actions of this environment"):
            counterfactual(env, episode, 0, action, LEAN, seed=3)
    with pytest.raises(BadType, match="one logged episode"):
        counterfactual(env, episode.unsqueeze(0), 0, [0], LEAN, seed=3)
    with pytest.raises(BadKey, match="has no 'action'"):
        counterfactual(env, episode.exclude("action"), 0, [0], LEAN, seed=3)
