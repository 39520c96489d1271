"""Running one episode for each seed, in vectorised environments: the same seed, the same start state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from torch import Tensor, nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.keys import NestedKey, join

__all__ = [
    "Policy",
    "Visited",
    "check_env",
    "check_run",
    "done_key",
    "episode_returns",
    "run_episodes",
    "seeded_reset",
]

Policy: TypeAlias = Callable[[TensorDictBase], TensorDictBase]


@dataclass
class Visited:
    """What :func:`run_episodes` saw on the way, one item for each batch of seeds that ran together.

    ``starts``: the reset states ``[n]``; ``states``: what the policy was given ``[T, n]``; ``actions`` ``[T, n, ...]``;
    ``alive``: whether the first episode was still running ``[T, n]``.
    """

    starts: list[TensorDictBase] = field(default_factory=list)
    states: list[TensorDictBase] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)


def episode_returns(
    env: Any, policy: Policy, seeds: Sequence[int], *, max_steps: int = 1000, greedy: bool = True
) -> TensorDictBase:
    """The first episode of each seed: undiscounted return, length, and whether it came to its end.

    ================================ ======================================================
    reads                            gives
    ================================ ======================================================
    what the policy reads            ``"return"`` ``[S]`` float64, ``"length"`` ``[S]`` int64,
                                     ``"finished"`` ``[S]`` bool
    ================================ ======================================================

    Args:
        env: a torchrl environment. One with a batch of n runs n seeds at a time; a vectorised gymnasium environment
            (:func:`~tdconcepts.rl.cartpole_env`) starts each slot from its own seed, so that the number of slots makes
            no difference; other batched environments are seeded with the first seed of each batch.
        policy: any TensorDictModule, or callable on TensorDicts, that writes the action.
        seeds: one episode for each.
        max_steps: an episode is cut after so many steps; 1000 by default.
        greedy: act deterministically (the default), or sample with the torch seed of the first seed of each batch.

    Raises:
        BadValue: a reward or a done flag that is not one number for each environment, ``max_steps < 1``, no seeds.
        BadType: what is no environment, no policy, or no list of seeds.

    Examples:
        >>> from tdconcepts import rl
        >>> found = rl.episode_returns(rl.cartpole_env(4), rl.cartpole_policy(8), range(8))
        >>> found.batch_size, bool((found["return"] == found["length"]).all())  # a reward of 1 for each step
        (torch.Size([8]), True)
    """
    return run_episodes(env, policy, seeds, max_steps=max_steps, greedy=greedy)[0]


def run_episodes(
    env: Any,
    policy: Policy,
    seeds: Sequence[int],
    *,
    max_steps: int = 1000,
    greedy: bool = True,
    without: Sequence[NestedKey] | None = None,
) -> tuple[TensorDictBase, Visited]:
    """As :func:`episode_returns`, with the start states, and all entries of each step but those in ``without``.

    Default: no steps are kept.
    """
    seeds = check_run(env, policy, seeds)
    if type(max_steps) is not int or max_steps < 1 or not seeds:
        raise BadValue(
            "no episode to run", got=f"{len(seeds)} seeds, max_steps={max_steps}", needed="at least one each"
        )
    width, seen, parts = max(1, env.batch_size.numel()), Visited(), []
    for start in range(0, len(seeds), width):
        part = seeds[start : start + width]
        padded = part + part[-1:] * (width - len(part))
        with torch.no_grad(), interaction(greedy), torch.random.fork_rng(devices=[]):
            torch.manual_seed(padded[0])
            parts.append(_together(env, policy, padded, max_steps, without, seen)[: len(part)])
    return torch.cat(parts), seen


def check_run(env: object, policy: Any, seeds: Any = ()) -> list[int]:
    """The seeds as a list, where all of these can be run.

    Raises:
        BadType: no environment, no policy, or no seeds.
    """
    check_env(env)
    bare = isinstance(policy, nn.Module) and type(policy).__module__.startswith("torch.nn.")
    if not callable(policy) or (bare and not any(isinstance(m, TensorDictModuleBase) for m in policy.modules())):
        raise BadType(
            "not a policy",
            got=type(policy).__name__,
            needed="a TensorDictModule, or a callable on TensorDicts, that writes the action",
            fix='TensorDictModule(net, in_keys=["observation"], out_keys=["action"])' if bare else None,
        )
    given = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    listed = isinstance(given, Iterable) and all(isinstance(seed, Integral) for seed in given)
    if not listed or any(seed < 0 for seed in given):
        fix = f"range({seeds})" if isinstance(seeds, int) else None
        raise BadType("not seeds", got=repr(seeds), needed="ints, 0 or more", fix=fix)
    return [int(seed) for seed in given]


def check_env(env: object) -> None:
    """Raise for what is no environment."""
    if not hasattr(env, "step_and_maybe_reset"):
        raise BadType("not an environment", got=type(env).__name__, needed="one of torchrl", fix="rl.cartpole_env(16)")


def interaction(greedy: bool) -> set_interaction_type:
    """The context under which a policy acts greedily, or samples."""
    return set_interaction_type(InteractionType.DETERMINISTIC if greedy else InteractionType.RANDOM)


def _together(
    env: Any, policy: Policy, seeds: list[int], max_steps: int, without: Sequence[NestedKey] | None, seen: Visited
) -> TensorDictBase:
    done_at, count = join("next", done_key(env)), len(seeds)
    td = seeded_reset(env, seeds)
    seen.starts.append(td.clone())
    total, length = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    alive = torch.ones(count, dtype=torch.bool)
    states, actions, alives = [], [], []
    seen_keys: list[NestedKey] = []
    for _ in range(max_steps):
        if without is not None:
            seen_keys = seen_keys or list(td.exclude("next", *without).keys(True, True))
            states.append(td.select(*seen_keys).clone())
        td = policy(td)
        if without is not None:
            actions.append(td.get(env.action_key).clone())
            alives.append(alive)
        td, following = env.step_and_maybe_reset(td)  # slots that are done go on with other episodes, which don't count
        reward, done = td.get(join("next", env.reward_key)).cpu(), td.get(done_at).cpu()
        if reward.numel() != count or done.numel() != count:
            raise BadValue(
                "the return needs one reward and one done flag for each environment",
                got=f"reward {list(reward.shape)}, done {list(done.shape)} for {count} environments",
                fix="reduce them by a transform of the environment",
            )
        total += torch.where(alive, reward.reshape(-1).double(), 0.0)
        length += alive
        alive = alive & ~done.reshape(-1)
        if not alive.any():
            break
        td = following
    if without is not None:
        seen.states.append(torch.stack(states))
        seen.actions.append(torch.stack(actions))
        seen.alive.append(torch.stack(alives))
    return TensorDict({"return": total, "length": length, "finished": ~alive}, batch_size=[count])


def seeded_reset(env: Any, seeds: list[int]) -> TensorDictBase:
    """Reset ``env`` to the start states that ``seeds`` name: one for each slot where it can be said, else the first."""
    if env.batch_size and getattr(wrapped_env(env), "num_envs", None) == len(seeds):
        return env.reset(seed=seeds)  # a gymnasium VectorEnv takes one seed for each slot
    env.set_seed(seeds[0])
    return env.reset()


def wrapped_env(env: Any) -> Any:
    """What a torchrl environment wraps under its transforms, or None.

    Only attributes of the environment's own are looked at: torchrl's batched environments answer for their members,
    with a list or a promise of one, and with an error while they are not started.
    """
    own = getattr(env, "__dict__", {})
    while (inner := own.get("_modules", {}).get("base_env")) is not None:
        own = inner.__dict__
    return own.get("_env")


def done_key(env: Any) -> NestedKey:
    """The one entry that says that an environment's episode is over.

    Raises:
        BadValue: there are several (agents with done flags of their own).
    """
    keys = [key for key in env.done_keys if join(key)[-1] == "done"]
    if len(keys) != 1:
        raise BadValue("the return needs one done flag for each environment", got=f"done keys {env.done_keys}")
    return keys[0]
