"""The agent part of the demo: explain a trained policy's actions, then test in closed loop which directions it uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from tdconcepts.attribution import Gradient, InputXGradient, IntegratedGradients, SmoothGrad, VarGrad
from tdconcepts.demo.agent_story import LOGITS, METHODS, PROBE, RANDOM, Direction, Measured, tell_story
from tdconcepts.hooks import Target
from tdconcepts.interventions import RemoveDirection, random_directions
from tdconcepts.report import Section
from tdconcepts.representations import RidgeProbe, ridge_direction
from tdconcepts.rl import cartpole_env, compare_returns, explain_rollout, ppo_cartpole, rollout_episodes
from tdconcepts.rl.rollouts import MASK

__all__ = ["FULL", "QUICK", "Budget", "agent_section", "measure"]

Progress: TypeAlias = Callable[[str, float, str], None]

ANGLE = 2  # the place of the pole angle in the observation
HORIZONS = (0, 1, 5, 10, 20)


@dataclass(frozen=True)
class Budget:
    """How much is measured: training ``frames``, ``steps`` of the path and ``draws`` of the noise of the explainers,
    ``episodes`` for the probes, random directions as ``controls``, and paired ``seeds``.
    """

    frames: int
    steps: int
    draws: int
    episodes: int
    controls: int
    seeds: int


FULL = Budget(frames=102_400, steps=50, draws=20, episodes=32, controls=5, seeds=64)
QUICK = Budget(frames=61_440, steps=20, draws=10, episodes=16, controls=3, seeds=16)


def agent_section(seed: int = 0, quick: bool = False, progress: Progress | None = None) -> Section:
    """Train, explain and intervene on a CartPole agent; every sentence is computed from what was measured.

    Args:
        seed: of the agent, the episodes and the random directions.
        quick: measure with the smaller budget.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl, gymnasium or matplotlib is not installed.
    """
    return tell_story(measure(seed, QUICK if quick else FULL, progress))


def measure(seed: int = 0, budget: Budget = FULL, progress: Progress | None = None) -> Measured:
    """The numbers of :func:`agent_section`, without text and figures."""
    tell = progress or (lambda stage, done, note: None)
    began = time.perf_counter()
    agent = ppo_cartpole(seed, frames=budget.frames, progress=tell)
    trained = time.perf_counter() - began
    explained, took = _explain(agent.policy, seed, budget, tell)
    probes, left, directions = _directions(agent.policy, seed, budget, tell)
    env = cartpole_env(budget.seeds)
    try:
        variants = {name: {"concept": direction.edit} for name, direction in directions.items()}
        returns = compare_returns(env, agent.policy, variants, range(budget.seeds), flip_rate=True, progress=tell)
    finally:
        env.close()
    return Measured(agent, (trained, took), explained, probes, left, directions, returns)


def _explain(policy: TensorDictModuleBase, seed: int, budget: Budget, tell: Progress) -> tuple[TensorDictBase, float]:
    """Eight greedy episodes with an attribution of every logged action's logit by each method, and the seconds."""
    stage = "explaining 8 episodes"
    tell(stage, 0.0, "rolling out")
    rollout = _episodes(policy, 8, 10_000 + 100 * seed)
    target, wrt = Target("logits", by="action"), "observation"
    keys = {name: ("attribution", name) for name in METHODS}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(seed)  # the same draws for the mean and for the variance

    methods = TensorDictSequential(
        Gradient(policy, target, wrt, out_key=keys["gradient"]),
        InputXGradient(policy, target, wrt, out_key=keys["input_x_gradient"]),
        IntegratedGradients(policy, target, wrt, n_steps=budget.steps, out_key=keys["integrated_gradients"]),
        SmoothGrad(Gradient(policy, target, wrt, out_key=keys["smoothgrad"]), n_iter=budget.draws, noise=noise()),
        VarGrad(Gradient(policy, target, wrt, out_key=keys["vargrad"]), n_iter=budget.draws, noise=noise()),
    )
    tell(stage, 0.3, f"{int(rollout[MASK].sum()):,} actions")
    began = time.perf_counter()
    explained = explain_rollout(methods, rollout, mask=MASK)
    took = time.perf_counter() - began
    tell(stage, 1.0, f"{int(rollout[MASK].sum()):,} actions")
    return explained, took


def _directions(
    policy: TensorDictModuleBase, seed: int, budget: Budget, tell: Progress
) -> tuple[dict[int, RidgeProbe], float, dict[str, Direction]]:
    """Probes of the pole angle by horizon, what a probe reads after the removal, and the directions to remove."""
    stage = "probing the concept stage"
    tell(stage, 0.0, f"{budget.episodes} other episodes")
    rollout = _episodes(policy, budget.episodes, 20_000 + 100 * seed)
    mask, z, angle = rollout[MASK], rollout["concept"], rollout["observation"][..., ANGLE]
    probes = {}
    for number, horizon in enumerate(HORIZONS):
        steps = z.shape[1] - horizon
        both = mask[:, :steps] & mask[:, horizon:]
        probes[horizon] = ridge_direction(z[:, :steps], angle[:, horizon:], mask=both)
        tell(stage, (number + 1) / (len(HORIZONS) + 1), f"{horizon} steps ahead")
    rows = z[mask]
    logits = Gradient(policy, Target("logits", _difference), wrt="concept")(rollout[mask].select("observation"))
    wanted = {PROBE: probes[0].direction, LOGITS: logits["attribution", "concept"].mean(0)}
    chance = random_directions(budget.controls, z.shape[-1], torch.Generator().manual_seed(seed))
    wanted |= {f"{RANDOM} {number}": direction for number, direction in enumerate(chance, 1)}
    edits = {name: RemoveDirection(direction, rows.mean(0)) for name, direction in wanted.items()}
    covariance = torch.cov(rows.T.double())
    directions = {}
    for name, edit in edits.items():
        cosine = float((edit.direction @ edits[LOGITS].direction).abs())
        along = edit.direction.double()
        directions[name] = Direction(edit, cosine, float(along @ covariance @ along / covariance.trace()))
    left = ridge_direction(edits[PROBE](z), angle, mask=mask).r2
    tell(stage, 1.0, f"R² {probes[0].r2:.3f}")
    return probes, left, directions


def _episodes(policy: TensorDictModuleBase, count: int, first_seed: int) -> TensorDictBase:
    env = cartpole_env(count)
    try:
        return rollout_episodes(env, policy, seeds=range(first_seed, first_seed + count))
    finally:
        env.close()


def _difference(logits: Tensor, td: TensorDictBase) -> Tensor:
    """How much rather the policy pushes right than left."""
    return logits[..., 1] - logits[..., 0]
