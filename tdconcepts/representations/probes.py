"""Linear probes: what can be read from a latent, in closed form and scored on episodes that were held out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tdconcepts.errors import BadType, BadValue

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
    all. Neighbouring steps are near copies, so held-out *steps* would flatter: whole episodes are held out.

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
    z, y, mask = _checked(z, y, ridge, mask, folds)
    episodes = mask.any(-1).nonzero().squeeze(-1)
    folds = min(folds, len(episodes))
    error = spread = torch.zeros((), dtype=torch.float64)
    for fold in range(folds):
        out = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        out[episodes[fold::folds]] = True
        weight, bias, _, centre = _solve(z[mask & ~out[:, None]], y[mask & ~out[:, None]], ridge)
        seen, label = z[mask & out[:, None]], y[mask & out[:, None]]
        error = error + (label - seen @ weight - bias).square().sum()
        spread = spread + (label - centre).square().sum()
    if not spread > 0:
        raise BadValue("the label is constant", got="a label with one value", needed="a label that varies")
    weight, bias, mean, _ = _solve(z[mask], y[mask], ridge)
    return RidgeProbe(weight.float(), bias.float(), mean.float(), float(1.0 - error / spread), int(mask.sum()))


def _solve(z: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, centre = z.mean(0), y.mean()
    centred = z - mean
    squares, axes = torch.linalg.eigh(centred.T @ centred)
    squares = squares.clamp(min=0.0) + ridge
    kept = squares > squares.amax() * len(squares) * torch.finfo(z.dtype).eps
    scale = torch.where(kept, 1.0 / torch.where(kept, squares, 1.0), 0.0)
    weight = axes @ (scale * (axes.T @ (centred.T @ (y - centre))))
    return weight, centre - mean @ weight, mean, centre


def _checked(z: Tensor, y: Tensor, ridge: float, mask: Tensor | None, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    given: dict[str, object] = {"z": z, "y": y}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = getattr(value, "dtype", type(value).__name__)
            raise BadType("a probe needs floating-point tensors", got=f"{name}: {kind}", fix=f"{name}.float()")
    if z.ndim != 3 or y.shape != z.shape[:2] or (mask is not None and mask.shape != y.shape):
        raise BadValue(
            "the shapes don't fit",
            got=f"z {list(z.shape)}, y {list(y.shape)}" + ("" if mask is None else f", mask {list(mask.shape)}"),
            needed="z [E, T, C], y [E, T] and mask [E, T]: episodes, steps, units",
            fix="one long episode is [1, T, C]; flatten several batch dims into E",
        )
    mask = torch.ones(y.shape, dtype=torch.bool, device=y.device) if mask is None else mask.bool()
    if not ridge >= 0.0 or folds < 2:
        got = f"ridge={ridge}, folds={folds}"
        raise BadValue("a setting is out of range", got=got, needed="ridge >= 0 and folds >= 2")
    if (count := int(mask.any(-1).sum())) < 2:
        raise BadValue("one episode can't be held out from itself", got=f"{count} with steps", needed="2 or more")
    z, y = z.detach().double(), y.detach().double()
    if not (bool(torch.isfinite(z[mask]).all()) and bool(torch.isfinite(y[mask]).all())):
        raise BadValue("values that are not finite", got="NaN or infinity in z or y", fix="mask= leaves steps out")
    return z, y, mask
