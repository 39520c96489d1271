"""Streaming statistics: means, scatter and normal equations of data that doesn't fit, exact, and mergeable."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from tdconcepts.errors import BadType, BadValue

__all__ = ["Moments", "merged", "solve_ridge"]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    r"""The count, means and centred second moments of rows: all that linear methods need of the data.

    :math:`n`, :math:`\bar x`, :math:`S_{xx} = \sum (x - \bar x)(x - \bar x)^T`, and with a second block the same of
    ``y`` and :math:`S_{xy}`. Two of them add up to those of all rows (exact in any order but for rounding), so parts of
    the data, and workers, can be merged. Leading dims are stacks of problems, such as sites of one width.

    Args:
        count: rows, n.
        mean: ``[*S, F]``.
        scatter: ``[*S, F, F]``.
        label_mean: ``[*S, K]``, or None without a second block.
        cross: ``[*S, F, K]``.
        label_scatter: ``[*S, K, K]``.

    Raises:
        BadValue: blocks whose shapes don't fit, from :meth:`of` and ``+``.

    Source: Chan, Golub and LeVeque, *Algorithms for computing the sample variance*, 1983 (eq. 2.1); Welford 1962.

    Examples:
        >>> x = torch.arange(12.0).view(6, 2) ** 2
        >>> parts = Moments.of(x[:2]) + Moments.of(x[2:])
        >>> parts.count, torch.allclose(parts.covariance(), x.T.double().cov())
        (6, True)
    """

    count: int
    mean: Tensor
    scatter: Tensor
    label_mean: Tensor | None = None
    cross: Tensor | None = None
    label_scatter: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None = None) -> Moments:
        """The moments of rows ``x`` ``[*S, N, F]`` and ``y`` ``[*S, N, K]`` or ``[N, K]``, in float64."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise BadType("not rows of features", got=getattr(x, "dtype", type(x).__name__), needed="a float tensor")
        if x.ndim < 2 or (y is not None and (y.ndim < 2 or y.shape[-2] != x.shape[-2])):
            got = f"x {list(x.shape)}" + ("" if y is None else f", y {list(y.shape)}")
            raise BadValue("the rows don't fit", got=got, needed="x [*S, N, F] and y [*S, N, K] or [N, K]")
        x = x.detach().double()
        count = x.shape[-2]
        mean = x.mean(-2) if count else x.new_zeros(*x.shape[:-2], x.shape[-1])
        x = x - mean.unsqueeze(-2)
        scatter = x.mT @ x
        if y is None:
            return cls(count, mean, scatter)
        y = y.detach().to(x)
        label_mean = y.mean(-2) if count else y.new_zeros(*y.shape[:-2], y.shape[-1])
        y = y - label_mean.unsqueeze(-2)
        return cls(count, mean, scatter, label_mean, x.mT @ y, y.mT @ y)

    @property
    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """``label_mean``, ``cross`` and ``label_scatter``, where there is a second block.

        Raises:
            BadValue: otherwise.
        """
        if self.label_mean is None or self.cross is None or self.label_scatter is None:
            raise BadValue("these moments have one block", got="x alone", needed="Moments.of(x, y)")
        return self.label_mean, self.cross, self.label_scatter

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape or (self.cross is None) != (other.cross is None):
            raise BadValue(
                "moments of different blocks don't add up",
                got=f"means of shape {list(self.mean.shape)} and {list(other.mean.shape)}",
                needed="the same features, with or without labels",
            )
        count = self.count + other.count
        share = other.count / max(count, 1)
        step = other.mean - self.mean
        weight = self.count * share
        mean = self.mean + share * step
        scatter = self.scatter + other.scatter + weight * _outer(step, step)
        if self.cross is None:
            return Moments(count, mean, scatter)
        (label_mean, cross, label_scatter), others = self.labels, other.labels
        label_step = others[0] - label_mean
        cross = cross + others[1] + weight * _outer(step, label_step)
        label_scatter = label_scatter + others[2] + weight * _outer(label_step, label_step)
        return Moments(count, mean, scatter, label_mean + share * label_step, cross, label_scatter)

    def covariance(self, correction: int = 1) -> Tensor:
        """``scatter / (n - correction)``, ``[*S, F, F]``."""
        if self.count <= correction:
            raise BadValue("too few rows for a covariance", got=f"{self.count} rows", needed=f"more than {correction}")
        return self.scatter / (self.count - correction)

    def principal(self, components: int | None = None) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues of the covariance ``[*S, k]`` and their axes ``[*S, F, k]``, largest first.

        The sign of an axis is chosen so that its largest element is positive.
        """
        values, axes = torch.linalg.eigh(self.covariance())
        values, axes = values.flip(-1).clamp(min=0.0)[..., :components], axes.flip(-1)[..., :components]
        largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
        return values, axes * torch.where(largest < 0, -1.0, 1.0)


def merged(parts: Iterable[Moments]) -> Moments:
    """The sum of several moments.

    Raises:
        BadValue: for none.

    Examples:
        >>> merged(Moments.of(part) for part in torch.ones(6, 2).split(2)).count
        6
    """
    parts = list(parts)
    if not parts:
        raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
    return functools.reduce(operator.add, parts)


def solve_ridge(scatter: Tensor, cross: Tensor, ridge: float) -> Tensor:
    r""":math:`(S_{xx} + \lambda I)^{-1} S_{xy}`, and the solution of least norm where that is singular.

    Args:
        scatter: ``[*S, F, F]``.
        cross: ``[*S, F, K]``.
        ridge: lambda, added to the *sum* of squares.

    Examples:
        >>> solve_ridge(torch.eye(2), torch.ones(2, 1), 1.0).flatten()
        tensor([0.5000, 0.5000])
    """
    damped = scatter + ridge * torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    regular = ridge > 0.0 or bool((pivots.amin(-1) > 1e-5 * pivots.amax(-1)).all())  # else what is zero is rounding
    if regular and not bool(failed.any()):
        return torch.cholesky_solve(cross, factor)
    squares, axes = torch.linalg.eigh(scatter)
    squares = squares.clamp(min=0.0) + ridge
    kept = squares > squares.amax(-1, keepdim=True) * scatter.shape[-1] * torch.finfo(scatter.dtype).eps
    scale = torch.where(kept, 1.0 / torch.where(kept, squares, 1.0), 0.0)
    return axes @ (scale.unsqueeze(-1) * (axes.mT @ cross))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)
