"""Targets: which scalar of a model is explained, and how it is read from what the model wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.batching import usable
from tdconcepts.hooks.sites import Site
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Target", "is_one_hot"]

Select: TypeAlias = Any  # None | int | tuple of ints | "argmax" | callable | list / range / slice of these


@dataclasses.dataclass(frozen=True)
class Target:
    r"""Which scalar of a model is explained: :math:`y = \mathrm{select}(\mathrm{of})`, one number for each row.

    Args:
        of: an entry that the model writes, or a :class:`Site` inside it.
        select: which part of a row, where a row holds more than one number:

            * an int ``i``: ``of[..., i]``, for rows that are vectors;
            * a tuple of ints: one element of a row of any shape, ``(channel, y, x)`` for instance;
            * ``"argmax"``: the largest element of each row that is a vector. Methods that look at several points
              (paths, noise) choose it once, at the point that is explained, and hold it;
            * a callable ``(value, td) -> [*B]`` (module-level, if it has to be pickled); it sees what the model reads
              and writes. If it has ``in_keys``, these entries are as they were *given* (the logged action, say), unless
              the explainer writes the model's ``outputs``; if it has ``goals``, the model writes these entries too;
            * a list, ``range`` or ``slice`` of these: *several targets at once*, along a new dim after the batch dims.
              A tuple with slices in it names several elements, so it is several targets too.

        by: an entry that holds the index (integer, ``[*B]`` or ``[*B, 1]``) or the one-hot code of the element, so
            that a rollout is explained for the action that *was taken*.

    Raises:
        BadValue: both ``select`` and ``by``; an index out of range; a value with several numbers a row and no
        ``select``.
        BadType: a select that is none of these; a value that is not floating point.
        BadKey: the ``by`` entry is missing.

    Examples:
        >>> Target("logits", 3), Target("action_value", by="action"), Target(Site("conv1"), (4, 1, 2))
        (Target('logits', 3), Target('action_value', by='action'), Target(Site('conv1'), (4, 1, 2)))
    """

    of: NestedKey | Site
    select: Select = None
    by: NestedKey | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.of, Site):
            object.__setattr__(self, "of", as_key(self.of))
        if self.by is not None:
            object.__setattr__(self, "by", as_key(self.by))
            if self.select is not None:
                raise BadValue("a Target has one selection", got=repr(self), needed="select= or by=, not both")
        object.__setattr__(self, "select", _checked(self.select))

    def __hash__(self) -> int:
        return hash((type(self), self.of, repr(self.select), self.by))

    def __repr__(self) -> str:
        extra = "" if self.select is None else f", {_select_text(self.select)}"
        return f"Target({self.of!r}{extra}" + ("" if self.by is None else f", by={self.by!r}") + ")"

    @property
    def name(self) -> str:
        """How messages name what is explained."""
        return repr(self.of) if isinstance(self.of, Site) else key_text(self.of)

    def read(self, value: Tensor, td: TensorDictBase, lead: int, held: Tensor | None = None) -> tuple[Tensor, bool]:
        """The explained numbers of ``value``, and whether there are several targets.

        Args:
            value: what ``of`` names, ``[*B, ...]``.
            td: where ``by`` and a callable look.
            lead: how many leading dims are the batch.
            held: the indices that :meth:`hold` chose earlier, used in place of ``"argmax"``.

        Returns:
            ``[*B]`` and False, or ``[*B, T]`` and True.
        """
        if not value.is_floating_point():
            raise BadType(
                f"the target {self.name} has no gradient",
                got=f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}",
                needed="a floating-point value",
                fix="explain the logits, a value or a log-probability, with by= for the index that was chosen",
            )
        if self.by is not None:
            return self._by(value, td, lead), False
        if type(self.select) is int and value.ndim == lead + 1 and -value.shape[-1] <= self.select < value.shape[-1]:
            return value.select(lead, self.select), False
        if isinstance(self.select, (list, range)):
            together = self._together(value, lead)
            if together is None:
                together = torch.stack([self._one(value, td, lead, s, held)[0] for s in self.select], lead)
            return together, True
        return self._one(value, td, lead, self.select, held)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the selection reads: ``by``, and the ``in_keys`` of callables that have them."""
        return list(dict.fromkeys([*([] if self.by is None else [self.by]), *self._named("in_keys")]))

    @property
    def goals(self) -> list[NestedKey]:
        """The entries that the model has to write: ``of``, and the ``goals`` of callables that have them."""
        return list(dict.fromkeys([*([] if isinstance(self.of, Site) else [self.of]), *self._named("goals")]))

    def check_goals(self, out_keys: Sequence[NestedKey]) -> None:
        """Raise for a goal that is not among the model's ``out_keys``."""
        for key in self.goals:
            if key not in out_keys:
                raise BadKey(
                    f"the module writes no entry {key_text(key)} to explain",
                    got=repr(self),
                    needed=nearest(key, out_keys),
                    fix=f"Target(Site({key!r}), ...) for an activation inside the module",
                )

    @property
    def moves(self) -> bool:
        """Whether the selection depends on the value itself, so that a path or a noise could change it."""
        return isinstance(self.select, str) or (isinstance(self.select, list) and "argmax" in self.select)

    @property
    def is_one(self) -> bool:
        """Whether it is known beforehand to be one target, not several at once."""
        return self.select is None or isinstance(self.select, (int, str))

    def hold(self, value: Tensor, lead: int) -> Tensor:
        """The index ``[*B]`` that ``"argmax"`` chooses at ``value``."""
        self._need_vector(value, lead, "argmax")
        return value.detach().argmax(-1)

    def _named(self, attribute: str) -> list[NestedKey]:
        chosen = self.select if isinstance(self.select, list) else [self.select]
        return [as_key(key) for one in chosen if callable(one) for key in getattr(one, attribute, ())]

    def _one(
        self, value: Tensor, td: TensorDictBase, lead: int, select: Select, held: Tensor | None
    ) -> tuple[Tensor, bool]:
        row = value.shape[lead:]
        if callable(select):
            return self._called(value, td, lead, select), False
        if isinstance(select, str):
            self._need_vector(value, lead, select)
            index = value.detach().argmax(-1) if held is None else usable(held)
            return value.gather(-1, index.unsqueeze(-1)).squeeze(-1), False
        if select is None:
            if row.numel() != 1:
                raise BadValue(
                    f"the target {self.name} has {row.numel()} numbers a row",
                    got=f"shape {list(value.shape)}, of which the first {lead} dims are the batch",
                    needed="one number a row, or a selection",
                    fix=f'Target({self.of!r}, 0), Target({self.of!r}, "argmax") or Target({self.of!r}, by="action")',
                )
            return value.reshape(value.shape[:lead]), False
        if isinstance(select, slice):
            self._need_vector(value, lead, select)
        if isinstance(select, int):
            self._need_vector(value, lead, select)
        chosen: tuple[Any, ...] = select if isinstance(select, tuple) else (select,)
        try:
            part = value[(slice(None),) * lead + chosen]
        except IndexError:
            part = None
        if (
            part is None
            or (all(isinstance(i, int) for i in chosen) and part.ndim != lead)
            or part.numel() == 0 < value.numel()
        ):
            raise BadValue(
                f"the selection of the target {self.name} is out of range",
                got=f"select={_select_text(select)} in rows of shape {list(row)}",
                needed=f"{len(row)} indices, each within the row",
            )
        return (part, False) if part.ndim == lead else (part.flatten(lead), True)

    def _together(self, value: Tensor, lead: int) -> Tensor | None:
        """Many ints, or many tuples of ints, by one indexing; None where that can't be, or would be out of range."""
        items = [item if isinstance(item, tuple) else (item,) for item in self.select]
        row = value.shape[lead:]
        inside = all(
            len(item) == len(row) and all(isinstance(i, int) and -n <= i < n for i, n in zip(item, row, strict=True))
            for item in items
        )
        if not inside:
            return None
        first = items[0][0] if items and len(row) == 1 else 0
        if len(row) == 1 and first >= 0 and [i for (i,) in items] == list(range(first, first + len(items))):
            return value.narrow(lead, first, len(items))  # whose backward pass is shorter
        return value[(slice(None),) * lead + tuple(map(list, zip(*items, strict=True)))]

    def _called(self, value: Tensor, td: TensorDictBase, lead: int, select: Callable[..., Tensor]) -> Tensor:
        result = select(value, td)
        if not isinstance(result, Tensor) or result.shape != value.shape[:lead]:
            got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise BadValue(
                f"the selection of the target {self.name} gave no number for each row",
                got=got,
                needed=f"a tensor of shape {list(value.shape[:lead])}, from select(value, td)",
            )
        return result

    def _by(self, value: Tensor, td: TensorDictBase, lead: int) -> Tensor:
        index = usable(td.get(self.by))
        if index is None:
            raise BadKey(
                f"no entry {key_text(self.by)} to choose the target by", got=f"entries {list(td.keys(True, True))}"
            )
        self._need_vector(value, lead, f"by={self.by!r}")
        batch, count = value.shape[:lead], value.shape[-1]
        is_index = not (index.is_floating_point() or index.dtype == torch.bool)
        if is_index and index.shape in (batch, (*batch, 1)):
            try:
                return value.gather(-1, index.reshape(*batch, 1).long()).squeeze(-1)
            except (RuntimeError, IndexError):
                pass
        elif index.shape == value.shape:
            if _transformed() or is_one_hot(index):
                return torch.where(index.bool(), value, 0).sum(-1)
        raise BadValue(
            f"the entry {key_text(self.by)} does not index the target {self.name}",
            got=f"{str(index.dtype).removeprefix('torch.')} of shape {list(index.shape)}"
            + (f" between {int(index.min())} and {int(index.max())}" if is_index and index.numel() else ""),
            needed=f"integers of shape {list(batch)} in [0, {count}), or one-hot rows of shape {list(value.shape)}",
        )

    def _need_vector(self, value: Tensor, lead: int, select: object) -> None:
        if value.ndim != lead + 1:
            raise BadValue(
                f"the target {self.name} has rows of shape {list(value.shape[lead:])}",
                got=f"select={_select_text(select)}",
                needed="rows that are vectors" if value.ndim > lead + 1 else "no selection: there is one number a row",
                fix=f"the TensorDict's batch size, which is []: TensorDict(..., batch_size={list(value.shape[:-1])})"
                if not lead and value.ndim > 1
                else "a tuple with an index for each dim, or a callable (value, td) -> [*batch]",
            )


def _checked(select: Select) -> Select:
    if isinstance(select, range) or (isinstance(select, Sequence) and not isinstance(select, (str, tuple))):
        if not len(select):
            raise BadValue(
                "a Target without anything to explain", got=f"select={select!r}", needed="one selection or more"
            )
        if isinstance(select, list):
            for item in select:
                if isinstance(item, (list, range, slice)):
                    raise BadType("selections nest one deep", got=repr(select), needed="a flat list")
        return [_checked(item) for item in select] if not isinstance(select, range) else select
    parts = select if isinstance(select, tuple) else (select,)
    fine = select is None or callable(select) or select == "argmax" or isinstance(select, slice)
    if fine or (parts and all(type(part) is int or isinstance(part, slice) or part is Ellipsis for part in parts)):
        return select
    raise BadType(
        "not a selection",
        got=f"select={select!r}",
        needed='an int, a tuple of ints, "argmax", a callable (value, td) -> [*batch], or a list, range or slice',
    )


def _transformed() -> bool:
    """Inside ``torch.compile`` or a function transform, where a value can't be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def _select_text(select: object) -> str:
    return getattr(select, "__name__", repr(select)) if callable(select) else repr(select)


def is_one_hot(rows: Tensor) -> bool:
    """Whether each row has a one, and else zeros; a continuous action has not."""
    return bool(((rows == 1).sum(-1) == 1).all() and (rows.count_nonzero(-1) == 1).all())
