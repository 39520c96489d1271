"""The training loops of the reference agents: PPO and DQN on vectorised environments, from torchrl's losses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from torch import nn

from tdconcepts.errors import BadType, BadValue, import_extra, nearest
from tdconcepts.keys import join

__all__ = ["DQN", "PPO", "Objective", "Score", "TrainedAgent", "dqn", "gym_envs", "ppo"]

Score: TypeAlias = Callable[[TensorDictBase], bool]
"""From the judges' episodes to whether they are good enough to stop."""
Objective: TypeAlias = Callable[[Any], Any]
"""From torchrl's loss to the module that is called on minibatches: each entry ``loss_*`` that it writes is added up."""
Progress: TypeAlias = Callable[[str, float, str], None]

STAGE = "training the agent"


@dataclasses.dataclass(frozen=True)
class TrainedAgent:
    """A trained policy and how it got there.

    Args:
        policy: writes its stages under their own keys.
        critic: writes ``"state_value"``; None for DQN, whose policy writes ``"action_value"``.
        seed: of its training.
        frames: how many it was trained on.
        mean_return: of the checkpoint that was kept, over greedy episodes.
        history: one ``{"frames", "mean", "min"}`` for each evaluation.

    Examples:
        >>> from tdconcepts import rl
        >>> agent = TrainedAgent(rl.cartpole_policy(), None, seed=0, frames=0, mean_return=9.4, history=[])
        >>> agent
        TrainedAgent(policy=..., critic=None, seed=0, frames=0, mean_return=9.4)
    """

    policy: Any
    critic: TensorDictModuleBase | None
    seed: int
    frames: int
    mean_return: float
    history: list[dict[str, float]] = dataclasses.field(repr=False)


MINIBATCH = 256
LAMBDA, CLIP, CRITIC, CLIPPED = 0.95, 0.2, 0.5, 0.5  # of PPO: GAE, the ratio, the critic's share, the gradient's norm
CAPACITY, WARM_UP, LONGEST = 50_000, 1_024, 10.0  # of DQN: rows kept, rows before it learns, the gradient's norm


@dataclasses.dataclass(frozen=True)
class PPO:
    """Settings of :func:`ppo`: the learning rate decays linearly to 0; rewards are ``(reward + shift) * scale``."""

    steps: int = 64
    epochs: int = 6
    learning_rate: float = 2.5e-3
    gamma: float = 0.99
    entropy: float = 0.005
    reward: tuple[float, float] = (0.0, 1.0)
    judged: int = 2


@dataclasses.dataclass(frozen=True)
class DQN:
    """Settings of :func:`dqn`: epsilon falls linearly from ``explore[0]`` to ``explore[1]`` in half of the frames, the
    learning rate to 0 in all of them; the target network follows by ``1 - decay`` of the difference at each update."""

    steps: int = 4
    updates: int = 8
    learning_rate: float = 2.5e-3
    gamma: float = 0.995
    decay: float = 0.98
    explore: tuple[float, float] = (1.0, 0.02)
    judged: int = 16


def gym_envs(name: str, num_envs: int, seed: int | None = None, **kwargs: Any) -> Any:
    """``num_envs`` gymnasium environments in one process as one torchrl environment of batch ``[num_envs]``.

    A synchronous gymnasium vector with its automatic reset disabled, because torchrl resets by itself.

    Args:
        name: gymnasium's, such as ``"Pendulum-v1"``.
        num_envs: how many.
        seed: slot i starts from ``seed + i``; None leaves it to gymnasium.
        kwargs: of torchrl's ``GymWrapper``: ``categorical_action_encoding=True`` gives actions as integers.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed. BadValue: ``num_envs < 1``, a name that gymnasium lacks.

    Examples:
        >>> from tdconcepts import rl
        >>> rl.gym_envs("Pendulum-v1", 2, seed=0).batch_size
        torch.Size([2])
    """
    if type(num_envs) is not int or num_envs < 1 or not isinstance(name, str):
        raise BadValue("no environments", got=f"{name!r}, {num_envs!r}", needed="a name, and num_envs >= 1")
    if seed is not None:
        check_seed(seed)
    gymnasium, vector = import_extra("gymnasium", "rl"), import_extra("gymnasium.vector", "rl")
    envs = import_extra("torchrl.envs", "rl")
    options = {"autoreset_mode": vector.AutoresetMode.DISABLED}
    try:
        made = gymnasium.make_vec(name, num_envs=num_envs, vectorization_mode="sync", vector_kwargs=options)
    except gymnasium.error.UnregisteredEnv as error:
        known = sorted(spec for spec in gymnasium.registry if "/" not in spec)
        raise BadValue(f"gymnasium has no environment {name!r}", got=name, needed=nearest(name, known)) from error
    env = envs.GymWrapper(made, **kwargs)
    if seed is not None:
        env.set_seed(seed)
    return env


def check_seed(seed: object) -> int:
    """``seed`` if it is one."""
    if type(seed) is not int or seed < 0:
        raise BadType("not a seed", got=repr(seed), needed="an int, 0 or more")
    return seed


class Keeper:
    """Judges policies on the way, and keeps the best one."""

    def __init__(self, judge: Callable[[Any], TensorDictBase], enough: Score, progress: Progress | None) -> None:
        self.judge, self.enough, self.progress = judge, enough, progress
        self.history: list[dict[str, float]] = []
        self.best: Any = None
        self.score = (-torch.inf, -torch.inf)

    def look(self, frames: int, done: float, *modules: Any) -> bool:
        """Judge the first of ``modules``, keep copies of all if it is the best so far; whether it is enough."""
        learning = modules[0].training
        episodes = self.judge(modules[0].eval())
        modules[0].train(learning)
        returns = episodes.get("return")
        score = float(returns.mean()), float(returns.min())
        self.history.append({"frames": frames, "mean": score[0], "min": score[1]})
        if score > self.score:
            self.best, self.score = tuple(copy.deepcopy(module) for module in modules), score
        if self.progress is not None:
            self.progress(STAGE, done, f"mean return {score[0]:.0f}")
        return self.enough(episodes)

    def agent(self, seed: int) -> TrainedAgent:
        """The best one, ready for use."""
        if self.progress is not None:
            self.progress(STAGE, 1.0, f"mean return {self.score[0]:.0f}")
        policy, critic = (*(module.requires_grad_(True).eval() for module in self.best), None)[:2]
        return TrainedAgent(policy, critic, seed, int(self.history[-1]["frames"]), self.score[0], self.history)


def ppo(
    env: Any, policy: Any, critic: Any, batches: int, keeper: Keeper, settings: PPO, objective: Objective | None = None
) -> None:
    """Proximal policy optimisation: ``batches`` times ``settings.steps`` steps of every environment.

    Each batch is learnt from for ``settings.epochs`` epochs, with advantages computed anew for each.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7, 9 and 11.
    """
    objectives, values = import_extra("torchrl.objectives", "rl"), import_extra("torchrl.objectives.value", "rl")
    loss = objectives.ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=CLIP,
        entropy_bonus=settings.entropy > 0,
        entropy_coeff=settings.entropy,
        critic_coeff=CRITIC,
        normalize_advantage=True,
    )
    advantage = values.GAE(gamma=settings.gamma, lmbda=LAMBDA, value_network=critic)
    optimiser = torch.optim.Adam(loss.parameters(), lr=settings.learning_rate, eps=1e-5)
    called = loss if objective is None else objective(loss)
    frames, (shift, scale) = env.batch_size.numel() * settings.steps, settings.reward
    td = env.reset()
    for number in range(batches):
        data, td = _collect(env, policy, td, settings.steps)
        reward = join("next", env.reward_key)
        data.set(reward, (data.get(reward) + shift) * scale)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1.0 - number / batches)
        for _ in range(settings.epochs):
            with torch.no_grad():
                advantage(data)
            rows = data.reshape(-1)
            for index in torch.randperm(len(rows)).split(MINIBATCH):
                with set_interaction_type(InteractionType.RANDOM):
                    losses = called(rows[index])
                _step(losses, optimiser, loss, CLIPPED)
        if (number + 1) % settings.judged and number + 1 < batches:
            continue
        if keeper.look((number + 1) * frames, (number + 1) / batches, policy, critic):
            return


def dqn(env: Any, policy: Any, rounds: int, keeper: Keeper, settings: DQN, objective: Objective | None = None) -> None:
    """Double deep Q-learning from a replay buffer: ``rounds`` times ``settings.steps`` steps of every environment.

    Source: Mnih et al. 2015, algorithm 1; van Hasselt et al. 2016 for the double estimate.
    """
    objectives, data = import_extra("torchrl.objectives", "rl"), import_extra("torchrl.data", "rl")
    loss = objectives.DQNLoss(policy, action_space=env.action_spec, double_dqn=True, delay_value=True)
    loss.make_value_estimator(gamma=settings.gamma)
    target = objectives.SoftUpdate(loss, eps=settings.decay)
    buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(CAPACITY), batch_size=MINIBATCH)
    optimiser = torch.optim.Adam(loss.parameters(), lr=settings.learning_rate)
    called = loss if objective is None else objective(loss)
    width, (first, last) = env.batch_size.numel(), settings.explore
    frames, td = 0, env.reset()
    for number in range(rounds):
        epsilon = max(last, first - (first - last) * 2 * number / rounds)
        steps = []
        with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
            for _ in range(settings.steps):
                td = policy(td)
                action, chance = td.get(env.action_key), env.action_spec.rand()
                explored = torch.rand(width) < epsilon
                explored = explored.reshape(-1, *[1] * (action.ndim - 1))
                step, td = env.step_and_maybe_reset(td.set(env.action_key, torch.where(explored, chance, action)))
                steps.append(step)
        kept = [*policy.in_keys, env.action_key, "next"]
        buffer.extend(torch.cat(steps).select(*kept))
        frames += width * settings.steps
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1.0 - number / rounds)
        if len(buffer) >= WARM_UP:
            for _ in range(settings.updates):
                _step(called(buffer.sample()), optimiser, loss, LONGEST)
                target.step()
        if (number + 1) % settings.judged and number + 1 < rounds:
            continue
        if keeper.look(frames, (number + 1) / rounds, policy):
            return


def _collect(env: Any, policy: Any, td: Any, count: int) -> tuple[Any, Any]:
    """One batch ``[envs, count]`` of sampled steps from ``td`` on, and the state to go on from."""
    steps = []
    with torch.no_grad(), set_interaction_type(InteractionType.RANDOM):
        for _ in range(count):
            step, td = env.step_and_maybe_reset(policy(td))
            steps.append(step)
    return torch.stack(steps, 1), td


def _step(losses: Any, optimiser: torch.optim.Optimizer, module: nn.Module, gradient_norm: float) -> None:
    names = sorted(losses.keys(), reverse=True)  # in one order, because sums of floats depend on it
    parts = [losses.get(name) for name in names if name == "loss" or name.startswith("loss_")]
    optimiser.zero_grad()
    sum(parts[1:], parts[0]).backward()
    nn.utils.clip_grad_norm_(module.parameters(), gradient_norm)
    optimiser.step()
