"""How alike two geometries are: dissimilarity matrices, and which neighbours two spaces share."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import METRIC, NestedKey, as_key, join
from tdconcepts.representations.sets import SetStage, check_count, neighbours, squared
from tdconcepts.representations.similarity import Pairing

__all__ = ["RSA", "InformationImbalance", "dissimilarities", "information_imbalance", "ranks"]

Distance = Literal["euclidean", "sqeuclidean", "cityblock", "cosine", "correlation"]
DISTANCES = ("euclidean", "sqeuclidean", "cityblock", "cosine", "correlation")


def dissimilarities(x: Tensor, distance: Distance = "correlation") -> Tensor:
    """The distances of all pairs of points, ``[..., N (N - 1) / 2]``, in the order of scipy's ``pdist``.

    Args:
        x: ``[..., N, F]``.
        distance: ``"euclidean"``, ``"sqeuclidean"``, ``"cityblock"``, ``"cosine"`` or ``"correlation"``.

    Raises:
        BadValue: fewer than three points; a point without a direction, for the last two.

    Examples:
        >>> dissimilarities(torch.tensor([[0.0], [1.0], [3.0]]), "euclidean")
        tensor([1., 3., 2.])
    """
    if distance not in DISTANCES:
        raise BadValue("no such distance", got=repr(distance), needed=f"one of {', '.join(DISTANCES)}")
    check_count(x, 3, "a matrix of dissimilarities")
    n = x.shape[-2]
    one, other = torch.triu_indices(n, n, 1, device=x.device)
    if distance == "cityblock":
        return torch.cdist(x, x, p=1.0)[..., one, other]
    if distance == "correlation":
        x = x - x.mean(-1, keepdim=True)
    if distance in ("cosine", "correlation"):
        length = x.norm(dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise BadValue(
                f"a point has no direction, so no {distance} distance",
                got=f"{int((length == 0).sum())} points with {'zeros' if distance == 'cosine' else 'one value'} only",
                needed="points that vary over their features",
                fix='distance="euclidean"',
            )
        x = x / length
        return 1.0 - (x @ x.mT)[..., one, other]
    square = (x[..., one, :] - x[..., other, :]).square().sum(-1) if n <= 256 else _square(x)[..., one, other]
    return square if distance == "sqeuclidean" else square.sqrt()


def ranks(values: Tensor) -> Tensor:
    """The rank of each value along the last dim, from 1; equal values share the mean of their ranks.

    Examples:
        >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
        tensor([2.5000, 1.0000, 2.5000])
    """
    order = values.sort(dim=-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(order, values, right=False)
    upto = torch.searchsorted(order, values, right=True)
    return 0.5 * (below + upto + 1).to(values.dtype)


def information_imbalance(x: Tensor, y: Tensor, k: int = 1) -> Tensor:
    r"""How badly neighbours in ``x`` are neighbours in ``y``: :math:`\Delta(x \to y) = \frac{2}{N} \langle r^y \mid r^x
    \le k \rangle`, near 0 where ``x`` says all of ``y``, 1 where nothing.

    :math:`\frac{2}{N}` times the mean rank in ``y`` of the k nearest neighbours in ``x``.

    Args:
        x, y: ``[..., N, F]`` and ``[..., N, G]``.
        k: neighbours in ``x``.

    Returns:
        ``[...]``.

    Raises:
        BadValue: too few points.

    Examples:
        >>> x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(information_imbalance(x, x[:, :1]) < information_imbalance(x[:, :1], x))
        True
    """
    check_count(x, k + 2, f"{k} neighbours")
    n = x.shape[-2]
    _, place = neighbours(x, k)
    total = torch.zeros(x.shape[:-2], dtype=y.dtype, device=y.device)
    y = y - y.mean(-2, keepdim=True)
    for some, square in squared(y):
        here = torch.arange(some.start, some.stop, device=y.device)
        square[..., here - some.start, here] = torch.inf
        theirs = square.gather(-1, place[..., some, :])
        order = square.sort(dim=-1).values
        rank = torch.searchsorted(order, theirs.contiguous(), right=False) + 1
        total += rank.to(y.dtype).sum((-2, -1))
    return 2.0 / n * total / (n * k)


class RSA(Pairing, SetStage):
    r"""Representational similarity: the rank correlation of two matrices of dissimilarities.

    ======  =====================================  ==========================================
    reads   ``a``, ``b``                           ``[*B, F]`` each; ``within``: ``[*B, N, F]``
    writes  ``("metric", "rsa")``                  ``[*B]``; with lists ``[*B, A, B]``
    ======  =====================================  ==========================================

    Args:
        a: an entry, or a list of them.
        b: the entry, or the entries, to compare with; default: ``a``.
        distance: between points: ``"correlation"`` (default), ``"cosine"``, ``"euclidean"``, ``"sqeuclidean"`` or
            ``"cityblock"``.
        compare: ``"spearman"`` (default) or ``"pearson"``.
        within: whether each row holds a set of its own.
        out_key: what is written.

    Raises:
        BadValue: fewer than three points; points at equal distances only; a point without a direction.

    Source: Kriegeskorte, Mur and Bandettini, *Representational similarity analysis*, 2008.

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(x=x, y=3 * x + 1, batch_size=[10])
        >>> round(float(RSA("x", "y")(td)["metric", "rsa"][0]), 4)
        1.0
    """

    def __init__(
        self,
        a: NestedKey | list[NestedKey],
        b: NestedKey | list[NestedKey] | None = None,
        distance: Distance = "correlation",
        compare: Literal["spearman", "pearson"] = "spearman",
        within: bool = False,
        out_key: NestedKey = (METRIC, "rsa"),
    ) -> None:
        self.pair(a, b, within, as_key(out_key))
        if distance not in DISTANCES or compare not in ("spearman", "pearson"):
            got, needed = f"distance={distance!r}, compare={compare!r}", f"{', '.join(DISTANCES)}; spearman or pearson"
            raise BadValue("no such comparison", got=got, needed=needed)
        self.distance: Distance = distance
        self.compare = compare

    def measure(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Over the batch, or within each row."""
        far = {key: dissimilarities(x, self.distance) for key, x in self.sets(td).items()}
        if self.compare == "spearman":
            far = {key: ranks(value) for key, value in far.items()}
        units = {key: _unit(value) for key, value in far.items()}
        found = {(a, b): (units[a] * units[b]).sum(-1) for a in self.a for b in self.b}
        return {self.written[0]: self.table(td, found)}


class InformationImbalance(Pairing, SetStage):
    r"""Which of two spaces knows the other: see :func:`information_imbalance`.

    ======  =====================================================  ==========================================
    reads   ``a``, ``b``                                           ``[*B, F]`` each; ``within``: ``[*B, N, F]``
    writes  ``("metric", "information_imbalance", "a_to_b")``      ``[*B]``; with lists ``[*B, A, B]``
    writes  ``("metric", "information_imbalance", "b_to_a")``      the same
    ======  =====================================================  ==========================================

    Both small: the spaces are equivalent. ``a_to_b`` small alone: ``a`` contains ``b``. Both near 1: independent.

    Args:
        a: an entry, or a list of them.
        b: the entry, or the entries, to compare with; default: ``a``.
        k: neighbours that count.
        within: whether each row holds a set of its own.
        out_key: the first names of what is written.

    Raises:
        BadValue: too few points, values that are not finite.

    Source: Glielmo et al., *Ranking the information content of distance measures*, 2022 (eq. 2).

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
        >>> td = InformationImbalance("x", "y")(TensorDict(x=x, y=x[:, :1], batch_size=[60]))
        >>> found = td["metric", "information_imbalance"]
        >>> bool(found["a_to_b"][0] < found["b_to_a"][0])
        True
    """

    def __init__(
        self,
        a: NestedKey | list[NestedKey],
        b: NestedKey | list[NestedKey] | None = None,
        k: int = 1,
        within: bool = False,
        out_key: NestedKey = (METRIC, "information_imbalance"),
    ) -> None:
        self.pair(a, b, within, *(as_key(join(out_key, name)) for name in ("a_to_b", "b_to_a")))
        if type(k) is not int or k < 1:
            raise BadValue("not a number of neighbours", got=f"k={k!r}", needed="1 or more")
        self.k = k

    def measure(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Over the batch, or within each row."""
        sets = self.sets(td)
        there = {(a, b): information_imbalance(sets[a], sets[b], self.k) for a in self.a for b in self.b}
        back = {(a, b): information_imbalance(sets[b], sets[a], self.k) for a in self.a for b in self.b}
        return {key: self.table(td, found) for key, found in zip(self.written, (there, back), strict=True)}


def _unit(values: Tensor) -> Tensor:
    values = values - values.mean(-1, keepdim=True)
    length = values.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise BadValue("all points are equally far apart", got="dissimilarities of one value", needed="some that vary")
    return values / length


def _square(x: Tensor) -> Tensor:
    return torch.cat([part for _, part in squared(x - x.mean(-2, keepdim=True))], -2)
