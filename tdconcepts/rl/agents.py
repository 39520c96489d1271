"""Reference agents that train in seconds: PPO on CartPole, with every stage of the policy under its own key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn

from tdconcepts.errors import BadValue, import_extra
from tdconcepts.rl.episodes import episode_returns
from tdconcepts.rl.training import PPO, Keeper, TrainedAgent, gym_envs, ppo

__all__ = [
    "balances",
    "batches_in",
    "cartpole_env",
    "cartpole_policy",
    "critic_of",
    "judge_of",
    "linear",
    "ppo_cartpole",
]

ENVS, CARTPOLE = 16, PPO()
EVAL_SEEDS = range(1_000_000, 1_000_016)  # sixteen start states that no test episode shares


def cartpole_env(num_envs: int = ENVS, seed: int | None = None) -> Any:
    """``num_envs`` CartPole-v1 in one process as one torchrl environment of batch ``[num_envs]``.

    A synchronous gymnasium vector with its automatic reset disabled, because torchrl resets by itself: about ten times
    the steps a second of one ``GymEnv``. Actions are integers.

    Args:
        num_envs: how many; 16 by default.
        seed: slot i starts from ``seed + i``; None leaves it to gymnasium.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed.

    Examples:
        >>> from tdconcepts import rl
        >>> env = rl.cartpole_env(3, seed=0)
        >>> env.rollout(4)["observation"].shape
        torch.Size([3, 4, 4])
    """
    return gym_envs("CartPole-v1", num_envs, seed, categorical_action_encoding=True)


def cartpole_policy(width: int = 64) -> ProbabilisticTensorDictSequential:
    """An untrained policy in readable stages: ``observation -> hidden -> concept -> logits -> action``.

    ``observation`` ``[*B, 4]`` (cart position m, cart velocity m/s, pole angle rad, angular velocity rad/s),
    ``hidden`` and ``concept`` ``[*B, width]`` (linear and tanh), ``logits`` ``[*B, 2]`` (push left, push right),
    ``action`` ``[*B]`` (the mode unless the interaction type says otherwise) and ``action_log_prob`` ``[*B]``.

    Args:
        width: of ``hidden`` and ``concept``.

    Examples:
        >>> policy = cartpole_policy(width=8)
        >>> policy.in_keys, policy.out_keys
        (['observation'], ['hidden', 'concept', 'logits', 'action', 'action_log_prob'])
    """
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Sequential(linear(4, width, 2**0.5), nn.Tanh()), ["observation"], ["hidden"]),
        TensorDictModule(nn.Sequential(linear(width, width, 2**0.5), nn.Tanh()), ["hidden"], ["concept"]),
        TensorDictModule(linear(width, 2, 0.01), ["concept"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"],
            ["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type=InteractionType.DETERMINISTIC,
            return_log_prob=True,
        ),
    )


def ppo_cartpole(
    seed: int = 0, *, frames: int = 102_400, progress: Callable[[str, float, str], None] | None = None
) -> TrainedAgent:
    """Train :func:`cartpole_policy` by PPO on CartPole-v1; 3 to 13 s on one core to a mean return above 475.

    16 environments x 64 steps a batch, 6 epochs of minibatches of 256, Adam at 2.5e-3 decaying linearly to 0 over
    ``frames``, GAE(0.99, 0.95), clip 0.2, entropy bonus 0.005. Sixteen greedy episodes judge it every second batch:
    training stops at a mean >= 475 with no episode below 400, and the best checkpoint is what is returned.

    The same seed gives the same agent (on one machine and number of threads); the global random state is left alone.

    Args:
        seed: of the initial weights, the environments and the sampling.
        frames: the budget in environment steps; 102 400 by default, the early stop needs 15 000 to 60 000.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7, 9 and 11.

    Examples:
        >>> from tdconcepts import rl
        >>> agent = rl.ppo_cartpole(seed=0, frames=1024)  # one batch: a second, and far from trained
        >>> agent.frames, agent.policy.out_keys[:3]
        (1024, ['hidden', 'concept', 'logits'])
    """
    batches = batches_in(frames, ENVS * CARTPOLE.steps)
    import_extra("torchrl.objectives", "rl")
    env, judges = cartpole_env(ENVS, seed), cartpole_env(len(EVAL_SEEDS))
    keeper = Keeper(judge_of(judges), balances, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy, critic = cartpole_policy(), critic_of(4)
        try:
            ppo(env, policy, critic, batches, keeper, CARTPOLE)
        finally:
            env.close()
            judges.close()
    return keeper.agent(seed)


def batches_in(frames: int, batch: int) -> int:
    """How many batches a budget has; one at least."""
    if type(frames) is not int or frames < batch:
        raise BadValue("the training budget is below one batch", got=f"{frames!r} frames", needed=f"at least {batch}")
    return frames // batch


def judge_of(judges: Any, max_steps: int = 1000) -> Callable[[Any], TensorDictBase]:
    """The judges' episodes of a policy."""
    return lambda policy: episode_returns(judges, policy, EVAL_SEEDS, max_steps=max_steps)


def balances(episodes: TensorDictBase) -> bool:
    """Whether the pole stays up: a mean return of 475, and 400 in every episode."""
    returns = episodes.get("return")
    return bool(returns.mean() >= 475 and returns.min() >= 400)


def critic_of(inputs: int) -> TensorDictModule:
    """An untrained critic of two layers."""
    net = nn.Sequential(linear(inputs, 64, 2**0.5), nn.Tanh(), linear(64, 64, 2**0.5), nn.Tanh(), linear(64, 1, 1.0))
    return TensorDictModule(net, ["observation"], ["state_value"])


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
