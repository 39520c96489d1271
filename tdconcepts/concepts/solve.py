"""Many regularised linear fits on the same rows, solved together."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadValue

__all__ = ["LinearFit", "linear_fit"]

MEMORY = 8  # pairs of the quasi-Newton method
NEAR, LINE = 0.3, 20  # of the slope may be left after a line search, and its steps at most


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
    curvature of the first is at most 1/4, that of the second at most 1, so no column's curvature is above
    :math:`H = \kappa \tilde X^T \tilde X + \lambda I` (Boehning and Lindsay 1988): one inverse that serves all columns.
    From it a limited-memory quasi-Newton method starts, all columns at once, with a line search by Newton's method. A
    step costs one product of the rows with C vectors and one back. Least squares without missing labels is the solution
    of H itself.

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
    mask = None if bool(known.all()) else known.to(x.dtype)
    y = y.masked_fill(~known, 0)
    rows = F.pad(x, (0, 1), value=1.0)
    penalty = F.pad(x.new_full((x.shape[1],), ridge), (0, 1))
    direct = loss == "squares" and mask is None
    bound = 0.25 if loss == "logistic" else 1.0
    wide = rows.double() if direct else rows  # else it only starts the iterations
    factor, wrong = torch.linalg.cholesky_ex((bound * wide.mT @ wide).double() + torch.diag(penalty).double())
    if int(wrong) > 0:
        got = f"ridge={ridge} with {len(x)} rows of {x.shape[1]} features"
        raise BadValue("the fit has no single solution", got=got, needed="a ridge above 0")
    if direct:
        found = torch.cholesky_solve((rows.mT @ y).double(), factor).to(x.dtype)
        return LinearFit(found[:-1].mT.contiguous(), found[-1], 1, 0.0)
    start = torch.cholesky_inverse(factor).to(x.dtype)
    problem = _Problem(rows, y, mask, penalty.unsqueeze(-1), loss == "logistic")
    w, count, left = _descend(problem, start, iterations, tolerance)
    return LinearFit(w[:-1].mT.contiguous(), w[-1], count, left)


class _Problem(NamedTuple):
    rows: Tensor  # [N, F + 1]
    y: Tensor  # [N, C]
    mask: Tensor | None
    penalty: Tensor  # [F + 1, 1]
    logistic: bool

    def slope(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The derivative of the loss by each score, and what the curvature is made of."""
        p = scores.sigmoid() if self.logistic else scores
        slope = p - self.y
        return (slope if self.mask is None else slope * self.mask), (p if self.logistic else None)

    def bend(self, p: Tensor | None, along: Tensor) -> Tensor:
        """The curvature of the loss in a direction, for each column."""
        squares = along.square()
        if p is not None:
            squares = torch.addcmul(p, p, p, value=-1).mul_(squares)
        return (squares if self.mask is None else squares * self.mask).sum(0)


def _descend(problem: _Problem, start: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, int, float]:
    """Limited-memory quasi-Newton steps for all columns; ``w [F + 1, C]``."""
    rows, penalty = problem.rows, problem.penalty
    w = rows.new_zeros(rows.shape[1], problem.y.shape[1])
    number = len(rows) if problem.mask is None else problem.mask.sum(0).clamp(min=1)
    scores = rows @ w
    slope, p = problem.slope(scores)
    gradient = rows.mT @ slope
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = torch.ones_like(w[0])
    count, left = 0, torch.inf
    for count in range(iterations + 1):
        left = float((gradient.abs() / number).max())
        if left <= tolerance or count == iterations:
            break
        direction = _direction(gradient, pairs, start, scale)
        first = (direction * gradient).sum(0)
        direction = torch.where(first < 0, direction, -start @ gradient)
        first = (direction * gradient).sum(0)
        along = rows @ direction
        pull, inner = (direction * penalty * w).sum(0), (direction.square() * penalty).sum(0)
        tiny = torch.finfo(w.dtype).tiny
        step = -first / (problem.bend(p, along) + inner).clamp(min=tiny)
        low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
        for _ in range(LINE):
            slope, p = problem.slope(torch.addcmul(scores, along, step))
            rise = (
                (slope * along).sum(0) + pull + step * inner
            )  # the derivative of the objective, which grows with step
            low, high = torch.where(rise < 0, step, low), torch.where(rise > 0, step, high)
            far = rise.abs() > NEAR * first.abs()
            if not bool(far.any()):
                break
            newton = step - rise / (problem.bend(p, along) + inner).clamp(min=tiny)
            middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
            inside = (newton > low) & (newton < high) & (newton < 4 * step)
            step = torch.where(far, torch.where(inside, newton, middle), step)
        else:
            slope, p = problem.slope(torch.addcmul(scores, along, step))
        moved = step * direction
        w, scores = w + moved, torch.addcmul(scores, along, step)
        before, gradient = gradient, torch.addcmul(rows.mT @ slope, penalty, w)
        change = gradient - before
        product = (moved * change).sum(0)
        pairs = [*pairs[1 - MEMORY :], (moved, change, torch.where(product > 0, 1 / product.clamp(min=1e-30), 0))]
        scale = (product / (change * (start @ change)).sum(0).clamp(min=1e-30)).clamp(min=1e-3)
    return w, count, left


def _direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], start: Tensor, scale: Tensor) -> Tensor:
    """Minus the inverse curvature, as the pairs know it, times the gradient (the two loops of L-BFGS)."""
    q, weights = gradient, []
    for moved, change, rho in reversed(pairs):
        weights.append(rho * (moved * q).sum(0))
        q = torch.addcmul(q, change, weights[-1], value=-1)
    q = (start @ q) * scale
    for (moved, change, rho), weight in zip(pairs, reversed(weights), strict=True):
        q = torch.addcmul(q, moved, weight - rho * (change * q).sum(0))
    return -q
