"""Explained rollouts: every logged step in one batched call, in memory or from disk; as a function and as a stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import check_module, check_td, dispatch_rows
from tdconcepts.hooks.batching import check_chunk_size
from tdconcepts.keys import NestedKey, as_key, join, key_text
from tdconcepts.rl.rollouts import EXPLANATION, MASK

__all__ = ["RolloutExplainer", "explain_rollout"]

_FEWEST, _MOST = 64, 2**14  # steps at a time, however large or small one is


def explain_rollout(
    explainer: TensorDictModuleBase,
    rollout: TensorDictBase,
    *,
    mask: NestedKey | Literal[False] | None = None,
    unit: Literal["step", "trajectory"] = "step",
    chunk_size: int | None = None,
    exploration_type: InteractionType = InteractionType.DETERMINISTIC,
    fill: float = 0.0,
    into: str | Path | None = None,
) -> TensorDictBase:
    """Run an explainer on every step of a rollout at once, for the actions that were logged.

    The steps become the rows of one batch (each step is explained on its own, as for any feed-forward policy), the
    explainer runs once for each chunk, and its results go back to their steps. The logged action is explained where
    the explainer's target asks for it: :func:`~tdconcepts.rl.chosen_value` and the like read the rollout's ``action``,
    it is not chosen again. Explain after the rollout, not during it: one call for 4000 states takes what raw autograd
    takes.

    ==================================== ================================================================
    reads                                writes
    ==================================== ================================================================
    ``explainer.in_keys`` ``[*B, T, .]`` ``explainer.out_keys`` ``[*B, T, .]``
    ``mask`` ``[*B, T]``                 ``("explanation", "exploration_type")``: text, "deterministic"
    ==================================== ================================================================

    Args:
        explainer: any TensorDictModule; a method of ``tdconcepts.attribution`` typically.
        rollout: any number of batch dims, the last of them time. It is left as it is. Locked, memory-mapped and lazily
            stacked ones are fine, trajectories of different lengths among them.
        mask: the entry that is True where a step counts, ``[*B, T]`` or ``[*B, T, 1]``. Steps that don't count are not
            computed; their results are ``fill``. Default: ``("collector", "mask")`` of torchrl's padded trajectories,
            or ``("masks", k)`` of ``pad_sequence`` for what the explainer reads, where the rollout has them; ``False``
            counts all.
        unit: what a row of the explainer is: a ``"step"``, or a whole ``"trajectory"`` for policies with a memory
            (:func:`~tdconcepts.rl.at_time`); then the explainer gets ``[N, T]``, padding included. torchrl's LSTM and
            GRU modules run in the mode that fits, recurrent for trajectories, whatever the surrounding context says.
        chunk_size: steps explained at a time, to bound the memory; default: about a MB of what is read.
        exploration_type: under which the policy runs, deterministic by default, whatever the surrounding context says:
            an explanation of a fresh random sample would explain nothing that happened. It is recorded in the result.
        fill: what masked-out steps hold; 0.0 by default, so that sums over time are right (for means divide by the
            mask's sum). ``float("nan")`` leaves gaps in plots.
        into: a folder: results are written there as a memory-mapped TensorDict, chunk by chunk, and the returned
            rollout refers to it; for rollouts that are larger than the memory.

    Returns:
        A shallow copy of ``rollout`` (it shares every tensor) with the explainer's results.

    Raises:
        BadType: the explainer is no TensorDictModule, the rollout no TensorDict.
        BadKey: the rollout lacks an entry that the explainer or the mask needs.
        BadValue: a rollout without batch dims, a mask of another shape, ``chunk_size < 1``, ragged trajectories
            ``into`` a folder.

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
    if not isinstance(rollout, TensorDictBase):
        raise BadType("a rollout is a TensorDict", got=type(rollout).__name__, needed="what env.rollout gives")
    if rollout.ndim < 1:
        raise BadValue(
            "a rollout has batch dims, the last of them time",
            got="batch_size []",
            fix="rollout.unsqueeze(0), or explainer(td)",
        )
    if unit not in ("step", "trajectory"):
        raise BadValue("not a unit", got=f"unit={unit!r}", needed='"step" or "trajectory"')
    pieces = _pieces(rollout)
    if into is not None and not isinstance(into, (str, Path)):
        raise BadType("not a folder", got=repr(into), needed="a path")
    if into is not None and len(pieces) > 1:
        fix = "pad_sequence(trajectories, return_mask=True)"
        raise BadValue("ragged trajectories can't be one memory-mapped result", got=f"into={into}", fix=fix)
    results = _Results(explainer, [piece.batch_size for piece in pieces], fill, into)
    keys = _read(explainer, pieces[0])
    mask = _found_mask(pieces[0], explainer, mask)
    size = check_chunk_size(chunk_size)
    with set_interaction_type(exploration_type), _memory(unit == "trajectory"):
        for piece in pieces:
            rows, counts = _rows(piece, keys, unit), None if mask is None else _mask(piece, mask)
            length = rows.batch_size[1] if rows.ndim > 1 else 1
            step = max(1, _width(rows, size) // max(1, length))
            for start in range(0, len(rows), step):
                part = rows[start : start + step] if step < len(rows) else rows
                some = None if counts is None else counts[start * length : (start + step) * length]
                results.add(part, some, unit == "trajectory")
        if results.empty:
            results.shape_like(rows[:0].copy(), unit == "trajectory")
    found = [piece.copy() for piece in pieces] if len(pieces) > 1 else [rollout.copy()]
    for key in explainer.out_keys:
        for piece, value in zip(found, results.of(key), strict=True):
            piece.set(key, value)
    for piece in found:
        piece.set((EXPLANATION, "exploration_type"), _word(exploration_type, piece.batch_size))
    return found[0] if len(pieces) == 1 else lazy_stack(found)


class RolloutExplainer(TensorDictModuleBase):
    """:func:`explain_rollout` as a stage: the ``postproc`` of a collector, or a transform of a replay buffer.

    | reads | writes |
    |---|---|
    | ``explainer.in_keys`` ``[*B, ...]``; the mask, where there is one | ``explainer.out_keys`` ``[*B, ...]`` |

    * ``Collector(..., postproc=RolloutExplainer(explainer))`` explains each batch that is collected, in the worker;
    * ``buffer.append_transform(RolloutExplainer(explainer))`` explains each batch that is *sampled*, with the policy as
      it is then;
    * inside the policy no stage is needed: ``TensorDictSequential(policy, explainer)``, or an explainer with
      ``outputs=True``, acts and explains (each step for itself, which costs more than after the rollout).

    The exploration type is an attribute, so what was explained can be looked up.

    Args:
        explainer: any TensorDictModule.
        mask, unit, chunk_size, exploration_type, fill: as for :func:`explain_rollout`.

    Raises:
        BadType: the explainer is no TensorDictModule.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> double = TensorDictModule(lambda x: 2 * x, ["observation"], [("attribution", "observation")])
        >>> batch = TensorDict({"observation": torch.ones(2, 3)}, [2, 3])
        >>> RolloutExplainer(double)(batch)["attribution", "observation"].sum()
        tensor(12.)
    """

    def __init__(
        self,
        explainer: TensorDictModuleBase,
        *,
        mask: NestedKey | Literal[False] | None = None,
        unit: Literal["step", "trajectory"] = "step",
        chunk_size: int | None = None,
        exploration_type: InteractionType = InteractionType.DETERMINISTIC,
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        self.explainer = check_module(explainer, "the explainer")
        self.mask = mask if mask is None or mask is False else as_key(mask)
        self.unit, self.chunk_size, self.fill = unit, check_chunk_size(chunk_size), fill
        self.exploration_type = exploration_type
        given = [self.mask] if isinstance(self.mask, (str, tuple)) else []
        self.in_keys = list(dict.fromkeys([*explainer.in_keys, *given]))
        self.out_keys = list(explainer.out_keys)
        self.optional_keys = list(getattr(explainer, "optional_keys", []))

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every step of ``tensordict``."""
        check_td(tensordict)
        alone = not tensordict.batch_dims
        found = explain_rollout(
            self.explainer,
            tensordict.unsqueeze(0) if alone else tensordict,
            mask=self.mask,
            unit=self.unit,
            chunk_size=self.chunk_size,
            exploration_type=self.exploration_type,
            fill=self.fill,
        )
        for key in self.out_keys:
            tensordict.set(key, found.get(key)[0] if alone else found.get(key))
        return tensordict


class _Results:
    """What the explainer wrote, step by step, in one tensor for each key."""

    def __init__(
        self, explainer: TensorDictModuleBase, batches: Sequence[torch.Size], fill: float, into: str | Path | None
    ) -> None:
        self.explainer, self.batches, self.fill, self.into = explainer, list(batches), fill, into
        self.steps = sum(batch.numel() for batch in batches)
        self.held: dict[NestedKey, Tensor] = {}
        self.at = 0

    @property
    def empty(self) -> bool:
        return not self.held

    def add(self, rows: TensorDictBase, counts: Tensor | None, whole: bool) -> None:
        """Explain the next rows; with ``whole`` they are trajectories, else those that count are picked."""
        steps = rows.numel()
        self.at += steps
        if counts is not None and not counts.any():
            return
        every = counts is None or bool(counts.all())
        explained = self.explainer(rows if every or whole else rows[counts])
        for key in self.explainer.out_keys:
            value = explained.get(key)
            value = value.flatten(0, 1) if whole else value
            if every and steps == self.steps and self.into is None:
                self.held[key] = value
                continue
            part = self._room(key, value)[self.at - steps : self.at]
            if every:
                part.copy_(value)
            else:
                assert counts is not None
                part[counts] = value[counts] if whole else value

    def shape_like(self, none: TensorDictBase, whole: bool) -> None:
        """Results for no steps that count: the shapes come from an empty batch."""
        explained = self.explainer(none)
        for key in self.explainer.out_keys:
            value = explained.get(key)
            self._room(key, value.flatten(0, 1) if whole else value)

    def of(self, key: NestedKey) -> list[Tensor]:
        """The results of each piece, ``[*B, T, ...]``."""
        flat = self.held[key]
        parts = flat.split([batch.numel() for batch in self.batches]) if len(self.batches) > 1 else [flat]
        return [part.reshape(*batch, *part.shape[1:]) for part, batch in zip(parts, self.batches, strict=True)]

    def _room(self, key: NestedKey, value: Tensor) -> Tensor:
        if key not in self.held:
            shape = (self.steps, *value.shape[1:])
            if self.into is None:
                self.held[key] = value.new_full(shape, self.fill)
            else:
                batch = self.batches[0]
                pattern = value.new_zeros(1).expand(*batch, *value.shape[1:])
                folder = Path(self.into).joinpath(*([] if len(self.explainer.out_keys) == 1 else ["-".join(join(key))]))
                stored = TensorDict({}, batch).set(key, pattern).memmap_like(folder).get(key)
                stored.fill_(self.fill)
                self.held[key] = stored.view(shape)
        return self.held[key]


def _pieces(rollout: TensorDictBase) -> list[TensorDictBase]:
    """Trajectories of different lengths one by one; everything else as it is."""
    if not isinstance(rollout, LazyStackedTensorDict) or -1 not in rollout.batch_size:
        return [rollout]
    if rollout.stack_dim != 0 or any(-1 in piece.batch_size for piece in rollout.tensordicts):
        raise BadValue(
            "the trajectories do not stack into one batch",
            got=f"batch_size {list(rollout.batch_size)}, stacked along dim {rollout.stack_dim}",
            needed="trajectories stacked along the first dim, or padded ones with a mask",
            fix='pad_sequence(list of trajectories, return_mask=True) and mask=("masks", ...)',
        )
    return list(rollout.tensordicts)


def _read(explainer: TensorDictModuleBase, rollout: TensorDictBase) -> list[NestedKey]:
    for key in explainer.in_keys:
        if rollout.get(key, None) is None:
            raise BadKey(
                f"the rollout has no entry {key_text(key)}, which the explainer reads",
                got=f"in_keys {list(explainer.in_keys)}",
                needed=nearest(key, rollout.keys(True, True)),
            )
    optional = [key for key in getattr(explainer, "optional_keys", ()) if rollout.get(key, None) is not None]
    return [*explainer.in_keys, *optional]


def _rows(piece: TensorDictBase, keys: Sequence[NestedKey], unit: str) -> TensorDict:
    """The entries that are read, as rows: steps ``[N]``, or trajectories ``[N, T]``; views where they can be."""
    batch = piece.batch_size
    shape = (batch.numel(),) if unit == "step" else (batch[:-1].numel(), batch[-1])
    rows = TensorDict({}, batch_size=shape, device=piece.device)
    for key in keys:
        value = piece.get(key)
        row = value.shape[len(batch) :]
        rows.set(key, value.reshape(*shape, *row))
    return rows


def _width(rows: TensorDictBase, chunk_size: int | None) -> int:
    """How many steps at a time: as many as fit the memory that a chunk of the explainer's own is given."""
    if chunk_size is not None or rows.numel() <= _FEWEST:
        return chunk_size or _FEWEST
    values = [value for value in rows.values(True, True) if isinstance(value, Tensor)]
    each = sum(value.numel() for value in values) // rows.numel()
    return min(
        _MOST, max(_FEWEST, (2**18 if rows.device is None or rows.device.type == "cpu" else 2**24) // max(1, each))
    )


def _found_mask(
    rollout: TensorDictBase, explainer: TensorDictModuleBase, mask: NestedKey | Literal[False] | None
) -> NestedKey | None:
    if mask is False:
        return None
    if mask is not None:
        if not isinstance(mask, (str, tuple)):
            raise BadType("a mask is the key of an entry", got=repr(mask), needed="a key, False, or None")
        return as_key(mask)
    usual = [MASK, *(as_key(join("masks", key)) for key in explainer.in_keys)]
    return next((key for key in usual if _is_mask(rollout, key)), None)


def _is_mask(rollout: TensorDictBase, key: NestedKey) -> bool:
    value = rollout.get(key, None)
    return isinstance(value, Tensor) and value.shape in (rollout.batch_size, (*rollout.batch_size, 1))


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


def _memory(whole: bool) -> AbstractContextManager[Any]:
    """What makes torchrl's recurrent modules read rows as sequences, or as steps; none is there without torchrl."""
    modules = sys.modules.get("torchrl.modules")
    return nullcontext() if modules is None else modules.set_recurrent_mode(whole)


def _word(kind: InteractionType, batch: torch.Size) -> NonTensorData:
    return NonTensorData(kind.name.lower(), batch_size=batch)
