"""Rollouts: the first episode of each environment, and every logged step explained in one batched call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks.stages import check_module
from tdconcepts.keys import NestedKey, as_key, join, key_text
from tdconcepts.rl.episodes import Policy, done_key, interaction, seeded_reset

__all__ = ["EXPLANATION", "MASK", "explain_rollout", "rollout_episodes"]

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
        BadValue: another number of seeds than of slots, ``max_steps < 1``.
    """
    width = max(1, env.batch_size.numel())
    if max_steps < 1 or (seeds is not None and len(seeds) != width):
        got = f"max_steps={max_steps}" + ("" if seeds is None else f", {len(seeds)} seeds")
        raise BadValue("these episodes can't be run", got=got, needed=f"at least one step, {width} seeds or None")
    with torch.no_grad(), interaction(greedy):
        start = env.reset() if seeds is None else seeded_reset(env, [int(seed) for seed in seeds])
        rollout = env.rollout(max_steps, policy, auto_reset=False, tensordict=start, break_when_any_done=False)
    done = rollout.get(join("next", done_key(env))).reshape(rollout.batch_size)
    mask = done.cumsum(-1) - done.long() == 0
    rollout = rollout[..., : int(mask.reshape(-1, mask.shape[-1]).any(0).sum())]
    return rollout.set(MASK, mask[..., : rollout.shape[-1]])


def explain_rollout(
    explainer: TensorDictModuleBase,
    rollout: TensorDictBase,
    *,
    mask: NestedKey | None = None,
    chunk_size: int | None = None,
    exploration_type: InteractionType = InteractionType.DETERMINISTIC,
    fill: float = 0.0,
) -> TensorDictBase:
    """Run an explainer on every step of a rollout at once, for the actions that were logged.

    The steps become the rows of one batch (each step is explained on its own, as for any feed-forward policy), the
    explainer runs once, and its results go back to their steps. The logged action is explained where the explainer's
    target asks for it: ``Target("logits", by="action")`` reads the rollout's ``action``, it is not chosen again.

    ==================================== ================================================================
    reads                                writes
    ==================================== ================================================================
    ``explainer.in_keys`` ``[*B, T, .]`` ``explainer.out_keys`` ``[*B, T, .]``
    ``mask`` ``[*B, T]``                 ``("explanation", "exploration_type")``: text, "deterministic"
    ==================================== ================================================================

    Args:
        explainer: any TensorDictModule; a method of ``tdconcepts.attribution`` typically.
        rollout: any number of batch dims, the last of them time. It is left as it is; locked, memory-mapped and lazily
            stacked ones are fine.
        mask: the entry that is True where a step counts, ``[*B, T]`` or ``[*B, T, 1]`` (``("collector", "mask")`` of
            torchrl's padded trajectories). Steps that don't count are not computed; their results are ``fill``.
        chunk_size: steps explained at a time, to bound the memory; default all (the explainer may have its own bound).
        exploration_type: under which the policy runs, deterministic by default, whatever the surrounding context says:
            an explanation of a fresh random sample would explain nothing that happened. It is recorded in the result.
        fill: what masked-out steps hold; 0.0 by default, so that sums over time are right (for means divide by the
            mask's sum). ``float("nan")`` leaves gaps in plots.

    Returns:
        A shallow copy of ``rollout`` (it shares every tensor) with the explainer's results.

    Raises:
        BadType: the explainer is no TensorDictModule.
        BadKey: the rollout lacks an entry that the explainer or the mask needs.
        BadValue: a rollout without batch dims, a mask of another shape, ``chunk_size < 1``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> double = TensorDictModule(lambda x: 2 * x, ["observation"], [("attribution", "observation")])
        >>> rollout = TensorDict({"observation": torch.ones(2, 3, 4), "ok": torch.ones(2, 3, dtype=torch.bool)}, [2, 3])
        >>> rollout["ok"][1, 2] = False
        >>> explain_rollout(double, rollout, mask="ok")["attribution", "observation"][..., 0]
        tensor([[2., 2., 2.],
                [2., 2., 0.]])
    """
    check_module(explainer, "the explainer")
    if rollout.ndim < 1:
        raise BadValue(
            "a rollout has batch dims, the last of them time",
            got="batch_size []",
            fix="rollout.unsqueeze(0), or explainer(td)",
        )
    if chunk_size is not None and chunk_size < 1:
        raise BadValue("chunk_size is out of range", got=chunk_size, needed="at least 1, or None")
    steps = _steps(explainer, rollout)
    counts = None if mask is None else _mask(rollout, as_key(mask))
    width = max(1, len(steps)) if chunk_size is None else chunk_size
    explained: list[TensorDictBase] = []
    with set_interaction_type(exploration_type):
        for start in range(0, max(1, len(steps)), width):
            rows = steps[start : start + width]
            rows = rows if counts is None else rows[counts[start : start + width]]
            if len(rows) or (not explained and start + width >= len(steps)):
                explained.append(explainer(rows))
    result = rollout.copy()
    for key in explainer.out_keys:
        value = torch.cat([chunk[key] for chunk in explained])
        if counts is not None:
            full = value.new_full((len(steps), *value.shape[1:]), fill)
            full[counts] = value
            value = full
        result.set(key, value.reshape(*rollout.batch_size, *value.shape[1:]))
    kind = NonTensorData(exploration_type.name.lower(), batch_size=rollout.batch_size)
    return result.set((EXPLANATION, "exploration_type"), kind)


def _steps(explainer: TensorDictModuleBase, rollout: TensorDictBase) -> TensorDictBase:
    """The steps as rows, without what came after them; shares the rollout's tensors where it can."""
    td = rollout.exclude("next") if not any(join(key)[0] == "next" for key in explainer.in_keys) else rollout
    known = set(td.keys(True))
    for key in explainer.in_keys:
        if key not in known:
            raise BadKey(
                f"the rollout has no entry {key_text(key)}, which the explainer reads",
                got=f"in_keys {list(explainer.in_keys)}",
                needed=nearest(key, rollout.keys(True, True)),
            )
    try:
        return td.contiguous().reshape(rollout.batch_size.numel())
    except RuntimeError as error:
        raise BadValue(
            "the trajectories do not stack into one batch",
            got=f"batch_size {list(rollout.batch_size)}",
            needed="trajectories of one length, or padded ones with a mask",
            fix='pad_sequence(list of trajectories, return_mask=True) and mask=("masks", ...)',
        ) from error


def _mask(rollout: TensorDictBase, key: NestedKey) -> Tensor:
    mask = rollout.get(key)
    if mask is None:
        raise BadKey(f"the rollout has no mask {key_text(key)}", needed=nearest(key, rollout.keys(True, True)))
    if mask.shape not in (rollout.batch_size, (*rollout.batch_size, 1)):
        raise BadValue(
            f"the mask {key_text(key)} does not fit the rollout",
            got=f"shape {list(mask.shape)}",
            needed=f"{list(rollout.batch_size)}: one truth value for each step",
        )
    return mask.reshape(-1).bool()
