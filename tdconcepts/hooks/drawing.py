"""Where random numbers come from: a generator of the caller's that can be copied and pickled, or torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from tdconcepts.errors import BadType

__all__ = ["Source"]


class Source:
    """A source of random numbers: the same state of the generator, the same draws, on any device.

    Args:
        generator: a ``torch.Generator``, or None for torch's own.

    Raises:
        BadType: for anything else.

    Examples:
        >>> one, two = (Source(torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(one.uniform(3), two.uniform(3))
        True
        >>> sorted(one.permutations(1, 3)[0].tolist())
        [0, 1, 2]
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if not (generator is None or isinstance(generator, torch.Generator)):
            needed = "a torch.Generator or None"
            raise BadType("not a generator", got=repr(generator), needed=needed, fix="torch.Generator().manual_seed(0)")
        self.generator = generator

    @property
    def device(self) -> torch.device:
        """Where the draws are made."""
        return torch.device("cpu") if self.generator is None else self.generator.device

    def uniform(self, *size: int) -> Tensor:
        """Float32 draws from [0, 1)."""
        return torch.rand(*size, generator=self.generator, device=self.device)

    def normal(self, *size: int) -> Tensor:
        """Float32 draws from the standard normal distribution."""
        return torch.randn(*size, generator=self.generator, device=self.device)

    def permutations(self, n: int, length: int) -> Tensor:
        """``n`` random orders of ``range(length)``, ``[n, length]``."""
        return torch.rand(n, length, generator=self.generator, device=self.device, dtype=torch.float64).argsort(
            stable=True
        )

    def choices(self, weights: Tensor, n: int) -> Tensor:
        """``n`` positions ``[n]``, each drawn with a chance in proportion to its weight."""
        chances = weights.to(self.device, torch.float64).cumsum(0)
        drawn = self.uniform(n).double() * chances[-1]
        return torch.searchsorted(chances, drawn, right=True).clamp(max=len(weights) - 1)
