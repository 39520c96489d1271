"""Linear probes over episodes ``[E, T, C]``: what can be read from a latent, scored on episodes that were held out."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDict
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.representations.linear import LinearProbe
from tdconcepts.representations.scoring import cross_validate

__all__ = ["RidgeProbe", "ridge_direction"]


@dataclasses.dataclass(frozen=True, eq=False)
class RidgeProbe:
    """A fitted linear probe ``y ~ z @ weight + bias`` and its score on held-out episodes.

    Calling it reads ``z`` ``[*B, C]`` and gives the prediction ``[*B]``. ``direction`` and ``mean`` are what
    :class:`~tdconcepts.hooks.RemoveDirection` takes.

    Args:
        weight: ``[C]``; ``direction`` is it at length one.
        bias: one number.
        mean: ``[C]``, the latent's mean over the training rows.
        r2: the held-out R^2.
        rows: how many rows counted.

    Examples:
        >>> probe = RidgeProbe(torch.tensor([3.0, 4.0]), torch.tensor(1.0), torch.zeros(2), r2=0.9, rows=100)
        >>> probe(torch.ones(2)), probe.direction
        (tensor(8.), tensor([0.6000, 0.8000]))
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    r2: float
    rows: int

    @property
    def direction(self) -> Tensor:
        """``weight`` at length one, ``[C]``; BadValue where nothing was found (a weight of zeros)."""
        length = self.weight.norm()
        if not length > 0:
            raise BadValue(
                "the probe found no direction", got="a weight of zeros", needed="a label that varies with the latent"
            )
        return self.weight / length

    def __call__(self, z: Tensor) -> Tensor:
        """The prediction ``[*B]`` for ``z`` ``[*B, C]``."""
        return z @ self.weight.to(z) + self.bias.to(z)


def ridge_direction(
    z: Tensor, y: Tensor, ridge: float = 1e-3, *, mask: Tensor | None = None, folds: int = 4
) -> RidgeProbe:
    r"""Fit a ridge regression from a latent to a label over episodes, and score it on episodes held out.

    :math:`w = (\tilde Z^T \tilde Z + \lambda I)^{-1} \tilde Z^T \tilde y` on centred data, in float64. For the
    score the episodes are dealt into ``folds`` groups; each group is predicted by a probe fitted on the others:
    :math:`R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y_\mathrm{train})^2`. The probe that is returned is fitted on
    all. Neighbouring steps are near copies, so held-out *steps* would flatter: whole episodes are held out. It is
    :class:`LinearProbe` and :func:`cross_validate` for tensors, with ``groups=0``.

    Args:
        z: the latent ``[E, T, C]``: episodes, steps, units.
        y: the label ``[E, T]``, any unit.
        ridge: lambda, against the *sum* of squares over the rows (scikit-learn's ``alpha``); 1e-3 by default.
        mask: ``[E, T]``, True where the step counts (ragged episodes); default: all.
        folds: groups of episodes, at most E; 4 by default.

    Raises:
        BadValue: shapes that don't fit, fewer than two episodes with steps, values that aren't finite, ``ridge < 0``,
            fewer than two folds, a label that is constant.
        BadType: latents or labels that aren't floating point.

    Source: Hoerl and Kennard 1970; probing of agents by held-out episodes after McGrath et al. 2022.

    Examples:
        >>> z = torch.randn(6, 50, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = ridge_direction(z, 2.0 * z[..., 1] + 5.0)
        >>> probe.direction.round(decimals=2).abs().tolist(), round(probe.r2, 3)
        ([0.0, 1.0, 0.0], 1.0)
    """
    _check(z, y, mask)
    counts = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.bool()
    td = TensorDict(z=z.detach(), y=y.detach(), mask=counts, batch_size=y.shape)
    probe = LinearProbe("z", "y", ridge).fit(td, mask="mask")
    scores = cross_validate(probe, td, folds=folds, groups=0, mask="mask")
    weight, bias, mean = (value.float() for value in probe.of())
    return RidgeProbe(weight, bias, mean, float(scores.score["z"]), scores.rows)


def _check(z: Tensor, y: Tensor, mask: Tensor | None) -> None:
    given: list[tuple[str, object]] = [("z", z), ("y", y), *([] if mask is None else [("mask", mask)])]
    for name, value in given:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or name == "mask"):
            kind = getattr(value, "dtype", type(value).__name__)
            raise BadType("a probe needs floating-point tensors", got=f"{name}: {kind}", fix=f"{name}.float()")
    if z.ndim != 3 or y.shape != z.shape[:2] or (mask is not None and mask.shape != y.shape):
        raise BadValue(
            "the shapes don't fit",
            got=f"z {list(z.shape)}, y {list(y.shape)}" + ("" if mask is None else f", mask {list(mask.shape)}"),
            needed="z [E, T, C], y [E, T] and mask [E, T]: episodes, steps, units",
            fix="one long episode is [1, T, C]; flatten several batch dims into E",
        )
