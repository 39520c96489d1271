"""Rollouts: the first episode of each environment, as one padded batch with its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from tdconcepts.errors import BadValue
from tdconcepts.keys import join
from tdconcepts.rl.episodes import Policy, check_run, done_key, interaction, seeded_reset

__all__ = ["EXPLANATION", "MASK", "rollout_episodes"]

EXPLANATION = "explanation"
MASK = ("collector", "mask")  # where torchrl's collectors put it when they split trajectories


def rollout_episodes(
    env: Any, policy: Policy, *, seeds: Sequence[int] | None = None, max_steps: int = 1000, greedy: bool = True
) -> TensorDictBase:
    """One episode of each environment, as ``[*B, T]`` with a mask; T is the length of the longest.

    A batched environment goes on with new episodes in slots that are done; ``("collector", "mask")`` ``[*B, T]`` is
    True where a slot's *first* episode runs.

    Args:
        env: a torchrl environment.
        policy: any TensorDictModule, or callable on TensorDicts, that writes the action.
        seeds: one for each slot of a vectorised gymnasium environment (else the first one counts); ``None`` goes on
            from the environment's own state.
        max_steps: where episodes are cut; 1000 by default.
        greedy: act deterministically (the default), or sample.

    Raises:
        BadValue: another number of seeds than of slots, ``max_steps < 1``. BadType: what is no environment, no policy,
            or no list of seeds.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.rl import cartpole_env
        >>> lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
        >>> rollout = rollout_episodes(cartpole_env(2), lean, seeds=[0, 1])
        >>> rollout.batch_size == rollout["collector", "mask"].shape
        True
    """
    given = check_run(env, policy, () if seeds is None else seeds)
    width = max(1, env.batch_size.numel())
    if type(max_steps) is not int or max_steps < 1 or (seeds is not None and len(given) != width):
        got = f"max_steps={max_steps}" + ("" if seeds is None else f", {len(given)} seeds")
        raise BadValue("these episodes can't be run", got=got, needed=f"at least one step, {width} seeds or None")
    with torch.no_grad(), interaction(greedy):
        start = env.reset() if seeds is None else seeded_reset(env, given)
        rollout = env.rollout(max_steps, policy, auto_reset=False, tensordict=start, break_when_any_done=False)
    done = rollout.get(join("next", done_key(env))).reshape(rollout.batch_size)
    mask = done.cumsum(-1) - done.long() == 0
    rollout = rollout[..., : int(mask.reshape(-1, mask.shape[-1]).any(0).sum())]
    return rollout.set(MASK, mask[..., : rollout.shape[-1]])
