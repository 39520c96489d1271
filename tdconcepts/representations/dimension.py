"""Intrinsic dimension: by ratios of distances to neighbours, and by the spectra of neighbourhoods."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, as_key, as_keys, join
from tdconcepts.representations.sets import SetStage, check_count, nearest, neighbours, offsets
from tdconcepts.representations.spectra import count_large, spectra

__all__ = ["CAPCA", "LocalKNN", "LocalPCA", "TwoNN", "ca_pca", "local_knn", "local_pca", "two_nn"]

_EXACT = 1e-10  # an eigenvalue below this share of the largest is none


def two_nn(x: Tensor, discard: float = 0.1, blocks: int = 1) -> Tensor:
    r"""The slope of :math:`-\log(1 - i / N)` over :math:`\log \mu_i`, :math:`\mu = r_2 / r_1`, through the origin.

    Args:
        x: sets of points ``[..., N, F]``.
        discard: the share of points with the largest :math:`\mu` that is left out, in [0, 1).
        blocks: deal the points in turn into so many sets (what is left over is left out), and average: with fewer
            points neighbours are farther apart.

    Returns:
        ``[...]``.

    Raises:
        BadValue: fewer than three points; only duplicates.
    """
    check_count(x, 3, "TwoNN")
    if not 0.0 <= discard < 1.0:
        raise BadValue("discard is out of range", got=discard, needed="a share in [0, 1)")
    if blocks > 1:
        each = x.shape[-2] // blocks
        return two_nn(x[..., : each * blocks, :].unflatten(-2, (each, blocks)).transpose(-3, -2), discard).mean(-1)
    far, _ = neighbours(x, 2)
    first, second = far.unbind(-1)
    counts = first > 0  # a duplicate says nothing of the dimension
    mu = torch.where(counts, second.log() - torch.where(counts, first, 1.0).log(), torch.inf).sort(-1).values
    n = counts.sum(-1, keepdim=True)
    _check_spread(n - 1)
    kept = ((1.0 - discard) * n).floor().clamp(min=1).minimum((n - 1).clamp(min=1))  # -log(1 - N/N) is infinite
    place = torch.arange(1, mu.shape[-1] + 1, device=x.device, dtype=mu.dtype)
    used = place <= kept
    mu = torch.where(used, mu, 0.0)
    height = torch.where(used, -torch.log1p(-torch.where(used, place / n.clamp(min=2), 0.0)), 0.0)
    square = mu.square().sum(-1)
    _check_spread(square)
    return (mu * height).sum(-1) / square


def local_knn(x: Tensor, k: int = 20, average: bool = False) -> Tensor:
    r"""Maximum likelihood at each point: :math:`\hat d = \big[\frac{1}{k - 1} \sum_{j < k} \log (r_k / r_j)\big]^{-1}`.

    Args:
        x: sets of points ``[..., N, F]``.
        k: neighbours, 2 or more.
        average: one number for each set: the inverse of the mean of inverses (MacKay's correction).

    Returns:
        ``[..., N]``, or ``[...]``.

    Raises:
        BadValue: too few points; points with k duplicates.
    """
    _check_k(k, 2)
    check_count(x, k + 1, f"{k} neighbours")
    far, _ = neighbours(x, k)
    inverse = _apart(far)
    _check_spread(inverse)
    return 1.0 / inverse.mean(-1) if average else 1.0 / inverse


def local_pca(x: Tensor, k: int = 20, criterion: Literal["ratio", "maxgap"] = "ratio", alpha: float = 0.05) -> Tensor:
    r"""How many eigenvalues of each neighbourhood's covariance matter.

    ``"ratio"``: those of at least ``alpha`` times the largest. ``"maxgap"``: those before the largest ratio of one to
    the next; what is zero because there are fewer neighbours than features is no gap.

    Args:
        x: sets of points ``[..., N, F]``.
        k: neighbours, with which a point makes k + 1.
        criterion: see above.
        alpha: for ``"ratio"``, in (0, 1).

    Returns:
        ``[..., N]``.

    Raises:
        BadValue: too few points; neighbourhoods of duplicates.
    """
    _check_k(k, 2)
    if criterion not in ("ratio", "maxgap") or not 0.0 < alpha < 1.0:
        got = f"criterion={criterion!r}, alpha={alpha}"
        raise BadValue("not a criterion", got=got, needed='"ratio" or "maxgap", alpha in (0, 1)')
    check_count(x, k + 1, f"{k} neighbours")
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares are in range
    away = offsets(x, nearest(x, k))
    if criterion == "ratio":
        return count_large(away, alpha).to(x.dtype)
    values = spectra(away)
    real = values > _EXACT * values[..., :1]
    rank = real.sum(-1)
    ahead = torch.where(real[..., 1:], values[..., :-1] / torch.where(real[..., 1:], values[..., 1:], 1.0), 0.0)
    exact = rank < min(k, x.shape[-1])  # what follows is zero, and not for want of points
    best = ahead.argmax(-1) + 1 if ahead.shape[-1] else torch.ones_like(rank)
    return torch.where(exact, rank, best).to(values.dtype)


def ca_pca(x: Tensor, k: int = 20) -> Tensor:
    r"""The dimension whose quadratic patch fits the spectrum of each neighbourhood best.

    :math:`\hat d = \arg\min_d \big\lVert \frac{1}{d + 2} \mathbf 1_d - \lambda_{1..d} - c_d\, t_d \mathbf 1_d
    \big\rVert + 2 t_d`, where :math:`\lambda` are the eigenvalues of the covariance over :math:`r^2`, :math:`t_d =
    \sum_{j > d} \lambda_j` is what curvature puts across the patch, :math:`c_d = \frac{3 d + 4}{d (d + 4)}`, and
    :math:`r` lies midway between the k-th and the next neighbour.

    Why: take the graph of quadratic forms, :math:`x \mapsto (x, x^T B_1 x, x^T B_2 x, \dots)`, in a ball of radius 1.
    To second order in B, with :math:`F = \sum_m \lVert B_m \rVert_F^2` and :math:`T = \sum_m (\mathrm{tr}\, B_m)^2`,

    .. math:: \frac1d \sum_{i \le d} \lambda_i = \frac{1}{d + 2} - \frac{2 d F + (d + 4) T}{d (d + 2)^2 (d + 4)},
              \qquad t_d = \frac{2 (d + 2) F - 2 T}{(d + 2)^2 (d + 4)}.

    What is missing along the patch, over what is across it, depends on the shape: :math:`\frac{1}{d + 2}` for a saddle
    (T = 0), :math:`\frac{3 d + 4}{2 d (d + 1)}` where it bends in one direction (T = F), :math:`\frac{d + 6}{4}` for a
    sphere (T = d F). The paper's :math:`c_d` lies between them; it is that of one direction for surfaces.

    Args:
        x: sets of points ``[..., N, F]``.
        k: neighbours, 2 or more.

    Returns:
        ``[..., N]``.

    Raises:
        BadValue: too few points; neighbourhoods of duplicates.
    """
    _check_k(k, 2)
    check_count(x, k + 2, f"{k} neighbours and the next")
    far, place = neighbours(x, k + 1)
    radius = 0.5 * (far[..., -2] + far[..., -1])
    values = spectra(offsets(x, place[..., :k])) / radius.square().unsqueeze(-1)
    d = torch.arange(1, values.shape[-1] + 1, device=x.device, dtype=values.dtype)
    tail = (values.sum(-1, keepdim=True) - values.cumsum(-1)).clamp(min=0.0)  # t_d
    shift = 1.0 / (d + 2) - (3 * d + 4) / (d * (d + 4)) * tail
    # sum over i <= d of (shift_d - lambda_i)^2
    misfit = d * shift.square() - 2 * shift * values.cumsum(-1) + values.square().cumsum(-1)
    return (misfit.clamp(min=0.0).sqrt() + 2 * tail).argmin(-1).to(values.dtype) + 1


class TwoNN(SetStage):
    r"""The dimension of a set by the ratio of the distances to the two nearest neighbours; see :func:`two_nn`.

    ======  =======================  ===================================
    reads   ``keys``                 ``[*B, F]``; ``within``: ``[*B, N, F]``
    writes  ``("dimension", *key)``  ``[*B]``, the number of the set
    ======  =======================  ===================================

    It looks at the smallest scale that there is, which is that of the noise where noise is as far as neighbours are. A
    number that falls as ``blocks`` rises (and neighbours are farther apart) is such; take it where it stays the same,
    with two hundred points in each block or so.

    Args:
        keys: an entry, or a list of them.
        discard: the share of points with the largest ratio that is left out.
        blocks: into how many sets the points are dealt, whose numbers are averaged.
        within: whether each row holds a set of its own.
        out_key: the first name of what is written.

    Raises:
        BadValue: fewer than three points, only duplicates, values that are not finite.

    Source: Facco et al., *Estimating the intrinsic dimension of datasets by a minimal neighborhood information*, 2017.

    Examples:
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 9)
        >>> round(float(TwoNN("x")(TensorDict(x=plane, batch_size=[500]))["dimension", "x"][0]))
        2
    """

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        discard: float = 0.1,
        blocks: int = 1,
        within: bool = False,
        out_key: NestedKey = "dimension",
    ) -> None:
        super().__init__(keys, _written(keys, out_key), within)
        if not 0.0 <= discard < 1.0:
            raise BadValue("discard is out of range", got=discard, needed="a share in [0, 1)")
        if type(blocks) is not int or blocks < 1:
            raise BadValue("not a number of blocks", got=f"blocks={blocks!r}", needed="1 or more")
        self.discard, self.blocks = float(discard), blocks

    def number(self, x: Tensor) -> Tensor:
        """The dimension of each set."""
        return two_nn(x, self.discard, self.blocks)


class LocalKNN(SetStage):
    r"""The dimension at each point by maximum likelihood over its neighbours; see :func:`local_knn`.

    ======  =======================  ========================================================
    reads   ``keys``                 ``[*B, F]``; ``within``: ``[*B, N, F]``
    writes  ``("dimension", *key)``  ``[*B]``, of each point; ``within``: ``[*B, N]``;
                                     with ``average`` of each set: ``[*B]``
    ======  =======================  ========================================================

    Args:
        keys: an entry, or a list of them.
        k: neighbours that count, 2 or more.
        average: one number for each set, the inverse of the mean of inverses.
        within: whether each row holds a set of its own.
        out_key: the first name of what is written.

    Raises:
        BadValue: too few points, neighbourhoods of duplicates, values that are not finite.

    Source: Levina and Bickel, *Maximum likelihood estimation of intrinsic dimension*, 2004 (eq. 8); MacKay and
    Ghahramani, *Comments* on it, 2005.

    Examples:
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
        >>> round(float(LocalKNN("x", average=True)(TensorDict(x=plane, batch_size=[200]))["dimension", "x"][0]))
        2
    """

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        k: int = 20,
        average: bool = False,
        within: bool = False,
        out_key: NestedKey = "dimension",
    ) -> None:
        super().__init__(keys, _written(keys, out_key), within)
        _check_k(k, 2)
        self.k, self.average = k, average

    def number(self, x: Tensor) -> Tensor:
        """The dimension at each point, or of each set."""
        return local_knn(x, self.k, self.average)


class LocalPCA(SetStage):
    r"""The dimension at each point by the spectrum of its neighbourhood; see :func:`local_pca`.

    ======  =======================  ========================================================
    reads   ``keys``                 ``[*B, F]``; ``within``: ``[*B, N, F]``
    writes  ``("dimension", *key)``  ``[*B]``, of each point; ``within``: ``[*B, N]``;
                                     with ``average`` of each set: ``[*B]``
    ======  =======================  ========================================================

    Args:
        keys: an entry, or a list of them.
        k: neighbours that count, 2 or more.
        criterion: ``"ratio"`` (eigenvalues of at least ``alpha`` times the largest) or ``"maxgap"``.
        alpha: for ``"ratio"``, in (0, 1).
        average: one number for each set, the mean over its points.
        within: whether each row holds a set of its own.
        out_key: the first name of what is written.

    Raises:
        BadValue: too few points, neighbourhoods of duplicates, values that are not finite.

    Source: Fukunaga and Olsen, *An algorithm for finding intrinsic dimensionality of data*, 1971.

    Examples:
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
        >>> int(LocalPCA("x")(TensorDict(x=plane, batch_size=[200]))["dimension", "x"][0])
        2
    """

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        k: int = 20,
        criterion: Literal["ratio", "maxgap"] = "ratio",
        alpha: float = 0.05,
        average: bool = False,
        within: bool = False,
        out_key: NestedKey = "dimension",
    ) -> None:
        super().__init__(keys, _written(keys, out_key), within)
        _check_k(k, 2)
        self.k, self.average = k, average
        if criterion not in ("ratio", "maxgap") or not 0.0 < alpha < 1.0:
            got = f"criterion={criterion!r}, alpha={alpha}"
            raise BadValue("not a criterion", got=got, needed='"ratio" or "maxgap", alpha in (0, 1)')
        self.criterion, self.alpha = criterion, float(alpha)

    def number(self, x: Tensor) -> Tensor:
        """The dimension at each point, or of each set."""
        found = local_pca(x, self.k, self.criterion, self.alpha)
        return found.mean(-1) if self.average else found


class CAPCA(SetStage):
    r"""The dimension at each point by its neighbourhood's spectrum, adjusted for curvature; see :func:`ca_pca`.

    ======  =======================  ========================================================
    reads   ``keys``                 ``[*B, F]``; ``within``: ``[*B, N, F]``
    writes  ``("dimension", *key)``  ``[*B]``, of each point; ``within``: ``[*B, N]``;
                                     with ``average`` of each set: ``[*B]``
    ======  =======================  ========================================================

    Args:
        keys: an entry, or a list of them.
        k: neighbours that count, 2 or more.
        average: one number for each set, the mean over its points. Few points at the edge of the set count far too
            much; the median of all is not moved by them.
        within: whether each row holds a set of its own.
        out_key: the first name of what is written.

    Raises:
        BadValue: too few points, neighbourhoods of duplicates, values that are not finite.

    Source: Gilbert and O'Neill, *CA-PCA: manifold dimension estimation, adapted for curvature*, 2023.

    Examples:
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
        >>> int(CAPCA("x")(TensorDict(x=plane, batch_size=[200]))["dimension", "x"].median())
        2
    """

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        k: int = 20,
        average: bool = False,
        within: bool = False,
        out_key: NestedKey = "dimension",
    ) -> None:
        super().__init__(keys, _written(keys, out_key), within)
        _check_k(k, 2)
        self.k, self.average = k, average

    def number(self, x: Tensor) -> Tensor:
        """The dimension at each point, or of each set."""
        found = ca_pca(x, self.k)
        return found.mean(-1) if self.average else found


def _written(keys: NestedKey | list[NestedKey], out_key: NestedKey) -> list[NestedKey]:
    return [as_key(join(out_key, key)) for key in as_keys(keys)]


def _apart(far: Tensor) -> Tensor:
    """The mean of logarithms over the neighbours that are no duplicates of a point."""
    real = (far[..., :-1] > 0) & (far[..., -1:] > 0)
    last = far[..., -1:].clamp(min=torch.finfo(far.dtype).tiny).log()
    logs = torch.where(real, last - torch.where(real, far[..., :-1], 1.0).log(), 0.0)
    return logs.sum(-1) / real.sum(-1).clamp(min=1)


def _check_k(k: int, least: int) -> None:
    if type(k) is not int or k < least:
        raise BadValue("not a number of neighbours", got=f"k={k!r}", needed=f"an int of {least} or more")


def _check_spread(value: Tensor) -> None:
    if not bool((value > 0).all()):
        raise BadValue(
            "the distances to the neighbours are all the same",
            got="duplicates, a constant entry, or a regular grid",
            needed="points that differ",
            fix="remove duplicates, or raise k",
        )
