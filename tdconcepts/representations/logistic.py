"""Logistic probes: all sites and labels in one batched optimisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey
from tdconcepts.representations.fitting import Fitted, Probe
from tdconcepts.representations.linear import check_binary
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Rows, Stream, stacked

__all__ = ["LogisticProbe", "Weighed", "logistic"]

_ELEMENTS, _ELEMENTS_CUDA = 2**17, 2**24  # logits at once: what caches hold
_HISTORY = 10


class Weighed(NamedTuple):
    """Rows of a stack of sites with what is learned: ``x`` ``[S, N, F]``, ``y`` ``[N, K]``, ``weight`` ``[N, G]``."""

    x: Tensor
    y: Tensor
    weight: Tensor


class LogisticProbe(Probe):
    r"""Logistic regression from entries to classes: :math:`p = \sigma(w^T x + b)`, or a softmax over ``classes``.

    It minimises :math:`\sum_n -\log p(y_n) + \frac{\lambda}{2} \lVert w \rVert^2` (the bias is free), to convergence.

    ======  ===================  ====================================================================
    reads   ``keys``             ``[*B, F]`` each
    writes  ``("probe", *key)``  the probability, as the label's shape; with ``classes`` one more dim
    ======  ===================  ====================================================================

    All entries of one width and all K labels are one problem of matrix products. A stream of TensorDicts is passed over
    once for each step, for all folds together.

    Args:
        keys: an entry, or a list of them.
        label: the entry with the classes, ``[*B]`` or ``[*B, K]``.
        classes: how many classes there are, 0 to classes - 1; default: the classes are 0 and 1, and one number says it.
        ridge: lambda, against the *sum* over the rows (scikit-learn's ``1 / C``), above 0; 1 by default.
        max_iter: the most steps; where they don't suffice there is a warning.
        tol: a problem is solved when its next step would gain less than this share of the objective.
        out_key: the first name of what is written.

    Raises:
        BadValue: ``ridge <= 0``, fewer than two classes; at the fit: labels that are none of the classes, or one class
            only.

    Source: Cox 1958; the step's metric is the bound of Böhning, *Multinomial logistic regression algorithm*, 1992,
    refined by the differences of gradients (Nocedal 1980).

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> td = TensorDict(x=x, y=(x[:, 0] > 0).long(), batch_size=[20])
        >>> probe = LogisticProbe("x", "y").fit(td)
        >>> bool(((probe(td)["probe", "x"] > 0.5) == td["y"].bool()).all())
        True
    """

    classifies: ClassVar[bool] = True
    passes: ClassVar[str | None] = "LogisticProbe"

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        label: NestedKey,
        classes: int | None = None,
        ridge: float = 1.0,
        max_iter: int = 200,
        tol: float = 1e-9,
        out_key: NestedKey = "probe",
    ) -> None:
        super().__init__(keys, label, out_key)
        if not ridge > 0.0:
            raise BadValue("ridge is out of range", got=ridge, needed="above 0: else separable classes have no end")
        if classes is not None and (type(classes) is not int or classes < 2):
            raise BadValue("not a number of classes", got=repr(classes), needed="2 or more, or None for 0 and 1")
        if type(max_iter) is not int or max_iter < 1:
            raise BadValue("not a number of steps", got=repr(max_iter), needed="1 or more")
        if not 0.0 < tol < 1.0:
            raise BadValue("not a tolerance", got=tol, needed="between 0 and 1")
        self.classes, self.ridge, self.max_iter, self.tol = classes, float(ridge), max_iter, float(tol)

    def check_labels(self, y: Tensor) -> None:
        """Labels are 0 or 1, or 0 to classes - 1."""
        if self.classes is None:
            check_binary(y)
        elif not bool(((y == y.round()) & (y >= 0) & (y < self.classes)).all()):
            wrong = y[(y != y.round()) | (y < 0) | (y >= self.classes)][0].item()
            raise BadValue("a label is none of the classes", got=f"{wrong:g}", needed=f"0 to {self.classes - 1}")

    def link(self, z: Tensor) -> Tensor:
        """The probability of class 1, or of each class."""
        return z.sigmoid() if self.classes is None else z.softmax(-1)

    def solve(self, stream: Stream, folds: int = 0) -> list[list[Fitted]]:
        """By :func:`logistic`: training sets one after the other in memory, and together in each pass over a stream."""
        if folds and stream.in_memory:
            rows = list(stream())
            return [self._solved([part.only(part.fold != fold) for part in rows].__iter__)[0] for fold in range(folds)]  # type: ignore[arg-type]
        return self._solved(list(stream()).__iter__ if stream.in_memory else stream, folds)

    def _solved(self, read: Callable[[], Iterator[Rows]], folds: int = 0) -> list[list[Fitted]]:
        """The probes of each training set, where the rows of its fold have a weight of 0."""
        sets: list[dict[int, Fitted]] = [{} for _ in range(max(1, folds))]
        for position, (group, _) in enumerate(stacked(next(iter(read())).x)):

            def weighed(position: int = position) -> Iterator[Weighed]:
                for rows in read():
                    x = stacked(rows.x)[position][1]
                    weight = x.new_ones(len(rows.y), 1)
                    if rows.fold is not None and folds:
                        weight = (rows.fold.unsqueeze(-1) != torch.arange(folds, device=x.device)).to(x)
                    yield Weighed(x, rows.y, weight)

            again: Read = weighed if isinstance(read, Stream) else list(weighed()).__iter__
            weight, bias, mean = logistic(again, self.ridge, self.classes, self.max_iter, self.tol)
            for g, found in enumerate(sets):
                found |= {i: Fitted(weight[s, :, g], bias[s, g], mean[s]) for s, i in enumerate(group)}
        return [[found[i] for i in range(len(self.keys))] for found in sets]


Read: TypeAlias = Callable[[], Iterator[Weighed]]


def logistic(
    read: Read, ridge: float, classes: int | None = None, max_iter: int = 200, tol: float = 1e-9
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Minimise :math:`\sum_n w_{ng} (-\log p(y_{nk} \mid x_{sn})) + \frac{\lambda}{2} \lVert W \rVert^2` for all s, g,
    k at once.

    Every problem has its own steps, of which the first and every one that would not descend is that of the bound
    :math:`H \preceq q X^T X + \lambda I` (q is 1/4 for two classes, 1/2 for more), which always descends.

    Args:
        read: gives the rows anew each time: stacks of S sites, K labels, G weights of each row.
        ridge: lambda.
        classes: number of classes of a softmax, or None for a sigmoid.
        max_iter: the most steps.
        tol: see :class:`LogisticProbe`.

    Returns:
        ``[S, F, G, K]`` weights and ``[S, G, K]`` biases, with classes one more dim at the end; the mean of ``x``
        ``[S, F]``.

    Raises:
        BadValue: some weighted label has one class only.
    """
    problem = _Problem(read, ridge, classes)
    theta = problem.start()
    value, slope = problem(theta)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(max_iter):
        metric = problem.metric(slope)
        open_ = _dot(slope, metric) > tol * (1.0 + value)
        if not bool(open_.any()):
            break
        move = _direction(slope, steps, problem.metric)
        down = _dot(slope, move)
        move = torch.where(_wide(down < 0, move), move, -metric)
        down = torch.where(down < 0, down, -_dot(slope, metric))
        move = move * _wide(open_, move)
        new_value, new_slope = problem(theta + move)
        worse = open_ & ~(new_value <= value + 1e-4 * down)
        if bool(worse.any()):
            move = torch.where(_wide(worse, move), -metric, move)
            new_value, new_slope = problem(theta + move)
        change = new_slope - slope
        curve = _dot(move, change)
        steps = [
            *steps[1 - _HISTORY :],
            (move, change, torch.where(curve > 1e-300, 1.0 / curve.clamp(min=1e-300), 0.0)),
        ]
        theta, value, slope = theta + move, new_value, new_slope
    else:
        metric = problem.metric(slope)
        left = int((_dot(slope, metric) > 1e-6 * (1.0 + value)).sum())
        if left:
            warnings.warn(
                f"{left} of {value.numel()} logistic probes did not converge in {max_iter} steps: raise max_iter, or "
                "standardise the entries",
                stacklevel=2,
            )
    weight, bias = theta[:, :-1], theta[:, -1]
    bias = bias - torch.einsum("sf,sf...->s...", problem.mean, weight)
    return (weight, bias, problem.mean) if classes else (weight[..., 0], bias[..., 0], problem.mean)


class _Problem:
    """The objective and its gradient, on centred rows; parameters are ``[S, F + 1, G, K, C]``, the bias last.

    The part of both that is linear in the parameters, what the labels say, is the same at each step.
    """

    def __init__(self, read: Read, ridge: float, classes: int | None) -> None:
        self.read, self.ridge, self.classes = read, ridge, classes
        parts: list[Moments] = []
        counts: list[Tensor] = []
        said: list[Tensor] = []
        total: list[Tensor] = []
        for rows in read():
            parts = [merged([*parts, Moments.of(rows.x)])]
            onehot = _onehot(rows.y, classes or 2).unsqueeze(1) * rows.weight[..., None, None]  # [N, G, K, C]
            counts.append(onehot.sum(0))
            kept = onehot if classes else onehot[..., 1:]
            self.shape = tuple(kept.shape[1:])
            said.append((rows.x.mT @ kept.flatten(1)).unflatten(-1, self.shape))
            total.append(kept.sum(0))
        [m] = parts
        empty = (torch.stack(counts).sum(0) > 0).sum(-1) < 2
        if bool(empty.any()):
            fold, label = empty.nonzero()[0].tolist()
            raise BadValue(
                "there is one class only",
                got=f"label {label}" + (f", training set {fold}" if self.shape[0] > 1 else ""),
                needed="rows of two classes or more",
                fix="more rows, or fewer folds",
            )
        self.mean = m.mean
        everywhere = torch.stack(total).sum(0).expand(len(m.mean), *self.shape)
        self.said = self._centred(torch.stack(said).sum(0), everywhere)
        bound = 0.5 if classes else 0.25
        eye = torch.eye(m.scatter.shape[-1], dtype=m.scatter.dtype, device=m.scatter.device)
        self.factor = torch.linalg.cholesky(bound * m.scatter + ridge * eye)
        self.bias = 1.0 / (bound * m.count)

    def start(self) -> Tensor:
        return torch.zeros_like(self.said)

    def metric(self, slope: Tensor) -> Tensor:
        """The slope in the metric of the bound: its step downhill, but for the sign."""
        weight = torch.cholesky_solve(slope[:, :-1].flatten(2), self.factor).view_as(slope[:, :-1])
        return torch.cat([weight, self.bias * slope[:, -1:]], 1)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        weight = theta[:, :-1].flatten(2)
        penalty = torch.cat([self.ridge * theta[:, :-1], torch.zeros_like(theta[:, -1:])], 1)
        value = 0.5 * _dot(theta, penalty) - _dot(theta, self.said)
        offset = theta[:, -1].flatten(1).unsqueeze(1) - self.mean.unsqueeze(1) @ weight
        pulled, total = torch.zeros_like(theta[:, :-1]), torch.zeros_like(theta[:, -1])
        step = max(1, (_ELEMENTS if theta.is_cpu else _ELEMENTS_CUDA) // max(1, offset.numel()))
        for rows in self.read():
            plain = bool((rows.weight == 1).all())
            for first in range(0, len(rows.y), step):
                x = rows.x[:, first : first + step]
                z = torch.baddbmm(offset, x, weight).unflatten(-1, self.shape)  # [S, N, G, K, C]
                one, p = (F.softplus(z).squeeze(-1), z.sigmoid_()) if not self.classes else _softmax(z)
                if not plain:
                    w = rows.weight[first : first + step].unsqueeze(-1)
                    one, p = one.mul_(w), p.mul_(w.unsqueeze(-1))
                value += one.sum(1)
                pulled += (x.mT @ p.flatten(2)).view_as(pulled)
                total += p.sum(1)
        return value, self._centred(pulled, total) - self.said + penalty

    def _centred(self, pulled: Tensor, total: Tensor) -> Tensor:
        """``sum_n (x_n - mean) r_n`` and ``sum_n r_n`` from ``sum_n x_n r_n``, as parameters are."""
        shift = self.mean.view(*self.mean.shape, *[1] * len(self.shape)) * total.unsqueeze(1)
        return torch.cat([pulled - shift, total.unsqueeze(1)], 1)


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = z.logsumexp(-1)
    return log_sum, z.sub_(log_sum.unsqueeze(-1)).exp_()


def _direction(slope: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], metric: Callable[[Tensor], Tensor]) -> Tensor:
    """The quasi-Newton step of each problem, from its last steps and changes of slope."""
    if not steps:
        return -metric(slope)
    q, kept = slope, []
    for move, change, inverse in reversed(steps):
        share = inverse * _dot(move, q)
        q = q - _wide(share, q) * change
        kept.append(share)
    q = metric(q)
    for (move, change, inverse), share in zip(steps, reversed(kept), strict=True):
        q = q + _wide(share - inverse * _dot(change, q), q) * move
    return -q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each problem, ``[S, G, K]``."""
    return (a * b).sum((1, -1))


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.unsqueeze(1).unsqueeze(-1)


def _onehot(y: Tensor, classes: int) -> Tensor:
    return F.one_hot(y.long(), classes).to(y.dtype)
