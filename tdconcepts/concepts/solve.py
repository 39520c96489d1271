"""Many regularised linear fits on the same rows, solved together."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadType, BadValue

__all__ = ["LinearFit", "known_labels", "linear_fit"]

MEMORY = 5  # pairs of the quasi-Newton method
BLOCKS = 8  # of the matrix of the bound
SHARE = 0.9  # once so many columns are left, those that are done are taken out
NEAR, LINE = 0.3, 20  # of the slope may be left after a line search, and its steps at most
ROUGH, LARGE = 2**-8, 2**24  # down to this part of the first gradient bfloat16 will do, which large products gain from


class LinearFit(NamedTuple):
    """What a fit found: ``scores = x @ weight.mT + bias``.

    Args:
        weight: ``[C, F]``.
        bias: ``[C]``.
        iterations: of the slowest column.
        gradient: the largest entry of the gradient of the mean loss that was left, with the mean of each feature taken
            off. (By the weights of features as they are it is larger, by their mean times the entry of the bias: for
            large means, more than single precision can tell.)

    Examples:
        >>> fit = linear_fit(torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
        >>> fit.weight.shape, fit.bias.shape, fit.gradient < 1e-4
        (torch.Size([1, 1]), torch.Size([1]), True)
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float


@torch.no_grad()
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
    step costs one product of the rows with C vectors and one back; where the processor multiplies bfloat16 faster, all
    but the last steps are taken with rounded rows. Least squares without missing labels is the solution of H itself.

    The rows are centred first (and so are the labels, for least squares), so that a large mean doesn't take the digits:
    that moves b alone, which has no penalty, so the optimum is the same.

    Args:
        x: rows ``[N, F]``, float32 or float64.
        y: ``[N, C]`` of any dtype, NaN where it is missing.
        ridge: :math:`\lambda`, 0 or more.
        loss: which L.
        iterations: at most.
        tolerance: on the largest entry of the gradient of the mean loss, of rows that are centred.

    Raises:
        BadType: for rows that are not float32 or float64.
        BadValue: for numbers that are not finite, other options, and a system that can't be solved (``ridge=0`` with
            fewer rows than features, or a feature that does not vary).

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> fit = linear_fit(x, 3 * x + 1, ridge=0.0, loss="squares")
        >>> round(fit.weight.item(), 3), round(fit.bias.item(), 3)
        (3.0, 1.0)
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise BadType("a fit needs single or double precision", got=str(x.dtype), fix="x.float()")
    can = 0 <= ridge <= torch.finfo(x.dtype).max and loss in ("logistic", "squares")
    if not can or not isinstance(iterations, Integral) or iterations < 1 or not tolerance >= 0:
        got = f"ridge={ridge!r}, loss={loss!r}, iterations={iterations!r}, tolerance={tolerance!r}"
        needed = '"logistic" or "squares", a finite ridge and a tolerance of 0 or more, iterations of 1 or more'
        raise BadValue("not a way to fit", got=got, needed=needed)
    with torch.autocast(x.device.type, enabled=False):
        y = y.to(x.dtype)
        known = known_labels(y)
        mask = None if known is None else known.to(x.dtype)
        y = y if known is None else y.masked_fill(~known, 0)
        mean, middle = x.mean(0), y.new_zeros(y.shape[1])
        x = x - mean
        if loss == "squares":
            middle = y.mean(0) if mask is None else y.sum(0) / mask.sum(0).clamp(min=1)
            y = y - middle
        penalty = F.pad(x.new_full((x.shape[1],), ridge), (0, 1))
        count, left = 1, 0.0
        if loss == "squares" and mask is None:
            factor = _factor(x.double(), penalty.double(), 1.0, exact=True)
            w = torch.cholesky_solve(torch.cat([x.mT @ y, y.sum(0, keepdim=True)]).double(), factor)
        else:
            start = torch.cholesky_inverse(_factor(x, penalty, 0.25 if loss == "logistic" else 1.0)).to(x.dtype)
            rough = x.bfloat16() if _is_faster(x, y.shape[-1]) else None
            problem = _Problem(x, y, mask, penalty.unsqueeze(-1), loss == "logistic", rough)
            w, count, left = _descend(problem, start, iterations, tolerance)
        weight = w[:-1].mT.to(x.dtype).contiguous()
        bias = (w[-1].double() + middle - weight.double() @ mean.double()).to(x.dtype)
    _check_finite(weight, bias)
    return LinearFit(weight, bias, count, left)


def known_labels(y: Tensor) -> Tensor | None:
    """Where a label is no NaN, bool as ``y``; None where that is everywhere, which one sum says."""
    total = float(y.sum())
    return None if total == total else ~y.isnan()


def _factor(x: Tensor, penalty: Tensor, bound: float, exact: bool = False) -> Tensor:
    """The Cholesky factor of the bound on the curvature; in double precision where single does not reach.

    Where it has to be ``exact``, a pivot that rounding alone may have left is none.
    """
    count, size = x.shape
    matrix = x.new_zeros(size + 1, size + 1)
    for start in range(0, size, -(-size // BLOCKS)):  # the lower part only: no more is read
        stop = min(size, start - (-size // BLOCKS))
        matrix[start:stop, :stop] = x[:, start:stop].mT @ x[:, :stop]
    matrix[size, :size], matrix[size, size] = x.sum(0), count
    matrix.mul_(bound).diagonal().add_(penalty)
    for wide in (matrix, matrix.double()):
        factor, wrong = torch.linalg.cholesky_ex(wide)
        least = len(wide) * torch.finfo(wide.dtype).eps * wide.diagonal()
        if not int(wrong) and not (exact and bool((factor.diagonal().square() <= least).any())):
            return factor
    _check_finite(matrix)
    got = f"ridge={float(penalty[0]):g} with {count} rows of {size} features"
    raise BadValue("the fit has no single solution", got=got, needed="a ridge above 0, or a larger one")


def _check_finite(*results: Tensor) -> None:
    if not all(bool(result.isfinite().all()) for result in results):
        raise BadValue("the fit is not finite", got="NaN, inf or numbers that are too large", needed="finite numbers")


def _is_faster(x: Tensor, columns: int) -> bool:
    """Whether products of the rows with that many columns are faster in bfloat16 by so much that it is worth it."""
    if not x.is_cpu or x.numel() * columns < LARGE:
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class _Problem(NamedTuple):
    x: Tensor  # [N, F], centred
    y: Tensor  # [N, C]
    mask: Tensor | None  # [N, C]
    penalty: Tensor  # [F + 1, 1]
    logistic: bool
    rough: Tensor | None = None  # x in bfloat16

    def along(self, w: Tensor, out: Tensor) -> Tensor:
        """The scores of ``w [F + 1, C]``: ``[N, C]``."""
        if self.rough is not None:
            return out.copy_(self.rough @ w[:-1].bfloat16()).add_(w[-1])
        return torch.addmm(w[-1], self.x, w[:-1], out=out)

    def pulled(self, slope: Tensor) -> Tensor:
        """What the slopes ``[N, C]`` are for the weights: ``[F + 1, C]``."""
        found = self.x.mT @ slope if self.rough is None else (self.rough.mT @ slope.bfloat16()).to(slope.dtype)
        return torch.cat([found, slope.sum(0, keepdim=True)])

    def slope(self, scores: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
        """The derivative of the loss by each score, and the predictions, which the curvature is made of."""
        p = torch.sigmoid(scores, out=room.p) if self.logistic else scores
        slope = torch.sub(p, self.y, out=room.slope)
        return (slope if self.mask is None else slope.mul_(self.mask)), p

    def bend(self, p: Tensor, along: Tensor, room: _Room) -> Tensor:
        """The curvature of the loss in a direction whose change of each score is known; for each column."""
        if self.logistic:
            bend = torch.addcmul(p, p, p, value=-1, out=room.spare).mul_(along).mul_(along)
        else:
            bend = torch.mul(along, along, out=room.spare)
        return (bend if self.mask is None else bend.mul_(self.mask)).sum(0)

    def of(self, columns: Tensor) -> _Problem:
        """The problem of some columns."""
        mask = None if self.mask is None else self.mask[:, columns]
        return self._replace(y=self.y[:, columns], mask=mask)


class _Room(NamedTuple):
    """Memory as large as the scores, the same in every step: fresh memory costs more than what is computed in it."""

    scores: Tensor
    found: Tensor
    along: Tensor
    slope: Tensor
    p: Tensor
    spare: Tensor

    @classmethod
    def like(cls, y: Tensor) -> _Room:
        return cls(*(torch.zeros_like(y, memory_format=torch.contiguous_format) for _ in cls._fields))

    def of(self, columns: Tensor) -> _Room:
        """The same memory, with what it holds of some columns."""
        rows, count = len(self.scores), len(columns)
        return _Room(*(each.view(-1)[: rows * count].view(rows, count).copy_(each[:, columns]) for each in self))

    def swapped(self) -> _Room:
        """What was found as the scores."""
        return self._replace(scores=self.found, found=self.scores)


class _Pair(NamedTuple):
    """A step of each column, the change of its gradient, what the metric makes of that, and 1 / (step * change)."""

    moved: Tensor
    change: Tensor
    metric: Tensor
    rho: Tensor


def _descend(problem: _Problem, start: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, int, float]:
    """Limited-memory quasi-Newton steps for all columns; ``w [F + 1, C]``. A column that is done takes no part."""
    x, penalty = problem.x, problem.penalty
    result = x.new_zeros(x.shape[1] + 1, problem.y.shape[1])
    open_ = torch.arange(problem.y.shape[1], device=x.device)
    w, room = result.clone(), _Room.like(problem.y)
    number = torch.full_like(w[0], len(x)) if problem.mask is None else problem.mask.sum(0).clamp(min=1)
    gradient = problem.pulled(problem.slope(room.scores, room)[0])
    metric = start @ gradient
    aim = (gradient.abs().amax(0) / number * ROUGH).clamp(min=tolerance)
    pairs: list[_Pair] = []
    scale, worst = torch.ones_like(w[0]), 0.0
    tiny = torch.finfo(w.dtype).tiny
    count = 0
    for count in range(iterations + 1):
        left = gradient.abs().amax(0) / number
        if problem.rough is not None and (count >= iterations // 4 or bool((left <= aim).all())):
            problem = problem._replace(rough=None)
            slope, _ = problem.slope(problem.along(w, room.scores), room)
            gradient = torch.addcmul(problem.pulled(slope), penalty, w)
            metric, left = start @ gradient, gradient.abs().amax(0) / number
        still = left > tolerance
        remain = int(still.sum()) if problem.rough is None else len(open_)
        if not remain or count == iterations:
            result[:, open_] = w
            worst = max(worst, float(left.max()) if len(left) else 0.0)
            break
        if remain <= SHARE * len(open_):
            result[:, open_], worst = w, max(worst, float(left[~still].max()))
            keep = still.nonzero().squeeze(-1)
            problem, open_, room = problem.of(keep), open_[keep], room.of(keep)
            w, gradient, metric, number, scale = _of(keep, w, gradient, metric, number, scale)
            pairs = [_Pair(*_of(keep, *pair)) for pair in pairs]
        direction = _direction(gradient, metric, pairs, scale)
        first = (direction * gradient).sum(0)
        if bool((first >= 0).any()):
            direction = torch.where(first < 0, direction, -metric)
            first = (direction * gradient).sum(0)
        along = problem.along(direction, room.along)
        pulled = direction * penalty
        pull, inner = (pulled * w).sum(0), (pulled * direction).sum(0)
        p = room.p if problem.logistic else room.scores
        step = -first / (problem.bend(p, along, room) + inner).clamp(min=tiny)
        low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
        for _ in range(LINE):
            slope, p = problem.slope(torch.addcmul(room.scores, along, step, out=room.found), room)
            rise = torch.mul(slope, along, out=room.spare).sum(0) + pull + step * inner  # it grows with the step
            far = rise.abs() > NEAR * first.abs()
            if not bool(far.any()):
                break
            low, high = torch.where(rise < 0, step, low), torch.where(rise > 0, step, high)
            newton = step - rise / (problem.bend(p, along, room) + inner).clamp(min=tiny)
            middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
            inside = (newton > low) & (newton < high) & (newton < 4 * step)
            step = torch.where(far, torch.where(inside, newton, middle), step)
        else:
            slope, p = problem.slope(torch.addcmul(room.scores, along, step, out=room.found), room)
        moved, room = direction.mul_(step), room.swapped()
        w = w + moved
        before, gradient = gradient, torch.addcmul(problem.pulled(slope), penalty, w)
        earlier, metric = metric, start @ gradient
        change, turned = gradient - before, metric - earlier
        product = (moved * change).sum(0)
        rho = torch.where(product > 0, 1 / product.clamp(min=1e-30), 0)
        pairs = [*pairs[1 - MEMORY :], _Pair(moved, change, turned, rho)]
        scale = (product / (change * turned).sum(0).clamp(min=1e-30)).clamp(min=1e-3)
    return result, count, worst


def _of(columns: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [tensor.index_select(-1, columns) for tensor in tensors]


def _direction(gradient: Tensor, metric: Tensor, pairs: list[_Pair], scale: Tensor) -> Tensor:
    """Minus the inverse curvature, as the pairs know it, times the gradient (the two loops of L-BFGS).

    The metric is carried along with the gradient, so that none of it has to be multiplied by a matrix again.
    """
    q, turned, weights = gradient, metric, []
    for pair in reversed(pairs):
        weight = pair.rho * (pair.moved * q).sum(0)
        q, turned = (torch.addcmul(a, b, weight, value=-1) for a, b in ((q, pair.change), (turned, pair.metric)))
        weights.append(weight)
    q = turned * scale
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        q = torch.addcmul(q, pair.moved, weight - pair.rho * (pair.change * q).sum(0))
    return q.neg_()
