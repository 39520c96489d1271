"""Stabilisers: what keeps a denominator away from zero without changing its sign."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tdconcepts.errors import BadType, BadValue

__all__ = ["Stabilizer", "Stabilizing", "check_number", "check_stabilizer", "damped", "shared", "stabilized"]


@dataclasses.dataclass(frozen=True)
class Stabilizer:
    r"""A denominator that is not zero: :math:`z + \epsilon\,\mathrm{sgn}(z)`, with :math:`\mathrm{sgn}(0) = +1`.

    Args:
        epsilon: how far away from zero, 0 or more; in units of ``z``, or of its size with ``norm_scale``.
        clip: :math:`\mathrm{sgn}(z)\max(|z|, \epsilon)` instead, which leaves large values as they are.
        norm_scale: :math:`\epsilon\sqrt{\mathrm{mean}(z^2)}` in the place of :math:`\epsilon`.
        dims: what the mean runs over; default: all dims but the first.

    Raises:
        BadValue: a negative epsilon.

    Source: Bach et al., *On pixel-wise explanations*, 2015, eq. 58 (the signed sum).

    Examples:
        >>> Stabilizer(0.5)(torch.tensor([-1.0, 0.0, 2.0])), Stabilizer(0.5, clip=True)(torch.tensor([-0.1, 0.0, 2.0]))
        (tensor([-1.5000,  0.5000,  2.5000]), tensor([-0.5000,  0.5000,  2.0000]))
    """

    epsilon: float = 1e-6
    clip: bool = False
    norm_scale: bool = False
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, (int, float)) or not self.epsilon >= 0:
            raise BadValue("not an epsilon", got=repr(self.epsilon), needed="a number >= 0")

    def __call__(self, z: Tensor) -> Tensor:
        """``z``, away from zero."""
        epsilon: float | Tensor = self.epsilon
        if self.norm_scale:
            dims = tuple(range(1, z.ndim)) if self.dims is None else self.dims
            epsilon = epsilon * (z.square().mean(dims, keepdim=True) if dims else z.square()).sqrt()
        if self.clip:
            away = torch.where(z < 0, -1.0, 1.0).to(z.dtype) * torch.clamp(z.abs(), min=epsilon)
        else:
            away = torch.where(z < 0, z - epsilon, z + epsilon)
        if self.epsilon and not self.norm_scale:
            return away
        return torch.where(away == 0, torch.inf, away)  # 0 divided by it is 0, as for a row of zeros without a scale


Stabilizing: TypeAlias = float | Callable[[Tensor], Tensor]


def check_number(name: str, given: object) -> None:
    """Raise for what is no number.

    Args:
        name: what the error calls it.
        given: what was given.

    Raises:
        BadType: for anything else, a bool too.

    Examples:
        >>> check_number("alpha", 2)
    """
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise BadType(f"{name} is no number", got=repr(given), needed="a number")


def check_stabilizer(given: object) -> None:
    """Raise for what is neither a number nor callable.

    Args:
        given: a number >= 0, a :class:`Stabilizer` or any callable.

    Raises:
        BadType: for anything else. BadValue: for a negative number.

    Examples:
        >>> check_stabilizer(1e-6), check_stabilizer(Stabilizer(1e-6, clip=True))
        (None, None)
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        Stabilizer(given)
    elif not callable(given):
        raise BadType(
            "not a stabiliser",
            got=repr(given),
            needed="a number >= 0, a Stabilizer, or a callable z -> stabilised z",
            fix="Stabilizer(1e-6, clip=True)",
        )


def stabilized(z: Tensor, by: Stabilizing) -> Tensor:
    """``z``, kept away from zero by a number, a :class:`Stabilizer` or any callable.

    By 0 it stays as it is; where it is 0 itself it becomes infinite, so that a quotient is 0.

    Args:
        z: a denominator.
        by: see :class:`Stabilizer`.

    Examples:
        >>> stabilized(torch.tensor([-1.0, 0.0]), 0.5), stabilized(torch.tensor([-1.0, 0.0]), 0.0)
        (tensor([-1.5000,  0.5000]), tensor([-1., inf]))
    """
    if callable(by):
        return by(z)
    return torch.copysign(z.new_full((), by), z) + z if by else torch.where(z == 0, torch.inf, z)


def shared(flow: Tensor, z: Tensor, by: Stabilizing, fresh: bool = False) -> Tensor:
    """``flow / stabilized(z, by)``.

    Args:
        flow: what is shared.
        z: the denominator.
        by: see :class:`Stabilizer`.
        fresh: in one piece of new memory, where nothing asks for a graph.

    Examples:
        >>> shared(torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
        tensor([2.])
    """
    if not fresh or callable(by) or not by:
        return flow / stabilized(z, by)
    found = torch.copysign(z.new_full((), by), z).add_(z)
    return torch.div(flow, found, out=found) if found.shape == flow.shape else flow / found


def damped(flow: Tensor, z: Tensor, by: Stabilizing, fresh: bool = False) -> Tensor:
    """``flow * z / stabilized(z, by)``: as it is for a large ``z``, nothing for a small one.

    Args:
        flow: what is damped.
        z: the denominator.
        by: see :class:`Stabilizer`.
        fresh: as of :func:`shared`.

    Examples:
        >>> damped(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 0.0]), 0.5)
        tensor([2., 0.])
    """
    if callable(by):
        return flow * (z / by(z))
    if not by:
        return flow
    size = z.abs()
    size = size.add_(by) if fresh else size + by
    alone = fresh and size.shape == flow.shape
    return torch.addcdiv(flow, flow, size, value=-by, out=size if alone else None)
