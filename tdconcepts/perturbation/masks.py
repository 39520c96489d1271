"""Which elements of a row are one feature: masks of group numbers, shared across entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.hooks.sites import Site
from tdconcepts.keys import NestedKey

__all__ = ["Along", "Grid", "Mask", "Masks", "check_masks", "numbered"]

Mask: TypeAlias = Tensor | Callable[[torch.Size], Tensor]
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
        cell = (self.cell,) if isinstance(self.cell, int) else tuple(self.cell)
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
        BadValue: at the call, for a dim that the row does not have.

    Examples:
        >>> Along(0)(torch.Size([2, 3]))
        tensor([[0, 0, 0],
                [1, 1, 1]])
    """

    dim: int = 0

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


def numbered(masks: Masks, rows: Mapping[Wrt, torch.Size]) -> tuple[dict[Wrt, Tensor], int]:
    """For each entry the number of every element's group (-1: never touched), and how many groups there are.

    Equal numbers are one group, also across entries. Where there is no mask each element is a group of its own.

    Raises:
        BadValue: a mask that does not broadcast to the row.
    """
    raw: dict[Wrt, Tensor] = {}
    free: list[Wrt] = []
    for w, row in rows.items():
        name = w.key if isinstance(w, Site) else w
        mask = masks.get(name) if isinstance(masks, Mapping) else masks
        if mask is None:
            free.append(w)
            continue
        ids = mask if isinstance(mask, Tensor) else mask(row)
        try:
            raw[w] = ids.cpu().long().expand(row)
        except RuntimeError:
            needed = f"a shape that broadcasts to the row's {list(row)}"
            raise BadValue(f"the mask of {name!r} has another shape", got=f"{list(ids.shape)}", needed=needed) from None
    known = torch.cat([torch.zeros(0, dtype=torch.long), *(ids.flatten() for ids in raw.values())])
    groups = known[known >= 0].unique()
    found = {w: torch.where(ids < 0, -1, torch.searchsorted(groups, ids.contiguous())) for w, ids in raw.items()}
    count = len(groups)
    for w in free:
        found[w] = torch.arange(count, count + rows[w].numel()).view(rows[w])
        count += rows[w].numel()
    return found, count


def _check(mask: object) -> None:
    whole = isinstance(mask, Tensor) and not (mask.is_floating_point() or mask.is_complex())
    if not whole and (isinstance(mask, Tensor) or not callable(mask)):
        raise BadType(
            "not a mask",
            got=str(mask.dtype) if isinstance(mask, Tensor) else repr(mask),
            needed="an integer tensor in the shape of a row, or a callable from that shape to one",
            fix="Grid((8, 8)), Along(0)",
        )
