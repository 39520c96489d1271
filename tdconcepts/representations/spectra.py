"""The spectra of neighbourhoods: what the covariance of each point and its neighbours looks like."""

from __future__ import annotations

import torch
from torch import Tensor

from tdconcepts.errors import BadValue

__all__ = ["count_large", "spectra"]

_ROUNDING = 1e-6  # of float32: the error of an eigenvalue per vector and largest eigenvalue, not exceeded by far
_LEAST = 1e-30  # too small for float32, whose squares vanish


def spectra(d: Tensor) -> Tensor:
    """The eigenvalues of each neighbourhood's covariance, largest first: ``[..., N, F]``, or k where that is less.

    Args:
        d: what leads from each point to its k neighbours, ``[..., N, k, F]``.

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
        d: what leads from each point to its k neighbours, ``[..., N, k, F]``.
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
    r"""The squares of the k + 1 points about their mean are :math:`D^T D - s s^T / (k + 1)`, with the sum s of offsets.

    Those of :math:`(1 - c\, 1 1^T) D` are the same for :math:`c = (1 - (k + 1)^{-1/2}) / k`, and its products the other
    way round have the same eigenvalues but for zeros.
    """
    k, width = d.shape[-2:]
    if width < k:
        s = d.sum(-2)
        products = (d.mT @ d).sub_(s.unsqueeze(-1) * (s / (k + 1)).unsqueeze(-2))
    else:
        products, c = d @ d.mT, (1.0 - (k + 1) ** -0.5) / k
        s = products.sum(-1)
        s = c * s - 0.5 * c * c * s.sum(-1, keepdim=True)
        products.sub_(s.unsqueeze(-1)).sub_(s.unsqueeze(-2))
    return torch.linalg.eigvalsh(products).flip(-1).clamp_(min=0.0).div_(k)
