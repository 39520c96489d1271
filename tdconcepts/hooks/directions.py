"""Removing a direction from a latent: the edit behind "is what a probe reads also used?"."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.edits import Edit

__all__ = ["RemoveDirection", "random_directions"]


@dataclasses.dataclass(frozen=True, eq=False)
class RemoveDirection(Edit):
    r"""An edit that projects one direction out of a latent: :math:`z \leftarrow z - ((z - \mu) \cdot u)\,u`.

    After it, the latent's component along ``u`` is that of ``mean`` in every row; all components across ``u`` are as
    they were. It is an edit for :func:`~tdconcepts.patch`, picklable; it follows the latent's device and dtype.

    ============================== ==============================
    reads                          gives back
    ============================== ==============================
    the edited value ``[*B, C]``   the new value ``[*B, C]``
    ============================== ==============================

    Args:
        direction: ``u`` ``[C]``, of any length but zero; it is brought to length one.
        mean: ``mu`` ``[C]``, where the latent is moved to along ``u``; default zeros.

    Raises:
        BadValue: a direction of length zero or not finite, a mean of another shape, a value whose last dim is not C.
        BadType: something else than floating-point tensors.

    Source: McGrath et al. 2022 and Ravfogel et al. 2020, "Null it out", eq. 2 with one direction.

    Examples:
        >>> edit = RemoveDirection(torch.tensor([0.0, 2.0]), mean=torch.tensor([1.0, 1.0]))
        >>> edit(torch.tensor([[5.0, 7.0], [3.0, -4.0]]))
        tensor([[5., 1.],
                [3., 1.]])
    """

    direction: Tensor
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        for name, vector in (("direction", self.direction), ("mean", self.mean)):
            if vector is None and name == "mean":
                continue
            if not isinstance(vector, Tensor) or not vector.is_floating_point():
                kind = str(vector.dtype) if isinstance(vector, Tensor) else type(vector).__name__
                raise BadType(f"the {name} is no floating-point tensor", got=kind, needed="a tensor of shape [C]")
            if vector.ndim != 1 or vector.shape != self.direction.shape:
                raise BadValue(
                    f"the {name} is no vector of the latent's size",
                    got=f"shape {list(vector.shape)}",
                    needed="[C]" if name == "direction" else f"{list(self.direction.shape)}, as the direction",
                )
            if not bool(torch.isfinite(vector).all()):
                raise BadValue(f"the {name} is not finite", got=f"{vector.tolist()}", needed="finite numbers")
        length = self.direction.detach().double().norm()
        if not length > 0:
            raise BadValue("the direction has length zero", got="|direction| = 0", needed="a direction to remove")
        object.__setattr__(self, "direction", (self.direction.detach().double() / length).to(self.direction.dtype))
        object.__setattr__(self, "mean", None if self.mean is None else self.mean.detach().clone())

    def __call__(self, value: Tensor, td: TensorDictBase | None = None) -> Tensor:
        """``value`` without the direction; ``td`` is not read."""
        if value.shape[-1:] != self.direction.shape:
            raise BadValue(
                "the latent has another size than the direction",
                got=f"a value of shape {list(value.shape)}",
                needed=f"a last dim of {len(self.direction)}",
            )
        unit = self.direction.to(value)
        along = value @ unit if self.mean is None else (value - self.mean.to(value)) @ unit
        return value - along.unsqueeze(-1) * unit

    def __repr__(self) -> str:
        size = len(self.direction)
        return f"RemoveDirection([{size}]" + ("" if self.mean is None else f", mean=[{size}]") + ")"


def random_directions(count: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` directions of length one, uniform on the sphere: the control of every claim about a direction.

    Args:
        count: how many.
        size: C, the latent's size.
        generator: the source of randomness; ``None`` is the global one.

    Returns:
        ``[count, size]``.

    Raises:
        BadValue: a count below zero or a size below one.

    Examples:
        >>> random_directions(3, 64, torch.Generator().manual_seed(0)).norm(dim=-1)
        tensor([1., 1., 1.])
    """
    if count < 0 or size < 1:
        got = f"count={count}, size={size}"
        raise BadValue("no directions of that number and size", got=got, needed="count >= 0 and size >= 1")
    device = generator.device if generator is not None else None
    drawn = torch.randn(count, size, generator=generator, dtype=torch.float64, device=device)
    return torch.nn.functional.normalize(drawn, dim=-1).to(torch.get_default_dtype())
