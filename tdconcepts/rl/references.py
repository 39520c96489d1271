"""More reference agents that train in seconds: DQN on CartPole, PPO on Pendulum, a policy that speaks in concepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn

from tdconcepts.concepts import ConceptActivation, ConceptSpec, TeacherForcing
from tdconcepts.errors import import_extra
from tdconcepts.rl.agents import CARTPOLE, ENVS, EVAL_SEEDS, balances, batches_in, cartpole_env, critic_of, judge_of
from tdconcepts.rl.agents import linear as layer
from tdconcepts.rl.objectives import ConceptObjective
from tdconcepts.rl.training import DQN, PPO, Keeper, TrainedAgent, dqn, gym_envs, ppo

__all__ = ["CARTPOLE_CONCEPTS", "cartpole_concepts", "concept_cartpole", "dqn_cartpole", "ppo_pendulum"]

PENDULUM = PPO(epochs=8, learning_rate=1e-3, gamma=0.9, entropy=0.0, reward=(8.0, 0.125), judged=5)
Progress = Callable[[str, float, str], None]

CARTPOLE_CONCEPTS = ConceptSpec(["leans right", "falls right", "is right", "moves right"], [1, 1, 1, 1])


def dqn_cartpole(seed: int = 0, *, frames: int = 16_384, progress: Progress | None = None) -> TrainedAgent:
    """Train a Q-network by double DQN on CartPole-v1: ``observation -> hidden -> concept -> action_value -> action``.

    16 environments, 8 updates of 256 rows every 64 frames, Adam at 2.5e-3 decaying to 0, a target network that follows
    by 2 % an update, epsilon from 1 to 0.02 in half of the frames, discount 0.995. Training stops as in
    :func:`~tdconcepts.rl.ppo_cartpole`, or with the budget, which gives a mean return of 250 to 330 (seeds 0 to 2).
    The best checkpoint is what is returned. The same seed gives the same agent.

    ``action_value`` ``[*B, 2]`` holds the Q-values, ``chosen_action_value`` ``[*B, 1]`` that of the action.

    Args:
        seed: of the weights, the environments, the exploration and the replay.
        frames: the budget in environment steps; 16 384 by default.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed. BadValue: a budget below one round.

    Source: Mnih et al. 2015; van Hasselt et al. 2016.

    Examples:
        >>> from tdconcepts import rl
        >>> agent = rl.dqn_cartpole(seed=0, frames=640)  # far from trained
        >>> agent.policy.out_keys
        ['hidden', 'concept', 'action', 'action_value', 'chosen_action_value']
    """
    settings = DQN()
    rounds = batches_in(frames, ENVS * settings.steps)
    modules = import_extra("torchrl.modules", "rl")
    env, judges = cartpole_env(ENVS, seed), cartpole_env(len(EVAL_SEEDS))
    keeper = Keeper(judge_of(judges), balances, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = TensorDictSequential(
            TensorDictModule(nn.Sequential(layer(4, 64, 2**0.5), nn.ReLU()), ["observation"], ["hidden"]),
            TensorDictModule(nn.Sequential(layer(64, 64, 2**0.5), nn.ReLU()), ["hidden"], ["concept"]),
            TensorDictModule(layer(64, 2, 0.1), ["concept"], ["action_value"]),
            modules.QValueModule(action_space="categorical", spec=env.action_spec_unbatched),
        )
        try:
            dqn(env, policy, rounds, keeper, settings)
        finally:
            env.close()
            judges.close()
    return keeper.agent(seed)


def ppo_pendulum(seed: int = 0, *, frames: int = 61_440, progress: Progress | None = None) -> TrainedAgent:
    """Train a continuous policy by PPO on Pendulum-v1: ``observation -> hidden -> concept -> loc, scale -> action``.

    ``observation`` ``[*B, 3]`` (cosine and sine of the angle, angular velocity rad/s), ``action`` ``[*B, 1]`` (torque,
    Nm, within [-2, 2]) from a squashed normal distribution. 32 environments x 64 steps a batch, 8 epochs, discount 0.9.
    Training stops at a mean return of -300 over sixteen greedy episodes of 200 steps (a random policy has -1200), or
    with the budget; the best checkpoint is what is returned. The same seed gives the same agent.

    Args:
        seed: of the weights, the environments and the sampling.
        frames: the budget in environment steps; 61 440 by default.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed. BadValue: a budget below one batch.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms".

    Examples:
        >>> from tdconcepts import rl
        >>> agent = rl.ppo_pendulum(seed=0, frames=2048)  # far from trained
        >>> agent.policy.out_keys[-4:]
        ['loc', 'scale', 'action', 'action_log_prob']
    """
    batches = batches_in(frames, 32 * PENDULUM.steps)
    modules = import_extra("torchrl.modules", "rl")
    env, judges = gym_envs("Pendulum-v1", 32, seed), gym_envs("Pendulum-v1", len(EVAL_SEEDS))
    keeper = Keeper(judge_of(judges, 200), lambda episodes: bool(episodes.get("return").mean() >= -300), progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(layer(64, 2, 0.01), NormalParamExtractor(scale_lb=1e-2))
        policy = ProbabilisticTensorDictSequential(
            TensorDictModule(nn.Sequential(layer(3, 64, 2**0.5), nn.Tanh()), ["observation"], ["hidden"]),
            TensorDictModule(nn.Sequential(layer(64, 64, 2**0.5), nn.Tanh()), ["hidden"], ["concept"]),
            TensorDictModule(head, ["concept"], ["loc", "scale"]),
            ProbabilisticTensorDictModule(
                ["loc", "scale"],
                ["action"],
                distribution_class=modules.TanhNormal,
                distribution_kwargs={"low": -2.0, "high": 2.0},
                default_interaction_type=InteractionType.DETERMINISTIC,
                return_log_prob=True,
            ),
        )
        try:
            ppo(env, policy, critic_of(3), batches, keeper, PENDULUM)
        finally:
            env.close()
            judges.close()
    return keeper.agent(seed)


def concept_cartpole(
    seed: int = 0,
    *,
    frames: int = 102_400,
    weight: float = 1.0,
    randint: float = 0.0,
    progress: Progress | None = None,
) -> TrainedAgent:
    """Train a CartPole policy whose action is a function of four concepts: PPO, and the concepts' labels beside it.

    ``observation -> hidden -> concepts_logits -> concepts -> policy -> logits -> action``, where ``concepts``
    ``[*B, 4]`` holds the probabilities of :data:`CARTPOLE_CONCEPTS`. Their labels come from the observation
    (:func:`cartpole_concepts`); the loss is PPO's and ``weight`` times the cross-entropy
    (:class:`~tdconcepts.rl.ConceptObjective`). Else as :func:`~tdconcepts.rl.ppo_cartpole`.

    Args:
        seed: of the weights, the environments and the sampling.
        frames: the budget in environment steps; 102 400 by default.
        weight: of the concepts' loss, 1 by default.
        randint: with this probability a concept is replaced by its label while the policy acts and learns (RandInt), so
            that it learns to be corrected: a :class:`~tdconcepts.concepts.TeacherForcing` stage reads ``"labels"``,
            which a first stage writes; in evaluation nothing is replaced. 0 by default: no such stages.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        MissingExtra: torchrl or gymnasium is not installed. BadValue: a budget below one batch.

    Source: concept-bottleneck policies: Zabounidis et al. 2023; Delfosse et al. 2024 (SCoBots).

    Examples:
        >>> from tdconcepts import rl
        >>> agent = rl.concept_cartpole(seed=0, frames=1024)  # far from trained
        >>> agent.policy(rl.cartpole_env(2).reset())["concepts"].shape
        torch.Size([2, 4])
    """
    batches = batches_in(frames, ENVS * CARTPOLE.steps)
    import_extra("torchrl.objectives", "rl")
    env, judges = cartpole_env(ENVS, seed), cartpole_env(len(EVAL_SEEDS))
    keeper = Keeper(judge_of(judges), balances, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teaching = TeacherForcing(CARTPOLE_CONCEPTS, "labels", randint, key="concepts") if randint else None
        policy = ProbabilisticTensorDictSequential(
            *([TensorDictModule(_labels, ["observation"], ["labels"])] if teaching else []),
            TensorDictModule(nn.Sequential(layer(4, 64, 2**0.5), nn.Tanh()), ["observation"], ["hidden"]),
            TensorDictModule(layer(64, 4, 1.0), ["hidden"], ["concepts_logits"]),
            ConceptActivation(CARTPOLE_CONCEPTS, "concepts_logits", "concepts"),
            *([teaching] if teaching else []),
            TensorDictModule(nn.Sequential(layer(4, 64, 2**0.5), nn.Tanh()), ["concepts"], ["policy"]),
            TensorDictModule(layer(64, 2, 0.01), ["policy"], ["logits"]),
            ProbabilisticTensorDictModule(
                ["logits"],
                ["action"],
                distribution_class=torch.distributions.Categorical,
                default_interaction_type=InteractionType.DETERMINISTIC,
                return_log_prob=True,
            ),
        )

        def objective(loss: Any) -> ConceptObjective:
            return ConceptObjective(loss, policy, CARTPOLE_CONCEPTS, cartpole_concepts, weight=weight)

        try:
            ppo(env, policy, critic_of(4), batches, keeper, CARTPOLE, objective)
        finally:
            env.close()
            judges.close()
    return keeper.agent(seed)


def cartpole_concepts(td: TensorDictBase) -> Tensor:
    """The labels of :data:`CARTPOLE_CONCEPTS`, ``[*B, 4]``: angle, angular velocity, place and velocity above zero.

    Args:
        td: with ``"observation"`` ``[*B, 4]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> cartpole_concepts(TensorDict(observation=torch.tensor([0.5, -1.0, 0.1, -0.2]), batch_size=[]))
        tensor([1., 0., 1., 0.])
    """
    return _labels(td.get("observation"))


def _labels(observation: Tensor) -> Tensor:
    return (observation[..., [2, 3, 0, 1]] > 0).to(observation.dtype)
