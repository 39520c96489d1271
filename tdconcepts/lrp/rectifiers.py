"""The rules that change the backward pass of a ReLU: guided back-propagation, deconvolution, beta-smooth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.rectifiers import DeconvNetRule, GuidedBackpropRule, rectified
from tdconcepts.hooks.rules import Call, Rule

__all__ = ["BetaSmoothRule", "DeconvNetRule", "GuidedBackpropRule"]


@dataclasses.dataclass(frozen=True)
class BetaSmoothRule(Rule):
    r"""Beta-smooth: the gradient of a softplus in the place of a ReLU's, :math:`R_{in} = \sigma(\beta x) R`.

    ``convention="relevance"`` is the only form, as of :class:`GuidedBackpropRule`.

    Args:
        beta: sharpness, > 0, in units of 1 / x.

    Raises:
        BadValue: a beta that is not positive; at the call, for what is no ReLU.

    Source: Dombrowski et al., *Explanations can be manipulated and geometry is to blame*, 2019.

    Examples:
        >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> with BetaSmoothRule(10.0).on(torch.nn.ReLU()) as m:
        ...     torch.autograd.grad(m(x).sum(), x)[0].round(decimals=3)
        tensor([0.5000, 1.0000])
    """

    beta: float = 10.0
    forms: ClassVar[Any] = ("relevance",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise BadValue("not a beta", got=repr(self.beta), needed="a number > 0")

    def carry(self, call: Call) -> Tensor:
        """A ReLU."""
        return backward_by(functools.partial(_smooth, self.beta), call.output, rectified(self, call))


def _smooth(beta: float, flow: Tensor, x: Tensor) -> tuple[Tensor]:
    return (torch.sigmoid(beta * x) * flow,)
