"""Where relevance starts: at a target's value or at one, once or once for each of several conditions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target
from tdconcepts.hooks.flows import backward_by
from tdconcepts.lrp.conditions import which

__all__ = ["Started"]


class Started(Target):
    r"""A target whose number is the relevance that a propagation starts with, and whose pull-back starts from it.

    The relevance is :math:`R = y`, or 1; what flows first is :math:`R` in the relevance convention, its ratio
    :math:`R / y` in the gradient convention. While several conditions are explained, :math:`y` counts as so many
    targets.

    Args:
        target: what is explained.
        start: ``"value"`` or ``"ones"``.
        relevance: whether relevance flows, not its ratio to the activation.

    Raises:
        BadValue: at the call, for several targets under several conditions.

    Examples:
        >>> y = torch.tensor([-2.0, 4.0], requires_grad=True)
        >>> relevance, _ = Started(Target("y"), "value", relevance=True).read(y, None, 1)
        >>> relevance.tolist(), torch.autograd.grad(relevance.sum(), y)[0].tolist()
        ([-2.0, 4.0], [-2.0, 4.0])
        >>> relevance, _ = Started(Target("y"), "ones", relevance=False).read(y, None, 1)
        >>> relevance.tolist(), torch.autograd.grad(relevance.sum(), y)[0].tolist()
        ([1.0, 1.0], [-0.5, 0.25])
    """

    def __init__(self, target: Target, start: str, relevance: bool) -> None:
        super().__init__(target.of, target.select, target.by)
        for name, value in (("target", target), ("start", start), ("relevance", relevance)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "target" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["target"], name)

    def read(self, value: Tensor, td: TensorDictBase, lead: int, held: Tensor | None = None) -> tuple[Tensor, bool]:
        """The relevance to start with, ``[*B]`` and False, or ``[*B, T]`` and True."""
        this = vars(self)
        values, several = this["target"].read(value, td, lead, held)
        if this["start"] == "value":
            values = backward_by(_times, values, [values]) if this["relevance"] else values
        elif this["relevance"]:
            values = backward_by(_same, torch.ones_like(values), [values], keep=False)
        else:
            values = backward_by(_over, (values != 0).to(values.dtype), [values])
        one = which()
        if one is None:
            return values, several
        if several:
            raise BadValue(
                "several targets under several conditions",
                got=f"{this['target']!r} and {one.count} conditions",
                needed="several of one of them",
                fix="one explainer for each target",
            )
        return one.spread(values), True


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _times(flow: Tensor, y: Tensor) -> tuple[Tensor]:
    return (flow * y,)


def _over(flow: Tensor, y: Tensor) -> tuple[Tensor]:
    return (torch.where(y == 0, 0.0, flow / torch.where(y == 0, 1.0, y)),)
