"""Probes in closed form: ridge regression and the difference of means, for all sites and labels in one solve."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey
from tdconcepts.representations.fitting import Fitted, Probe, moments_of
from tdconcepts.representations.moments import solve_ridge
from tdconcepts.representations.reading import Stream

__all__ = ["LinearProbe", "MassMeanProbe", "check_binary"]


class LinearProbe(Probe):
    r"""Ridge regression to a label: :math:`\hat y = x W + b`, :math:`W = (S_{xx} + \lambda I)^{-1} S_{xy}`.

    ======  ===================  =====================================
    reads   ``keys``             ``[*B, F]`` each
    writes  ``("probe", *key)``  ``[*B]`` or ``[*B, K]``, as the label
    ======  ===================  =====================================

    One pass over the data; entries of one width are one batched solve, for all K labels at once.

    Args:
        keys: an entry, or a list of them: ``("activation", "net.2")``.
        label: the entry to predict, ``[*B]`` or ``[*B, K]``.
        ridge: lambda, against the *sum* of squares over the rows (scikit-learn's ``alpha``), 1 by default; with 0 the
            solution of least norm.
        out_key: the first name of what is written.

    Raises:
        BadValue: ``ridge < 0``; at the fit: rows that are not finite, shapes that don't fit.

    Source: Hoerl and Kennard 1970; Alain and Bengio, *Understanding intermediate layers using linear classifier
    probes*, 2016.

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(x=x, y=2 * x[:, 1] + 5, batch_size=[50])
        >>> probe = LinearProbe("x", "y", ridge=1e-6).fit(td)
        >>> torch.allclose(probe(td)["probe", "x"], td["y"], atol=1e-4)
        True
    """

    def __init__(
        self, keys: NestedKey | list[NestedKey], label: NestedKey, ridge: float = 1.0, out_key: NestedKey = "probe"
    ) -> None:
        super().__init__(keys, label, out_key)
        if not ridge >= 0.0:
            raise BadValue("ridge is out of range", got=ridge, needed="0 or more")
        self.ridge = float(ridge)

    def solve(self, stream: Stream, folds: int = 0) -> list[list[Fitted]]:
        """By the normal equations of each training set."""
        sets: list[dict[int, Fitted]] = [{} for _ in range(max(1, folds))]
        for group, moments in moments_of(stream, folds):
            for found, m in zip(sets, moments, strict=True):
                label_mean, cross, _ = m.labels
                weight = solve_ridge(m.scatter, cross, self.ridge)
                bias = label_mean - (m.mean.unsqueeze(-2) @ weight).squeeze(-2)
                found |= {i: Fitted(weight[s], bias[s], m.mean[s]) for s, i in enumerate(group)}
        return [[found[i] for i in range(len(self.keys))] for found in sets]


class MassMeanProbe(Probe):
    r"""The difference of class means, seen through the within-class covariance: :math:`p = \sigma(\theta^T \Sigma^{-1}
    (x - m))`.

    :math:`\theta = \mu_1 - \mu_0`, :math:`m` midway between the means, :math:`\Sigma` the covariance (over n) of the
    rows after each class' own mean is taken off. Without ``whiten`` it is :math:`\sigma(\theta^T (x - m))`.

    ======  ===================  ======================================
    reads   ``keys``             ``[*B, F]`` each
    writes  ``("probe", *key)``  the probability, as the label's shape
    ======  ===================  ======================================

    Args:
        keys: an entry, or a list of them.
        label: the entry with the classes, 0 or 1, ``[*B]`` or ``[*B, K]``.
        whiten: whether the covariance counts.
        ridge: added to the diagonal of the covariance; needed where rows are fewer than features. With 0 it is the
            pseudo-inverse, which leaves out what no row has.
        out_key: the first name of what is written.

    Raises:
        BadValue: ``ridge < 0``; at the fit: labels that are not 0 and 1, a class without rows, rows that do not
            vary within the classes.

    Source: Marks and Tegmark, *The geometry of truth*, 2023 (section 5.1); with whitening it is the linear discriminant
    of Fisher 1936.

    Examples:
        >>> from tensordict import TensorDict
        >>> y = torch.arange(40) % 2
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 4 * y[:, None]
        >>> probe = MassMeanProbe("x", "y").fit(TensorDict(x=x, y=y, batch_size=[40]))
        >>> bool(((probe(x) > 0.5) == y.bool()).all())
        True
    """

    classifies: ClassVar[bool] = True

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        label: NestedKey,
        whiten: bool = True,
        ridge: float = 0.0,
        out_key: NestedKey = "probe",
    ) -> None:
        super().__init__(keys, label, out_key)
        if not ridge >= 0.0:
            raise BadValue("ridge is out of range", got=ridge, needed="0 or more")
        self.whiten, self.ridge = whiten, float(ridge)

    def check_labels(self, y: Tensor) -> None:
        """Labels are 0 or 1."""
        check_binary(y)

    def link(self, z: Tensor) -> Tensor:
        """The probability of class 1."""
        return z.sigmoid()

    def solve(self, stream: Stream, folds: int = 0) -> list[list[Fitted]]:
        """By the moments of each training set: the within-class scatter is the total one less a product of rank one."""
        sets: list[dict[int, Fitted]] = [{} for _ in range(max(1, folds))]
        for group, moments in moments_of(stream, folds):
            for found, m in zip(sets, moments, strict=True):
                share, cross, _ = m.labels
                n = m.count
                between = n * share * (1.0 - share)  # n1 n0 / n
                if not bool((between > 0).all()):
                    empty = (~(between > 0)).nonzero()[0].tolist()
                    raise BadValue("a class has no rows", got=f"label {empty}: one class only", needed="both classes")
                theta = cross / between.unsqueeze(-2)
                middle = m.mean.unsqueeze(-1) + (0.5 - share).unsqueeze(-2) * theta
                weight = self._whitened(m.scatter, theta, between, n) if self.whiten else theta
                bias = -(weight * middle).sum(-2)
                found |= {i: Fitted(weight[s], bias[s], m.mean[s]) for s, i in enumerate(group)}
        return [[found[i] for i in range(len(self.keys))] for found in sets]

    def _whitened(self, scatter: Tensor, theta: Tensor, between: Tensor, n: int) -> Tensor:
        """``n W^+ theta`` for ``W = scatter - between theta theta^T``, for all labels by one inverse of the scatter.

        The pseudo-inverse is that within the range of the scatter, as units that are constant or equal need.
        """
        solved = solve_ridge(scatter + n * self.ridge * torch.eye(scatter.shape[-1]).to(scatter), theta, 0.0)
        left = 1.0 - between * (theta * solved).sum(-2)
        if not bool((left > 1e-9).all() and (solved != 0).any(-2).all()):
            raise BadValue(
                "the classes have no spread between them",
                got=f"{n} rows of {scatter.shape[-1]} features, that are constant or tell the classes apart exactly",
                needed="rows that vary within the classes, and more of them than features",
                fix="ridge=1e-3, or whiten=False",
            )
        return n * solved / left.unsqueeze(-2)


def check_binary(y: Tensor) -> None:
    """Raise for labels that are not 0 or 1."""
    if not bool(((y == 0) | (y == 1)).all()):
        raise BadValue(
            "the labels are not binary",
            got=f"values such as {y[(y != 0) & (y != 1)][0].item():g}",
            needed="0 and 1 (or False and True)",
            fix="LogisticProbe(..., classes=n) for n classes; LinearProbe for numbers",
        )
