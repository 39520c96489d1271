"""How alike two representations are: centred kernel alignment and canonical correlations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.keys import METRIC, NestedKey, as_key, as_keys
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, batches
from tdconcepts.representations.sets import SetStage, check_count

__all__ = ["CCA", "CKA", "SVCCA", "Pairing", "canonical_correlations", "cka", "hsic"]

Kernel = Literal["linear", "rbf"]


def hsic(x: Tensor, y: Tensor, kernel: Kernel = "linear", bandwidth: float = 1.0, unbiased: bool = False) -> Tensor:
    r"""The Hilbert-Schmidt independence criterion of two sets of features of the same points.

    Biased: :math:`\mathrm{tr}(K H L H) / (n - 1)^2`. Unbiased: :math:`\frac{1}{n (n - 3)} \big[\mathrm{tr}(\tilde K
    \tilde L) + \frac{1^T \tilde K 1 \, 1^T \tilde L 1}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^T \tilde K \tilde L 1\big]`,
    with zeros on the diagonals.

    Args:
        x, y: ``[..., N, F]`` and ``[..., N, G]``.
        kernel: ``"linear"`` or ``"rbf"``, :math:`\exp(-d^2 / 2 \sigma^2)`.
        bandwidth: sigma, as a share of the median distance between points.
        unbiased: which of the two; unbiased needs four points.

    Returns:
        ``[...]``.

    Source: Gretton et al. 2005; Song et al., *Feature selection via dependence maximization*, 2012 (eq. 5).

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> hsic(x, x)
        tensor(1.)
    """
    check_count(x, 4 if unbiased else 2, "this similarity")
    k, l = _gram(x, kernel, bandwidth), _gram(y, kernel, bandwidth)
    n = x.shape[-2]
    if not unbiased:
        return (_centred(k) * _centred(l)).sum((-2, -1)) / (n - 1) ** 2
    eye = torch.eye(n, dtype=torch.bool, device=x.device)
    k, l = k.masked_fill(eye, 0.0), l.masked_fill(eye, 0.0)
    rows_k, rows_l = k.sum(-1), l.sum(-1)
    both = (k * l).sum((-2, -1))
    sums = rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2))
    return (both + sums - 2.0 / (n - 2) * (rows_k * rows_l).sum(-1)) / (n * (n - 3))


def cka(x: Tensor, y: Tensor, kernel: Kernel = "linear", bandwidth: float = 1.0, unbiased: bool = False) -> Tensor:
    r"""Centred kernel alignment: :math:`\mathrm{HSIC}(x, y) / \sqrt{\mathrm{HSIC}(x, x)\, \mathrm{HSIC}(y, y)}`.

    Arguments as for :func:`hsic`.

    Raises:
        BadValue: too few points, points that are all the same.

    Source: Kornblith et al., *Similarity of neural network representations revisited*, 2019 (eqs. 3 to 5).

    Examples:
        >>> x = torch.randn(9, 4)
        >>> torch.allclose(cka(x, 3 * x @ torch.linalg.qr(torch.randn(4, 4)).Q + 1), torch.ones(()), atol=1e-5)
        True
    """
    given = (kernel, bandwidth, unbiased)
    return _aligned(hsic(x, y, *given), hsic(x, x, *given), hsic(y, y, *given))


def canonical_correlations(moments: Moments, variance: float | None = None) -> tuple[Tensor, Tensor]:
    r"""The canonical correlations of two blocks, and the projection weight of each.

    :math:`\rho` are the singular values of :math:`S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2}`, within the ranges of both. The
    weight of a direction is how much of the first block it accounts for, :math:`\sum_j \lvert \langle h_i, x_j \rangle
    \rvert`; weights sum to one.

    Args:
        moments: of both blocks, ``[..., F]`` and ``[..., K]``.
        variance: keep the principal axes that explain this share of each block's variance first (SVCCA); None: all.

    Returns:
        ``[..., m]`` each, largest first; where a set has fewer the rest is zero.
    """
    _, cross, label = moments.labels
    white_x, white_y = _whitened(moments.scatter, variance), _whitened(label, variance)
    u, rho, _ = torch.linalg.svd(white_x.mT @ cross @ white_y, full_matrices=False)
    directions = moments.scatter @ (white_x @ u)  # <h_i, x_j> for unit h_i
    weight = directions.abs().sum(-2)
    weight = torch.where(rho > 1e-12, weight, 0.0)
    return rho.clamp(max=1.0), weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)


class Pairing:
    """What a stage that compares entries is besides: :class:`CKA`, :class:`CCA` and the others.

    ======  =====================================  ==========================================
    reads   ``a``, ``b``                           ``[*B, F]`` each; ``within``: ``[*B, N, F]``
    writes  ``("metric", name)``                   ``[*B]``; with lists ``[*B, A, B]``
    ======  =====================================  ==========================================

    A list on either side compares each of ``a`` with each of ``b``.
    """

    a: list[NestedKey]
    b: list[NestedKey]
    several: bool
    in_keys: list[NestedKey]
    written: list[NestedKey]
    each_row: Callable[[TensorDictBase, Tensor], Tensor]
    points: Callable[[TensorDictBase, NestedKey], Tensor]

    def pair(
        self,
        a: NestedKey | list[NestedKey],
        b: NestedKey | list[NestedKey] | None,
        within: bool,
        *out_keys: NestedKey,
    ) -> None:
        """Begin the stage with these entries."""
        ones, others = as_keys(a), as_keys(a if b is None else b)
        SetStage.__init__(self, list(dict.fromkeys([*ones, *others])), list(out_keys), within)  # type: ignore[arg-type]
        self.a, self.b = ones, others
        self.several = isinstance(a, list) or isinstance(b, list)

    def table(self, td: TensorDictBase, found: dict[tuple[NestedKey, NestedKey], Tensor]) -> Tensor:
        """The numbers of all pairs: ``[...]``, or ``[..., A, B]`` with lists."""
        rows = [torch.stack([found[a, b] for b in self.b], -1) for a in self.a]
        table = torch.stack(rows, -2)
        return self.each_row(td, table if self.several else table[..., 0, 0])

    def sets(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """The points of each entry."""
        sets = {key: self.points(td, key) for key in self.in_keys}
        counts = {x.shape[-2] for x in sets.values()}
        if len(counts) > 1:
            got = {key: list(x.shape) for key, x in sets.items()}
            raise BadValue("the sets have different numbers of points", got=got, needed="the same points in each entry")
        return sets


class CKA(Pairing, SetStage):
    r"""Centred kernel alignment of entries: 1 for what is equal up to rotation and scale, 0 for what is independent.

    ======  =====================================  ==========================================
    reads   ``a``, ``b``                           ``[*B, F]`` each; ``within``: ``[*B, N, F]``
    writes  ``("metric", "cka")``                  ``[*B]``; with lists ``[*B, A, B]``
    ======  =====================================  ==========================================

    Called on a batch it compares over that batch. :meth:`over` compares over data that doesn't fit: exactly for the
    linear, biased form (by the cross-covariances), else by the unbiased minibatch estimator.

    Args:
        a: an entry, or a list of them.
        b: the entry, or the entries, to compare with; default: ``a``.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: of the rbf kernel, as a share of the median distance; 1 by default.
        unbiased: the unbiased estimate of HSIC, which does not rise with the number of features.
        within: whether each row holds a set of its own.
        out_key: what is written.

    Raises:
        BadValue: too few points, an entry that is constant, values that are not finite.

    Source: Kornblith et al. 2019; Nguyen et al., *Do wide and deep networks learn the same things?*, 2021 (eqs. 2 and
    3, minibatches).

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        >>> td = CKA("x", "y")(TensorDict(x=x, y=2 * x.flip(-1), batch_size=[20]))
        >>> round(float(td["metric", "cka"][0]), 4)
        1.0
    """

    def __init__(
        self,
        a: NestedKey | list[NestedKey],
        b: NestedKey | list[NestedKey] | None = None,
        kernel: Kernel = "linear",
        bandwidth: float = 1.0,
        unbiased: bool = False,
        within: bool = False,
        out_key: NestedKey = (METRIC, "cka"),
    ) -> None:
        self.pair(a, b, within, as_key(out_key))
        if kernel not in ("linear", "rbf") or not bandwidth > 0:
            got = f"kernel={kernel!r}, bandwidth={bandwidth}"
            raise BadValue("no such kernel", got=got, needed='"linear" or "rbf", a bandwidth above 0')
        self.kernel: Kernel = kernel
        self.bandwidth, self.unbiased = float(bandwidth), unbiased

    def measure(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """CKA over the batch, or within each row."""
        sets = self.sets(td)
        return {self.written[0]: self.table(td, self._aligned(self._independence(sets)))}

    def over(self, data: Data) -> Tensor:
        """CKA over all the data, ``[]`` or ``[A, B]``: exact, or the mean of minibatches' unbiased HSIC.

        Raises:
            BadType: the stage looks within rows.
        """
        if self.within:
            raise BadType("sets within rows fit", got="within=True", needed="a call for each TensorDict")
        if self.kernel == "linear" and not self.unbiased:
            crossed: dict[tuple[NestedKey, NestedKey], Moments] = {}
            for td in batches(data):
                sets = self.sets(td)
                for pair in self._pairs():
                    part = Moments.of(sets[pair[0]], sets[pair[1]])
                    crossed[pair] = merged([*([crossed[pair]] if pair in crossed else []), part])
            found = {pair: m.labels[1].square().sum((-2, -1)) for pair, m in crossed.items()}
        else:
            totals: dict[tuple[NestedKey, NestedKey], Tensor] = {}
            for td in batches(data):
                here = self._independence(self.sets(td), unbiased=True)
                totals = {pair: totals[pair] + value if totals else value for pair, value in here.items()}
            found = totals
        if not found:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        table = torch.stack([torch.stack([self._aligned(found)[a, b] for b in self.b]) for a in self.a])
        return table if self.several else table[0, 0]

    def _pairs(self) -> list[tuple[NestedKey, NestedKey]]:
        return list(dict.fromkeys([*((a, b) for a in self.a for b in self.b), *((k, k) for k in self.in_keys)]))

    def _independence(
        self, sets: dict[NestedKey, Tensor], unbiased: bool | None = None
    ) -> dict[tuple[NestedKey, NestedKey], Tensor]:
        how = (self.kernel, self.bandwidth, self.unbiased if unbiased is None else unbiased)
        return {(a, b): hsic(sets[a], sets[b], *how) for a, b in self._pairs()}

    def _aligned(self, found: dict[tuple[NestedKey, NestedKey], Tensor]) -> dict[tuple[NestedKey, NestedKey], Tensor]:
        return {(a, b): _aligned(found[a, b], found[a, a], found[b, b]) for a in self.a for b in self.b}


class CCA(Pairing, SetStage):
    r"""Canonical correlation of entries: the mean of :math:`\rho_i`, blind to any invertible linear map.

    ======  =====================================  ==========================================
    reads   ``a``, ``b``                           ``[*B, F]`` each; ``within``: ``[*B, N, F]``
    writes  ``("metric", "cca")``                  ``[*B]``; with lists ``[*B, A, B]``
    ======  =====================================  ==========================================

    Args:
        a: an entry, or a list of them.
        b: the entry, or the entries, to compare with; default: ``a``.
        variance: first keep the principal axes that explain this share of the variance (SVCCA, 0.99 there).
        weighting: ``"mean"`` over the smaller number of axes, or ``"projection"``, each by how much of ``a`` it
            accounts for (PWCCA).
        within: whether each row holds a set of its own.
        out_key: what is written.

    Raises:
        BadValue: fewer points than features (every correlation would be 1), an entry that is constant.

    Source: Hotelling 1936; Raghu et al., *SVCCA*, 2017; Morcos et al., *Insights on representational similarity with
    canonical correlation*, 2018 (eq. 2).

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> td = TensorDict(x=x, y=x @ torch.tensor([[1.0, 2, 0], [0, 1, 5], [0, 0, 1]]).double(), batch_size=[40])
        >>> round(float(CCA("x", "y")(td)["metric", "cca"][0]), 4)
        1.0
    """

    def __init__(
        self,
        a: NestedKey | list[NestedKey],
        b: NestedKey | list[NestedKey] | None = None,
        variance: float | None = None,
        weighting: Literal["mean", "projection"] = "mean",
        within: bool = False,
        out_key: NestedKey = (METRIC, "cca"),
    ) -> None:
        self.pair(a, b, within, as_key(out_key))
        if variance is not None and not 0.0 < variance <= 1.0:
            raise BadValue("variance is out of range", got=variance, needed="a share in (0, 1], or None")
        if weighting not in ("mean", "projection"):
            raise BadValue("no such weighting", got=repr(weighting), needed='"mean" or "projection"')
        self.variance, self.weighting = variance, weighting

    def measure(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Over the batch, or within each row."""
        sets = self.sets(td)
        found = {(a, b): self._one(Moments.of(sets[a], sets[b])) for a in self.a for b in self.b}
        return {self.written[0]: self.table(td, found)}

    def over(self, data: Data) -> Tensor:
        """Over all of a stream, exactly: ``[]`` or ``[A, B]``."""
        crossed: dict[tuple[NestedKey, NestedKey], Moments] = {}
        for td in batches(data):
            sets = self.sets(td)
            for a in self.a:
                for b in self.b:
                    part = Moments.of(sets[a], sets[b])
                    crossed[a, b] = merged([*([crossed[a, b]] if (a, b) in crossed else []), part])
        if not crossed:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        table = torch.stack([torch.stack([self._one(crossed[a, b]) for b in self.b]) for a in self.a])
        return table if self.several else table[0, 0]

    def _one(self, m: Moments) -> Tensor:
        label_mean, _, label_scatter = m.labels
        width = max(m.mean.shape[-1], label_mean.shape[-1])
        if self.variance is None and m.count <= width:
            raise BadValue(
                "too few points for canonical correlations: they would all be 1",
                got=f"{m.count} points of {width} features",
                needed="more points than features, several times as many to be worth something",
                fix="variance=0.99 (SVCCA), or CKA",
            )
        rho, weight = canonical_correlations(m, self.variance)
        if self.weighting == "projection":
            return (rho * weight).sum(-1)
        axes = [_kept(block, self.variance).sum(-1) for block in (m.scatter, label_scatter)]
        return rho.sum(-1) / torch.minimum(*axes)


def SVCCA(  # noqa: N802 (a constructor, under its name in the papers)
    a: NestedKey | list[NestedKey], b: NestedKey | list[NestedKey] | None = None, variance: float = 0.99
) -> CCA:
    """``CCA(a, b, variance=0.99, out_key=("metric", "svcca"))``: canonical correlation of the principal axes.

    Args:
        a, b: entries, one or a list, as for :class:`CCA`.
        variance: the share of each entry's variance that its kept principal axes explain.

    Source: Raghu et al. 2017.

    Examples:
        >>> SVCCA("x", "y").out_keys
        [('metric', 'svcca')]
    """
    return CCA(a, b, variance=variance, out_key=(METRIC, "svcca"))


def _gram(x: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    x = x - x.mean(-2, keepdim=True)
    products = x @ x.mT
    if kernel == "linear":
        return products
    length = products.diagonal(dim1=-2, dim2=-1)
    square = (length.unsqueeze(-1) + length.unsqueeze(-2) - 2 * products).clamp(min=0.0)
    n = x.shape[-2]
    one, other = torch.triu_indices(n, n, 1, device=x.device)
    median = square[..., one, other].median(-1).values
    if not bool((median > 0).all()):
        raise BadValue("an entry is constant", got="a median distance of zero", needed="points that differ")
    return (-square / (2 * bandwidth**2 * median[..., None, None])).exp()


def _centred(k: Tensor) -> Tensor:
    k = k - k.mean(-1, keepdim=True)
    return k - k.mean(-2, keepdim=True)


def _aligned(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    if not bool((xx > 0).all() and (yy > 0).all()):
        raise BadValue(
            "an entry is constant, or too small a sample for the unbiased form",
            got="a self-similarity that is not above zero",
            needed="points that differ",
            fix="more points, or unbiased=False",
        )
    return xy / (xx * yy).sqrt()


def _kept(scatter: Tensor, variance: float | None) -> Tensor:
    """Which eigenvalues (ascending) count: those that are not zero, or the fewest that explain the share."""
    values = torch.linalg.eigvalsh(scatter).clamp(min=0.0)
    return _keep(values, variance)


def _keep(values: Tensor, variance: float | None) -> Tensor:
    largest = values[..., -1:]
    if not bool((largest > 0).all()):
        raise BadValue("an entry is constant", got="no variance", needed="points that differ")
    kept = values > largest * values.shape[-1] * torch.finfo(values.dtype).eps
    if variance is None:
        return kept
    below = values.cumsum(-1) - values  # what the smaller ones explain
    return kept & (values + below > (1.0 - variance) * values.sum(-1, keepdim=True) * (1 + 1e-12))


def _whitened(scatter: Tensor, variance: float | None) -> Tensor:
    values, axes = torch.linalg.eigh(scatter)
    values = values.clamp(min=0.0)
    kept = _keep(values, variance)
    return axes * torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0).unsqueeze(-2)
