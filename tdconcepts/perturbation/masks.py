"""Which elements of a row are one feature: masks of group numbers, shared across entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.hooks.sites import Site
from tdconcepts.keys import NestedKey, as_key, join, key_text
from tdconcepts.perturbation.baselines import accepts

__all__ = ["Along", "Grid", "Mask", "Masks", "check_masks", "keyed_groups", "mask_key", "numbered"]

Mask: TypeAlias = Tensor | Callable[[torch.Size], Tensor] | NestedKey
Masks: TypeAlias = Mask | Mapping[NestedKey, Mask] | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A mask of tiles over the last dims of a row; the dims before them (channels) belong to the tile.

    Args:
        cell: the size of a tile in elements, for each of the last dims; the last tiles are smaller where it does not
            divide the row.

    Raises:
        BadValue: a size below 1; at the call, more sizes than the row has dims.

    Examples:
        >>> Grid((2, 2))(torch.Size([1, 3, 4]))
        tensor([[[0, 0, 1, 1],
                 [0, 0, 1, 1],
                 [2, 2, 3, 3]]])
    """

    cell: tuple[int, ...]

    def __post_init__(self) -> None:
        cell = tuple(self.cell) if isinstance(self.cell, (tuple, list)) else (self.cell,)
        if not cell or not all(type(size) is int and size >= 1 for size in cell):
            raise BadValue("not the size of a tile", got=f"cell={self.cell!r}", needed="ints >= 1, one for each dim")
        object.__setattr__(self, "cell", cell)

    def __call__(self, row: torch.Size) -> Tensor:
        k = len(self.cell)
        if k > len(row):
            raise BadValue("a grid of more dims than the row", got=f"cell={self.cell}", needed=f"at most {len(row)}")
        ids = torch.zeros((), dtype=torch.long)
        for length, size in zip(row[len(row) - k :], self.cell, strict=True):
            tile = torch.arange(length) // size
            ids = ids.unsqueeze(-1) * (-(-length // size)) + tile
        return ids.expand(row)


@dataclasses.dataclass(frozen=True)
class Along:
    """A mask with one group for each index along a dim: tokens, channels, or time steps.

    Args:
        dim: the dim of a *row*, without the batch dims.

    Raises:
        BadValue: what is no dim; at the call, a dim that the row does not have.

    Examples:
        >>> Along(0)(torch.Size([2, 3]))
        tensor([[0, 0, 0],
                [1, 1, 1]])
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if type(self.dim) is not int:
            raise BadValue("not a dim", got=f"dim={self.dim!r}", needed="an int")

    def __call__(self, row: torch.Size) -> Tensor:
        if not -len(row) <= self.dim < len(row):
            raise BadValue("a row has no such dim", got=f"dim={self.dim}", needed=f"a dim of rows of shape {list(row)}")
        dim = self.dim % len(row)
        return torch.arange(row[dim]).view(-1, *[1] * (len(row) - dim - 1)).expand(row)


def check_masks(masks: Masks, wrt: tuple[Wrt, ...]) -> None:
    """Raise for a mask that is none, or that belongs to nothing that is explained."""
    names = [w.key if isinstance(w, Site) else w for w in wrt]
    if isinstance(masks, Mapping):
        for name, mask in masks.items():
            if name not in names:
                raise BadKey(
                    f"a mask for {name!r}, which is not explained", got=repr(name), needed=nearest(name, names)
                )
            _check(mask)
    elif masks is not None:
        _check(masks)
        if isinstance(masks, Tensor) and len(names) > 1:
            raise BadValue(
                "one mask for several entries",
                got=f"wrt={names}",
                needed="a mask for each",
                fix=f"mask={{{names[0]!r}: ..., {names[1]!r}: ...}}",
            )


def mask_key(masks: Masks, name: NestedKey) -> NestedKey | None:
    """The entry that holds the mask of ``name``, if one does."""
    mask = _of(masks, name)
    return as_key(join(mask, name)) if isinstance(mask, (str, tuple)) else None


def keyed_groups(masks: Masks, names: Sequence[NestedKey], td: TensorDictBase) -> Tensor:
    """All numbers of groups in the masks that are entries of ``td``, so that pieces of it number them alike."""
    if masks is None:
        return torch.zeros(0, dtype=torch.long)
    values = [_held(td, key) for key in (mask_key(masks, name) for name in names) if key is not None]
    found = [value.flatten().long() for value in values if isinstance(value, Tensor)]
    return torch.cat(found).unique() if found else torch.zeros(0, dtype=torch.long)


def numbered(
    masks: Masks, values: Mapping[Wrt, Tensor], td: TensorDictBase, also: Tensor
) -> tuple[dict[Wrt, Tensor], int]:
    """For each entry the number of every element's group (-1: never touched), and how many groups there are.

    Equal numbers are one group, also across entries. Where there is no mask each element is a group of its own.

    Args:
        masks: the masks.
        values: the entries and sites, ``[*B, *row]``.
        td: where masks that are entries lie.
        also: numbers of groups that other rows have.

    Returns:
        ``[*B, *row]`` for masks that are entries, else ``[1, ..., *row]`` with a 1 for each batch dim.

    Raises:
        BadValue: a mask that does not broadcast to the row. BadKey: one that is not there.
    """
    lead = td.batch_dims
    raw: dict[Wrt, tuple[Tensor, torch.Size]] = {}
    free: list[Wrt] = []
    for w, value in values.items():
        name = w.key if isinstance(w, Site) else w
        mask, row = _of(masks, name), value.shape[lead:]
        if mask is None:
            free.append(w)
            continue
        if keyed := isinstance(mask, (str, tuple)):
            ids = _entry(masks, name, td)
        else:
            ids = mask if isinstance(mask, Tensor) else mask(row)
            _check(ids, made=True)
        front = ids.shape[:lead] if keyed else (1,) * lead
        rest = ids.shape[lead:] if keyed else ids.shape
        try:
            ids = ids.long().reshape(*front, *[1] * (len(row) - len(rest)), *rest).expand(*front, *row)
            raw[w] = once(ids), ids.shape
        except RuntimeError:
            needed = f"a shape that broadcasts to the row's {list(row)}"
            raise BadValue(f"the mask of {name!r} has another shape", got=f"{list(rest)}", needed=needed) from None
    count = 0
    found: dict[Wrt, Tensor] = {}
    if raw:
        known = torch.cat([also.cpu(), *(ids.flatten().cpu() for ids, _ in raw.values())])
        groups = known[known >= 0].unique()
        count = len(groups)
        for w, (ids, whole) in raw.items():
            place = torch.searchsorted(groups.to(ids.device), ids.contiguous())
            found[w] = torch.where(ids < 0, -1, place).to(values[w].device).expand(whole)
    for w in free:
        row = values[w].shape[lead:]
        found[w] = torch.arange(count, count + row.numel(), device=values[w].device).view(*[1] * lead, *row)
        count += row.numel()
    return found, count


def once(ids: Tensor) -> Tensor:
    """``ids`` without the copies that ``expand`` shows of it along a dim."""
    for dim, step in enumerate(ids.stride()):
        ids = ids.narrow(dim, 0, 1) if step == 0 and ids.shape[dim] > 1 else ids
    return ids


def _of(masks: Masks, name: NestedKey) -> Mask | None:
    return masks.get(name) if isinstance(masks, Mapping) else masks


def _entry(masks: Masks, name: NestedKey, td: TensorDictBase) -> Tensor:
    key = mask_key(masks, name)
    assert key is not None
    ids = _held(td, key)
    if ids is None:
        raise BadKey(f"no mask for {key_text(name)}", got=f"no entry {key_text(key)}")
    _check(ids)
    return ids


def _held(td: TensorDictBase, key: NestedKey) -> Any:
    """What is under ``key``; None also where one of its first parts is a tensor, and not a TensorDict."""
    first, *rest = join(key)
    inner = td.get(first, None)
    if not rest:
        return inner
    return inner.get(tuple(rest), None) if isinstance(inner, TensorDictBase) else None


def _check(mask: object, made: bool = False) -> None:
    """Raise for what is no mask; one that was made by a callable is a tensor."""
    if isinstance(mask, (str, tuple)) and not made:
        as_key(mask)
        return
    whole = isinstance(mask, Tensor) and not (mask.is_floating_point() or mask.is_complex())
    if not whole and (isinstance(mask, Tensor) or made or not accepts(mask, 1)):
        raise BadType(
            "not a mask",
            got=str(mask.dtype) if isinstance(mask, Tensor) else repr(mask),
            needed="an integer tensor in the shape of a row, a callable from that shape to one, or a key",
            fix="Grid((8, 8)), Along(0)",
        )
