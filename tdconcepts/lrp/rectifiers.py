"""The rules that change the backward pass of a ReLU: guided back-propagation, deconvolution, beta-smooth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.rules import Call, Rule

__all__ = ["BetaSmoothRule", "DeconvNetRule", "GuidedBackpropRule"]


@dataclasses.dataclass(frozen=True)
class GuidedBackpropRule(Rule):
    r"""Guided back-propagation: :math:`R_{in} = R \cdot 1[x > 0] \cdot 1[R > 0]`.

    What flows is a gradient that is not multiplied by anything: ``convention="relevance"``, the only form.

    Source: Springenberg et al., *Striving for simplicity*, 2015.

    Examples:
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with GuidedBackpropRule().on(torch.nn.ReLU()) as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([1.0, 1.0, -1.0]))[0]
        tensor([0., 1., 0.])
    """

    forms: ClassVar[Any] = ("relevance",)

    def carry(self, call: Call) -> Tensor:
        """A ReLU."""
        return backward_by(_guided, call.output, _one(self, call))


@dataclasses.dataclass(frozen=True)
class DeconvNetRule(Rule):
    r"""Deconvolution: :math:`R_{in} = \max(R, 0)`, whatever the input was.

    ``convention="relevance"`` is the only form, as of :class:`GuidedBackpropRule`.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014.

    Examples:
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with DeconvNetRule().on(torch.nn.ReLU()) as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([1.0, 1.0, -1.0]))[0]
        tensor([1., 1., 0.])
    """

    forms: ClassVar[Any] = ("relevance",)

    def carry(self, call: Call) -> Tensor:
        """A ReLU."""
        return backward_by(_deconv, call.output, _one(self, call), keep=False)


@dataclasses.dataclass(frozen=True)
class BetaSmoothRule(Rule):
    r"""Beta-smooth: the gradient of a softplus in the place of a ReLU's, :math:`R_{in} = \sigma(\beta x) R`.

    ``convention="relevance"`` is the only form, as of :class:`GuidedBackpropRule`.

    Args:
        beta: sharpness, > 0, in units of 1 / x.

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
        return backward_by(functools.partial(_smooth, self.beta), call.output, _one(self, call))


def _one(rule: Rule, call: Call) -> list[Tensor]:
    inputs = call.inputs
    if len(inputs) != 1 or not isinstance(call.output, Tensor) or inputs[0].shape != call.output.shape:
        raise call.cannot(rule, "it is no activation", "a ReLU, or another elementwise function of one input")
    return inputs


def _guided(flow: Tensor, x: Tensor) -> tuple[Tensor]:
    return (torch.where(x > 0, flow.clamp(min=0), 0.0),)


def _deconv(flow: Tensor) -> tuple[Tensor]:
    return (flow.clamp(min=0),)


def _smooth(beta: float, flow: Tensor, x: Tensor) -> tuple[Tensor]:
    return (torch.sigmoid(beta * x) * flow,)
