"""How experiments change an activation: many at once, or one at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.experiments.table import Plain, made, reads
from tdconcepts.hooks.edits import Add, Edit, Replace, Scale
from tdconcepts.hooks.leaves import pick, put
from tdconcepts.hooks.programs import EditLike, checked_edit
from tdconcepts.keys import NestedKey

__all__ = ["Move", "Part", "Unfit", "within"]

_OPERAND = {Replace: "value", Add: "vector", Scale: "factor"}


class Unfit(Exception):
    """A plan can't do these experiments on this model; the text says why."""


class Part:
    """The edit of one experiment: ``edit`` where the spans hold, and the value as it is elsewhere."""

    def __init__(self, edit: EditLike, spans: dict[int, Any]) -> None:
        self.edit, self.spans = edit, spans

    @property
    def in_keys(self) -> list[NestedKey]:
        return reads(self.edit)

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        new = checked_edit(made(self.edit, value, td), value, "an experiment")
        return torch.where(within(value, self.spans), new, value) if self.spans else new


class Move:
    """A change at one place in ``m`` experiments, applied to all of them at once.

    Where the edit is one that all share and nothing was changed before, it is made once; each experiment then keeps its
    own part. Otherwise it is made for each experiment, by ``vmap`` where it is one of ours.
    """

    def __init__(self, plain: Plain) -> None:
        self.plain, self.m = plain, len(plain.members)
        self._stacked = _stacked(plain.edits)
        self._masks: dict[Any, Tensor] = {}
        self._units = _units(plain.spans)

    def take(self, which: list[int], members: list[int]) -> Move:
        """The same move in some of its experiments, which get other numbers."""
        plain = self.plain
        index = torch.tensor(which, dtype=torch.long)
        edits = plain.edits if len(plain.edits) == 1 else tuple(plain.edits[i] for i in which)
        spans = {dim: span[index] for dim, span in plain.spans.items()}
        return Move(Plain(plain.where, edits, spans, torch.tensor(members, dtype=torch.long)))

    def part(self, i: int) -> Part:
        """The edit of the ``i``-th of its experiments alone."""
        plain = self.plain
        spans = {dim: tuple(span[i].tolist()) for dim, span in plain.spans.items()}
        return Part(plain.edits[0 if len(plain.edits) == 1 else i], spans)

    def mapped(self) -> dict[Any, Any]:
        """What ``vmap`` maps over: the spans, and the operands where each experiment has its own.

        Raises:
            Unfit: the experiments have edits of several kinds.
        """
        found: dict[Any, Any] = {dim: span.unbind(1) for dim, span in self.plain.spans.items()}
        if self._stacked is not None:
            found["operand"] = self._stacked
        elif len(self.plain.edits) > 1:
            raise Unfit("the experiments at one place have edits of several kinds")
        return found

    def with_operand(self, operand: Tensor) -> EditLike:
        """The edit of the experiment that has this operand."""
        first: Any = self.plain.edits[0]
        return dataclasses.replace(first, **{_OPERAND[type(first)]: operand})

    def apply(self, value: Tensor, td: TensorDictBase, own: bool, index: tuple[Any, ...] | None = None) -> Tensor:
        """The changed activations ``[m, b, ...]``.

        Args:
            value: ``[b, ...]``, which all experiments share, or with ``own`` one for each, ``[m, b, ...]``.
            td: the entries that edits read, one batch of them.
            own: see ``value``.
            index: the part of each row that is changed.
        """
        if index is None:
            return self._apply(value, td, own)
        one = value[0] if own else value
        lead = td.batch_dims if one.shape[: td.batch_dims] == td.batch_size else 1
        new = self._apply(pick(value, index, lead + own), td, own)
        return put(value if own else value.expand(self.m, *value.shape), index, lead + 1, new)

    def _apply(self, value: Tensor, td: TensorDictBase, own: bool) -> Tensor:
        plain, shape = self.plain, value.shape[own:]
        operand = None if self._stacked is None else self._operand(value, shape)
        if operand is not None:
            new = operand.expand(self.m, *shape) if plain.edits[0].__class__ is Replace else self._moved(value, operand)
        elif len(plain.edits) > 1 or (own and not isinstance(plain.edits[0], Edit)):
            edits = plain.edits * (self.m if len(plain.edits) == 1 else 1)
            values = value.unbind() if own else [value] * self.m
            new = torch.stack([self._made(edit, one, td) for edit, one in zip(edits, values, strict=True)])
        elif own:
            new = torch.vmap(lambda one: self._made(plain.edits[0], one, td))(value)
        else:
            new = self._made(plain.edits[0], value, td)
            if self._units is not None:
                return self._unit_by_unit(new, value)
            new = new.expand(self.m, *shape)
        return torch.where(self._mask(value, shape), new, value) if plain.spans else new

    def _unit_by_unit(self, new: Tensor, value: Tensor) -> Tensor:
        """``value`` for each experiment, with one unit of ``new`` in it: less work than a mask over all of it."""
        dim, units, numbers, in_order = self._units  # type: ignore[misc]
        if units.device != value.device:
            units, numbers = units.to(value.device), numbers.to(value.device)
        rows = value.expand(self.m, *value.shape).clone()
        new = new.movedim(dim, 0)
        rows.movedim(dim, 1)[numbers, units] = new if in_order and len(units) == len(new) else new[units]
        return rows

    def _made(self, edit: EditLike, value: Tensor, td: TensorDictBase) -> Tensor:
        return checked_edit(made(edit, value, td), value, str(self.plain.where))

    def _moved(self, value: Tensor, operand: Tensor) -> Tensor:
        first: Any = self.plain.edits[0]
        return value + first.scale * operand if isinstance(first, Add) else value * operand

    def _operand(self, value: Tensor, shape: torch.Size) -> Tensor | None:
        rest = self._stacked.shape[1:]  # type: ignore[union-attr]
        if len(rest) >= len(shape) or rest != shape[len(shape) - len(rest) :]:
            return None
        stacked = self._stacked.reshape(self.m, *[1] * (len(shape) - len(rest)), *rest)  # type: ignore[union-attr]
        return stacked.to(value.device, value.dtype)

    def _mask(self, value: Tensor, shape: torch.Size) -> Tensor:
        key = (*(shape[dim] for dim in self.plain.spans), len(shape), value.device)
        if key not in self._masks:
            spans = {
                dim: tuple(bound.to(value.device).reshape(self.m, *[1] * len(shape)) for bound in span.unbind(1))
                for dim, span in self.plain.spans.items()
            }
            self._masks = {key: within(value.new_empty(1).expand(shape), spans)}
        return self._masks[key]


def within(value: Tensor, spans: dict[int, Any]) -> Tensor:
    """Where all the spans hold: a mask that broadcasts to ``value``, whose dims are counted from the end."""
    mask = torch.ones((), dtype=torch.bool, device=value.device)
    for dim, (start, stop) in spans.items():
        along = torch.arange(value.shape[dim], device=value.device).view(-1, *[1] * (-1 - dim))
        mask = mask & (along >= start) & (along < stop)
    return mask


def _units(spans: dict[int, Tensor]) -> tuple[int, Tensor, Tensor, bool] | None:
    """The dim, the units, the numbers of the experiments and whether these are the units, where each changes one."""
    if len(spans) != 1:
        return None
    ((dim, span),) = spans.items()
    one_each = bool((span[:, 1] - span[:, 0] == 1).all())
    units, numbers = span[:, 0], torch.arange(len(span), device=span.device)
    return (dim, units, numbers, torch.equal(units, numbers)) if one_each else None


def _stacked(edits: tuple[EditLike, ...]) -> Tensor | None:
    """The operands of edits that differ in nothing else, as one tensor."""
    first: Any = edits[0]
    name = _OPERAND.get(type(first))
    if len(edits) == 1 or name is None or any(type(edit) is not type(first) for edit in edits):
        return None
    values: list[Any] = [getattr(edit, name) for edit in edits]
    if not all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
        return None
    same = all(getattr(edit, "scale", None) == getattr(first, "scale", None) for edit in edits)
    return torch.stack([value.detach() for value in values]) if same else None
