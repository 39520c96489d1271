"""Relative attributing propagation: positive and negative relevance, each redistributed by absolute contributions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.affine import Affine, affine

__all__ = ["RAPRule"]


@dataclasses.dataclass(frozen=True)
class RAPRule(Rule):
    r"""RAP of a hidden layer, for relevance that says how important an input is, whatever its sign.

    For each half :math:`h` of the input (:math:`x^+` with :math:`P = M^+, N = -M^-`; :math:`x^-` with
    :math:`P = -M^+, N = M^-`), :math:`p = Ph`, :math:`n = Nh`, where :math:`R \ne 0`:

    .. math:: r = h \odot [P^T \tfrac{R^+}{p} + N^T(\tfrac{n}{p+n}\tfrac{R^+}{n}) + N^T\tfrac{R^-}{n}
                           + N^T(\tfrac{n}{p+n}\tfrac{R^-}{n})]

    with :math:`a/0 = 0`; then :math:`r` is shifted on its non-zero entries, for each row, to the sum of :math:`R`, and
    the halves are added. The bias is ignored. For an input of both signs the sum is :math:`2R`: each half is shifted to
    all of it. ``convention="relevance"`` is the only form.

    Args:
        single: shift each half to its part of :math:`R` (in proportion to what it has received), so that the sum is
            :math:`R` also for an input of both signs.

    Raises:
        BadValue: at the call, for what is no linear layer or convolution.

    Source: Nam et al., *Relative attributing propagation*, 2020, eqs. 5 to 9.

    Examples:
        >>> layer, x = torch.nn.Linear(3, 2), torch.rand(1, 3, requires_grad=True)
        >>> with RAPRule().on(layer) as m:
        ...     torch.autograd.grad(m(x), x, torch.ones(1, 2))[0].sum().round(decimals=4)
        tensor(2.)
    """

    single: bool = False
    forms: ClassVar[Any] = ("relevance",)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        view = affine(call, self)
        return backward_by(functools.partial(_rap, self.single, view), call.output, [view.x])


def _rap(single: bool, view: Affine, flow: Tensor, x: Tensor) -> tuple[Tensor]:
    plus, minus = view.weight.clamp(min=0), view.weight.clamp(max=0)
    halves = [
        _half(view, flow, half, toward, away)
        for half, toward, away in ((x.clamp(min=0), plus, -minus), (x.clamp(max=0), -plus, minus))
    ]
    sums = functools.partial(_row_sums, view.batched)
    total = sums(flow)
    sizes = [sums(half.abs()) for half in halves]
    shifted = []
    for half, size in zip(halves, sizes, strict=True):
        wanted = total * _over(size, sizes[0] + sizes[1]) if single else total
        there = (half != 0).to(half.dtype)
        shifted.append(half - there * _over(sums(half) - wanted, sums(there)))
    return (shifted[0] + shifted[1],)


def _half(view: Affine, flow: Tensor, half: Tensor, toward: Tensor, away: Tensor) -> Tensor:
    there = flow != 0
    p = torch.where(there, view.push(half, toward), 0.0)
    n = torch.where(there, view.push(half, away), 0.0)
    up, down = flow.clamp(min=0), flow.clamp(max=0)
    share = _over(n, p + n)
    against = _over(up * share, n) + _over(down, n) + _over(down * share, n)
    return half * (view.pull(_over(up, p), toward, half) + view.pull(against, away, half))


def _row_sums(batched: bool, value: Tensor) -> Tensor:
    return value.sum(tuple(range(1, value.ndim)), keepdim=True) if batched and value.ndim > 1 else value.sum()


def _over(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
