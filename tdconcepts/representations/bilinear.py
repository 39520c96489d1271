"""Bilinear probes: what can be read from two entries together, in closed form or of low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.keys import NestedKey, as_keys, join
from tdconcepts.representations.fitting import Fitted, Probe
from tdconcepts.representations.moments import Moments, merged, solve_ridge
from tdconcepts.representations.reading import Rows, Stream

__all__ = ["BilinearProbe"]

Pieces: TypeAlias = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]
_WIDEST = 8192  # products of features that a closed form takes
_ROWS = 2**22


class BilinearProbe(Probe):
    r"""A probe of pairs of entries: :math:`\hat y = x_1^T W x_2 + b`, :math:`W` full or of low rank.

    :math:`\min_W \sum_n (y_n - \hat y_n)^2 + \lambda \lVert W \rVert_F^2`. The full form is solved in closed form over
    the products of features; with ``rank`` :math:`W = U V^T` is found by alternating closed forms, each of which lowers
    the same objective, so widths of thousands are no problem.

    ======  =====================================  =====================================
    reads   ``first``, ``second``                  ``[*B, F1]``, ``[*B, F2]`` each
    writes  ``("probe", *key of first, *second)``  ``[*B]`` or ``[*B, K]``, as the label
    ======  =====================================  =====================================

    Args:
        first: an entry, or a list of them.
        second: as many entries, which are paired in order.
        label: the entry to predict, ``[*B]`` or ``[*B, K]``; one-hot for classes.
        rank: of ``W``; default: full.
        ridge: lambda, above 0; 1 by default.
        steps: the most alternations.
        out_key: the first name of what is written.

    Raises:
        BadValue: lists of different lengths, a rank below 1, ``ridge <= 0``; at the fit: more than 8192 products of
            features without a rank.

    Source: Tenenbaum and Freeman, *Separating style and content with bilinear models*, 2000; Hewitt and Manning, *A
    structural probe*, 2019, has the symmetric form.

    Examples:
        >>> from tensordict import TensorDict
        >>> a, b = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(a=a, b=b, y=a[:, 0] * b[:, 1], batch_size=[60])
        >>> probe = BilinearProbe("a", "b", "y", rank=1, ridge=1e-6).fit(td)
        >>> torch.allclose(probe(td)["probe", "a", "b"], td["y"], atol=1e-4)
        True
    """

    def __init__(
        self,
        first: NestedKey | list[NestedKey],
        second: NestedKey | list[NestedKey],
        label: NestedKey,
        rank: int | None = None,
        ridge: float = 1.0,
        steps: int = 30,
        out_key: NestedKey = "probe",
    ) -> None:
        ones, others = as_keys(first), as_keys(second)
        if len(ones) != len(others):
            got = f"{len(ones)} and {len(others)}"
            raise BadValue("the entries don't pair up", got=got, needed="as many second as first entries")
        super().__init__([join(a, b) for a, b in zip(ones, others, strict=True)], label, out_key)
        self.first, self.second = ones, others
        if rank is not None and (type(rank) is not int or rank < 1):
            raise BadValue("not a rank", got=repr(rank), needed="1 or more, or None for a full one")
        if not ridge > 0.0 or steps < 1:
            raise BadValue("a setting is out of range", got=f"ridge={ridge}, steps={steps}", needed="above 0")
        self.rank, self.ridge, self.steps = rank, float(ridge), steps
        self.in_keys = self.keys_read
        self.passes = None if rank is None else "a low rank"  # type: ignore[misc]

    @property
    def keys_read(self) -> list[NestedKey]:
        """Each entry once."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def sources(self, i: int) -> list[NestedKey]:
        """The pair."""
        return [self.first[i], self.second[i]]

    _lead = 2

    def read(self, x: list[Tensor], one: Fitted) -> Tensor:
        """The bilinear form."""
        if one.weight.ndim == 2:
            return torch.einsum("...a,ab,...b->...", x[0], one.weight, x[1]) + one.bias
        return torch.einsum("...a,abk,...b->...k", x[0], one.weight, x[1]) + one.bias

    def direction(self, key: NestedKey | None = None) -> Tensor:
        """A bilinear form has none."""
        raise BadKey("a bilinear probe has no one direction", got=repr(key), fix="probe.of(key).weight, and its SVD")

    def solve(self, stream: Stream, folds: int = 0) -> list[list[Fitted]]:
        """Pair by pair and training set by training set; labels are solved together."""
        return [
            [self._pair(stream, i, fold if folds else None) for i in range(len(self.first))]
            for fold in range(max(1, folds))
        ]

    def _pair(self, stream: Stream, i: int, left_out: int | None) -> Fitted:
        at = [self.keys_read.index(key) for key in self.sources(i)]

        def read() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for rows in stream():
                kept = rows if left_out is None else rows.only(rows.fold != left_out)  # type: ignore[arg-type]
                yield from _pieces(kept, at)

        return self._full(read) if self.rank is None else self._low(read, self.rank)

    def _full(self, read: Pieces) -> Fitted:
        parts: list[Moments] = []
        for a, b, y in read():
            products = a.shape[-1] * b.shape[-1]
            if products > _WIDEST:
                raise BadValue(
                    "too many products of features for a closed form",
                    got=f"{a.shape[-1]} x {b.shape[-1]} = {products}",
                    needed=f"{_WIDEST} at most",
                    fix="rank=4",
                )
            part = Moments.of(_products(a, b), y)
            parts = [merged([*parts, part])]
            shape = (a.shape[-1], b.shape[-1], y.shape[-1])
        m = merged(parts)
        label_mean, cross, _ = m.labels
        weight = solve_ridge(m.scatter, cross, self.ridge)
        return Fitted(weight.view(shape), label_mean - m.mean @ weight, m.mean.view(shape[:2]))

    def _low(self, read: Pieces, rank: int) -> Fitted:
        count = 0
        sums: list[Tensor] = []
        for a, b, y in read():
            count += len(y)
            here = (torch.einsum("na,nb,nk->kab", a, b, y), torch.einsum("na,nb->ab", a, b), y.sum(0))
            sums = [one + other for one, other in zip(sums, here, strict=True)] if sums else list(here)
        cross, mean, label = sums[0], sums[1] / count, sums[2] / count
        rank = min(rank, *mean.shape)
        start = cross - count * label[:, None, None] * mean
        right = torch.linalg.svd(start).Vh[:, :rank].mT  # [K, F2, R]
        before, weight, bias = torch.inf, start, label
        for _ in range(self.steps):
            left, bias, _ = self._half(read, right, 0)
            basis = torch.linalg.qr(left).Q  # an orthonormal factor: the penalty of the other is that of W
            right, bias, error = self._half(read, basis, 1)
            weight = basis @ right.mT
            right = torch.linalg.qr(right).Q
            total = float(error.sum())
            if before - total <= 1e-9 * abs(total):
                break
            before = total
        return Fitted(weight.movedim(0, -1), bias, mean)

    def _half(self, read: Pieces, factor: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best other factor ``[K, F, R]`` for one that is held, the biases ``[K]`` and the objective ``[K]``."""
        parts: list[Moments] = []
        for pair in read():
            free, held, y = pair[side], pair[1 - side], pair[2]
            z = torch.einsum("na,nb,kbr->knar", free, held, factor).flatten(2)
            parts = [merged([*parts, Moments.of(z, y.mT.unsqueeze(-1))])]
        [m] = parts
        label_mean, cross, label_scatter = m.labels
        solved = solve_ridge(m.scatter, cross, self.ridge)
        bias = (label_mean - (m.mean.unsqueeze(-2) @ solved).squeeze(-2)).squeeze(-1)
        error = (label_scatter - cross.mT @ solved).flatten()
        return solved.view(len(factor), -1, factor.shape[-1]), bias, error


def _pieces(rows: Rows, at: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    a, b = (rows.x[i] for i in at)
    step = max(1, _ROWS // max(1, a.shape[-1] * b.shape[-1]))
    for first in range(0, len(rows.y), step):
        some = slice(first, first + step)
        yield a[some], b[some], rows.y[some]


def _products(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
