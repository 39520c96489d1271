"""Controls for claims about an edit: as large a change, in another direction."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadType
from tdconcepts.hooks.edits import Edit
from tdconcepts.hooks.programs import EditLike, checked_edit
from tdconcepts.keys import NestedKey, as_key

__all__ = ["MatchedNorm"]


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedNorm(Edit):
    r"""The change of an edit, turned by a fixed random rotation: :math:`x' = x + (\mathrm{edit}(x) - x)\,Q^\top`.

    Every row moves as far as the edit would move it, and rows that the edit moves in opposite ways still move in
    opposite ways; only the direction is another one. What the edit does and this does not is due to the direction. With
    ``RemoveDirection(u)`` it shifts along ``Q u`` by what each row has along ``u``.

    Args:
        edit: the edit that is controlled.
        seed: of the rotation, which is drawn for the size of the last dim, uniformly (Haar).

    Raises:
        BadType: for what is no edit, or a value of whole numbers.

    Source: random vectors of the same norm as controls of steering: Turner et al. 2023, "Activation addition".

    Examples:
        >>> from tdconcepts import Ablate
        >>> x = torch.randn(5, 8)
        >>> new = MatchedNorm(Ablate([3]), seed=0)(x, None)
        >>> torch.allclose((new - x).norm(dim=-1), x[:, 3].abs(), atol=1e-5)
        True
    """

    edit: EditLike
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.edit):
            raise BadType("not an edit", got=repr(self.edit), needed="Ablate(), Replace(...), or a callable")

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the edit reads."""
        return [as_key(key) for key in getattr(self.edit, "in_keys", ())]

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        if not value.is_floating_point():
            raise BadType("whole numbers have no directions", got=str(value.dtype), needed="floating-point values")
        own = value if isinstance(self.edit, Edit) else value.clone()  # which a callable may change in place
        new = self.edit(own, td)
        change = checked_edit(own if new is None else new, value, "a controlled edit") - value
        return value + change @ _rotation(value.shape[-1], self.seed).to(value).mT


def _rotation(size: int, seed: int) -> Tensor:
    """A rotation, uniform over all: the QR factors of a Gaussian matrix, with the signs that make them unique."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turned, upper = torch.linalg.qr(drawn)
    return turned * upper.diagonal().sign()
