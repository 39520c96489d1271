"""The spectra of neighbourhoods: what the covariance of each point and its neighbours looks like."""

from __future__ import annotations

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.representations.sets import offsets

__all__ = ["count_large", "deviations", "spectra"]

_ROUNDING = 1e-6  # of float32: the error of an eigenvalue per vector and largest eigenvalue, not exceeded by far
_LEAST = 1e-30  # too small for float32, whose squares vanish


def deviations(x: Tensor, place: Tensor) -> Tensor:
    r"""Vectors whose products are those of each point and its k neighbours about their mean: ``[..., N, k, F]``.

    With the offsets from the point itself, :math:`d_j`, and their sum s, the squares about the mean of the k + 1 points
    are :math:`\sum_j d_j d_j^T - s s^T / (k + 1)`: those of :math:`d_j - c s` for :math:`c = (1 - (k + 1)^{-1/2}) / k`.
    """
    d = offsets(x, place)
    k = d.shape[-2]
    return d.sub_(d.sum(-2, keepdim=True).mul_((1.0 - (k + 1) ** -0.5) / k))


def spectra(d: Tensor) -> Tensor:
    """The eigenvalues of each neighbourhood's covariance, largest first: ``[..., N, F]``, or k where that is less.

    Args:
        d: see :func:`deviations`.

    Raises:
        BadValue: neighbourhoods of duplicates.
    """
    values = _eigenvalues(d)
    if not bool((values[..., 0] > 0).all()):
        raise BadValue(
            "a neighbourhood is one point",
            got=f"{int((values[..., 0] <= 0).sum())} points whose neighbours are all duplicates",
            needed="points that differ",
            fix="remove duplicates, constant entries among them, or raise k",
        )
    return values


def count_large(d: Tensor, alpha: float) -> Tensor:
    """How many of a neighbourhood's eigenvalues are at least ``alpha`` times the largest: ``[..., N]``.

    It is what :func:`spectra` says, in less time: float32 decides, and float64 where float32 can't be sure.

    Args:
        d: see :func:`deviations`.
        alpha: a share, in (0, 1).

    Raises:
        BadValue: neighbourhoods of duplicates.
    """
    values = _eigenvalues(d.float())
    bound = alpha * values[..., :1]
    unsure = ~(((values - bound).abs() > d.shape[-2] * _ROUNDING * values[..., :1]).all(-1) & (values[..., 0] > _LEAST))
    count = (values >= bound).sum(-1)
    if bool(unsure.any()):
        values = spectra(d[unsure])
        count[unsure] = (values >= alpha * values[..., :1]).sum(-1)
    return count


def _eigenvalues(d: Tensor) -> Tensor:
    k, width = d.shape[-2:]
    gram = d.mT @ d if width < k else d @ d.mT  # both have the same eigenvalues but for zeros
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_(min=0.0).div_(k)
