"""Sets of points: what similarity and dimension are about, the rows of a batch or a set in each row; neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.hooks.batching import usable
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.keys import NestedKey, as_keys, check_writable, key_text
from tdconcepts.representations.reading import check_keys, features, finite

__all__ = ["SetStage", "check_count", "nearest", "neighbours", "offsets", "squared"]

_ELEMENTS, _ROWS = 2**19, 64  # distances at once, which the cache still holds; rows of them at least


class SetStage(TensorDictModuleBase):
    """A stage that looks at sets of points; the base of measures of similarity and dimension.

    The set is what the batch holds: the rows of an entry ``[*B, F]``, all batch dims together. Its number is written to
    each row, ``[*B]``. With ``within=True`` each row has a set of its own, an entry ``[*B, N, F]`` (the tokens of a
    text, the steps of an episode), and gets the number of its own set.

    Args:
        keys: the entries that are read.
        out_keys: those that are written.
        within: whether each row holds a set.
    """

    def __init__(self, keys: NestedKey | list[NestedKey], out_keys: list[NestedKey], within: bool) -> None:
        super().__init__()
        self.in_keys, self.out_keys, self.within = check_keys(as_keys(keys)), out_keys, within
        self.written = list(out_keys)  # select_out_keys changes the others
        check_writable(self.out_keys, self.in_keys)

    average: bool = True  # whether the number is one of a set, not of a point

    def measure(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What is written: the number of each entry's set or points, unless a stage compares entries."""
        found = {key: self.number(self.points(td, key)) for key in self.in_keys}
        places = self.each_row if self.average else self.each_point
        return {out: places(td, value) for out, value in zip(self.written, found.values(), strict=True)}

    def number(self, x: Tensor) -> Tensor:
        """The number of each set ``[..., N, F]``, or of each point."""
        raise NotImplementedError

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Measure the sets."""
        check_td(tensordict)
        missing = [key for key in self.in_keys if tensordict.get(key) is None]
        if missing:
            raise missing_entries(missing, tensordict)
        with torch.no_grad():
            found = self.measure(tensordict)
        dtype = tensordict.get(self.in_keys[0]).dtype
        for key, value in found.items():
            tensordict.set(key, value.to(dtype))
        return tensordict

    def points(self, td: TensorDictBase, key: NestedKey) -> Tensor:
        """The sets of an entry, ``[N, F]`` or ``[*B, N, F]``, in float64.

        Raises:
            BadValue: values that are not finite, rows of another shape. BadType: not floating point.
        """
        if not self.within:
            return finite(features(td, key), key).double()
        value = td.get(key)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = getattr(value, "dtype", type(value).__name__)
            raise BadType(f"the entry {key_text(key)} holds no points", got=kind, needed="floating point, [*B, N, F]")
        if value.ndim != td.batch_dims + 2:
            raise BadValue(
                f"the rows of {key_text(key)} hold no sets of points",
                got=f"shape {list(value.shape)} in a TensorDict of batch size {list(td.batch_size)}",
                needed="[*B, N, F], with within=True",
                fix="td.batch_size = ..., or within=False for the batch as one set",
            )
        return finite(usable(value).detach(), key).double()

    def each_row(self, td: TensorDictBase, value: Tensor) -> Tensor:
        """The number (or numbers) of a set, for each row: ``[*B, ...]``."""
        return value if self.within else value.expand(*td.batch_size, *value.shape)

    def each_point(self, td: TensorDictBase, value: Tensor) -> Tensor:
        """A number for each point: ``[*B]``, or ``[*B, N]`` where rows hold sets."""
        return value if self.within else value.reshape(td.batch_size)


def check_count(x: Tensor, least: int, what: str) -> None:
    """Raise for sets of too few points, or of none of the features.

    Raises:
        BadValue: fewer than ``least`` points.
    """
    if x.shape[-2] < least or not x.shape[-1]:
        raise BadValue(
            f"too few points for {what}",
            got=f"{x.shape[-2]} points of {x.shape[-1]} features",
            needed=f"{least} points or more",
            fix="a larger batch; within=True only where each row holds a set",
        )


def neighbours(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest other points of each point: distances ``[..., N, k]``, ascending, and positions.

    Distances are computed anew from the differences, so that duplicates are at a distance of exactly zero.

    Args:
        x: sets of points ``[..., N, F]``.
        k: below N.

    Examples:
        >>> far, who = neighbours(torch.tensor([[0.0], [1.0], [3.0]]), 1)
        >>> far.flatten().tolist(), who.flatten().tolist()
        ([1.0, 1.0, 2.0], [1, 0, 1])
    """
    place = nearest(x, k)
    step = max(1, _ELEMENTS // max(1, x[..., :1, :].numel() * k))
    blocks = [slice(first, first + step) for first in range(0, x.shape[-2], step)]
    far = [offsets(x, place[..., some, :], some).norm(dim=-1) for some in blocks]
    distance, order = torch.cat(far, -2).sort(dim=-1, stable=True)
    return distance, place.gather(-1, order)


def nearest(x: Tensor, k: int) -> Tensor:
    """The positions of the ``k`` nearest other points ``[..., N, k]``, in no order.

    They are found by products of matrices, a block of rows at a time: points that are as near as the rounding of their
    squares may stand for each other.
    """
    check_count(x, k + 1, f"{k} neighbours")
    x = x - x.mean(-2, keepdim=True)
    places = []
    for some, square in squared(x, own=False):
        here = torch.arange(some.start, some.stop, device=x.device)
        square[..., here - some.start, here] = torch.inf
        places.append(_least(square, k))
    return torch.cat(places, -2)


def _least(x: Tensor, k: int) -> Tensor:
    """Where the ``k`` least values of each row are, in no order: ``[..., k]``.

    The numbers of a row are dealt into groups: the least k numbers lie in the k groups with the least minima. Two
    selections among about sqrt(k N) numbers each take half the time of one among N.
    """
    n = x.shape[-1]
    each = math.isqrt(n // k)  # numbers in a group
    if each < 2:
        return x.topk(k, largest=False, sorted=False).indices
    groups = n // each
    lowest = x[..., : groups * each].unflatten(-1, (each, groups)).amin(-2)
    group = lowest.topk(k, largest=False, sorted=False).indices
    dealt = torch.arange(0, groups * each, groups, device=x.device)
    rest = torch.arange(groups * each, n, device=x.device).expand(*x.shape[:-1], -1)
    place = torch.cat([(group.unsqueeze(-2) + dealt.unsqueeze(-1)).flatten(-2), rest], -1)
    return place.gather(-1, x.gather(-1, place).topk(k, largest=False, sorted=False).indices)


def squared(x: Tensor, own: bool = True) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of blocks of points to all points, ``[..., block, N]``, each with its slice.

    Without ``own`` less each block's own square, which is the same for the whole row.
    """
    n = x.shape[-2]
    length = x.square().sum(-1)
    step = max(_ROWS, _ELEMENTS // max(1, length.numel()))
    for first in range(0, n, step):
        some = slice(first, min(n, first + step))
        square = ((-2.0 * x[..., some, :]) @ x.mT).add_(length[..., None, :])
        yield some, square.add_(length[..., some, None]).clamp_(min=0.0) if own else square


def offsets(x: Tensor, place: Tensor, some: slice = slice(None)) -> Tensor:
    """What leads from each point (``some`` of them) to the points at ``place`` ``[..., n, k]``: ``[..., n, k, F]``."""
    index = place.flatten(-2).unsqueeze(-1).expand(*place.shape[:-2], -1, x.shape[-1])
    return x.gather(-2, index).unflatten(-2, place.shape[-2:]).sub_(x[..., some, :].unsqueeze(-2))
