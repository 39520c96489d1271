"""Many regularised linear fits on the same rows, solved together."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadValue

__all__ = ["LinearFit", "linear_fit"]

MEMORY = 8  # pairs of the quasi-Newton method
SUFFICIENT = 1e-4  # of the decrease that the slope promises


class LinearFit(NamedTuple):
    """``weight [C, F]``, ``bias [C]``, the number of iterations, and the largest gradient of the mean loss left."""

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float


def linear_fit(
    x: Tensor,
    y: Tensor,
    ridge: float = 1.0,
    loss: Literal["logistic", "squares"] = "logistic",
    iterations: int = 200,
    tolerance: float = 1e-4,
) -> LinearFit:
    r"""For each column c: :math:`\min_{w, b} \sum_i m_{ic}\, L(w \cdot x_i + b, y_{ic}) + \frac{\lambda}{2} \|w\|^2`.

    L is :math:`\log(1 + e^s) - y s` (y is 0 or 1) or :math:`\frac{1}{2} (s - y)^2`; m is 0 where y is NaN. The
    curvature of the first is at most 1/4, that of the second at most 1: with
    :math:`H = \kappa \tilde X^T \tilde X + \lambda I = L L^T` (one factorisation for all columns) and :math:`v = L^T w`
    no direction curves by more than 1 (Boehning and Lindsay 1988). In these coordinates all columns take a
    limited-memory quasi-Newton step at once, with a Newton step along the direction; it costs one product of the rows
    with C vectors and one back. Least squares without missing labels is the solution of H itself.

    Args:
        x: rows ``[N, F]``, float32 or float64.
        y: ``[N, C]``, NaN where it is missing.
        ridge: :math:`\lambda`.
        loss: which L.
        iterations: at most.
        tolerance: on the largest entry of the gradient of the mean loss.

    Raises:
        BadValue: for a system that can't be solved (``ridge=0`` with fewer rows than features).

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> fit = linear_fit(x, 3 * x + 1, ridge=0.0, loss="squares")
        >>> round(fit.weight.item(), 3), round(fit.bias.item(), 3)
        (3.0, 1.0)
    """
    known = ~y.isnan()
    complete = bool(known.all())
    y = y.masked_fill(~known, 0)
    mask = known.to(x.dtype)
    rows = F.pad(x, (0, 1), value=1.0)
    penalty = F.pad(x.new_full((x.shape[1],), ridge), (0, 1))
    bound = 0.25 if loss == "logistic" else 1.0
    gram = rows.double().mT @ rows.double()
    factor, wrong = torch.linalg.cholesky_ex(bound * gram + torch.diag(penalty).double())
    if int(wrong) > 0:
        got = f"ridge={ridge} with {len(x)} rows of {x.shape[1]} features"
        raise BadValue("the fit has no single solution", got=got, needed="a ridge above 0")
    if loss == "squares" and complete:
        found = torch.cholesky_solve((rows.mT @ y).double(), factor).to(x.dtype)
        return LinearFit(found[:-1].mT.contiguous(), found[-1], 1, 0.0)
    # v = factor^T w, so w = inverse^T v: rows and penalty in the coordinates of v
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    rows_v = (rows.double() @ inverse.mT).to(x.dtype)
    penalty_v = ((inverse * penalty.double()) @ inverse.mT).to(x.dtype)
    to_w = factor.to(x.dtype)
    v, count, left = _descend(rows_v, y, mask, penalty_v, to_w, loss == "logistic", iterations, tolerance)
    w = (inverse.mT @ v.double()).to(x.dtype)
    return LinearFit(w[:-1].mT.contiguous(), w[-1], count, left)


def _descend(
    rows: Tensor,
    y: Tensor,
    mask: Tensor,
    penalty: Tensor,
    to_w: Tensor,
    logistic: bool,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, int, float]:
    """Limited-memory quasi-Newton steps for all columns; ``v [F + 1, C]``."""
    v = rows.new_zeros(rows.shape[1], y.shape[1])
    scores, pulled = rows @ v, penalty @ v
    number = mask.sum(0).clamp(min=1)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    value = _value(scores, y, mask, v, pulled, logistic)
    gradient = rows.mT @ _slope(scores, y, mask, logistic) + pulled
    count, left = 0, torch.inf
    for count in range(iterations + 1):
        left = float(((to_w @ gradient).abs() / number).max())
        if left <= tolerance or count == iterations:
            break
        direction = _direction(gradient, pairs)
        downhill = (direction * gradient).sum(0) < 0
        direction = torch.where(downhill, direction, -gradient)
        along, pulled_along = rows @ direction, penalty @ direction
        slope = (direction * gradient).sum(0)
        curve = (_curvature(scores, mask, logistic) * along.square()).sum(0) + (direction * pulled_along).sum(0)
        step = (-slope / curve.clamp(min=torch.finfo(v.dtype).tiny)).where(slope < 0, 0)
        for _ in range(20):
            new = _value(scores + step * along, y, mask, v + step * direction, pulled + step * pulled_along, logistic)
            slack = 10 * torch.finfo(v.dtype).eps * value.abs()  # what rounding hides
            worse = new > value + SUFFICIENT * step * slope + slack
            if not bool(worse.any()):
                break
            step = torch.where(worse, step / 2, step)
        else:
            step = torch.where(worse, 0, step)
            new = torch.where(worse, value, new)
        moved = step * direction
        v, scores, pulled, value = v + moved, scores + step * along, pulled + step * pulled_along, new
        before, gradient = gradient, rows.mT @ _slope(scores, y, mask, logistic) + pulled
        change = gradient - before
        product = (moved * change).sum(0)
        pairs = [*pairs[1 - MEMORY :], (moved, change, torch.where(product > 0, 1 / product.clamp(min=1e-30), 0))]
    return v, count, left


def _direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Minus the inverse curvature, as the pairs know it, times the gradient (the two loops of L-BFGS)."""
    q, weights = gradient, []
    for moved, change, rho in reversed(pairs):
        weights.append(rho * (moved * q).sum(0))
        q = q - weights[-1] * change
    if pairs:
        moved, change, _ = pairs[-1]
        scale = (moved * change).sum(0) / change.square().sum(0).clamp(min=1e-30)
        q = q * torch.where(scale > 0, scale, 1)
    for (moved, change, rho), weight in zip(pairs, reversed(weights), strict=True):
        q = q + (weight - rho * (change * q).sum(0)) * moved
    return -q


def _value(scores: Tensor, y: Tensor, mask: Tensor, v: Tensor, pulled: Tensor, logistic: bool) -> Tensor:
    losses = F.softplus(scores) - y * scores if logistic else 0.5 * (scores - y).square()
    return (mask * losses).sum(0) + 0.5 * (v * pulled).sum(0)


def _slope(scores: Tensor, y: Tensor, mask: Tensor, logistic: bool) -> Tensor:
    return mask * ((scores.sigmoid() if logistic else scores) - y)


def _curvature(scores: Tensor, mask: Tensor, logistic: bool) -> Tensor:
    if not logistic:
        return mask
    p = scores.sigmoid()
    return mask * p * (1 - p)
