"""The changed backward passes of a ReLU that several rooms use: guided back-propagation and deconvolution."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdconcepts.hooks.flows import backward_by, overwritable
from tdconcepts.hooks.rules import Call, Rule

__all__ = ["DeconvNetRule", "GuidedBackpropRule", "rectified"]


@dataclasses.dataclass(frozen=True)
class GuidedBackpropRule(Rule):
    r"""Guided back-propagation: :math:`R_{in} = R \cdot 1[x > 0] \cdot 1[R > 0]`.

    What flows is a gradient that is not multiplied by anything: ``convention="relevance"``, the only form.

    Source: Springenberg et al., *Striving for simplicity*, 2015.

    Examples:
        >>> import torch
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with GuidedBackpropRule().on(torch.nn.ReLU()) as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([1.0, 1.0, -1.0]))[0]
        tensor([0., 1., 0.])
    """

    forms: ClassVar[Any] = ("relevance",)
    on_nodes: ClassVar[bool] = True

    def hang(self, node: Any) -> Any:
        """What flows in is positive, and then its own backward pass."""
        return node.register_prehook(_positive_only)

    def carry(self, call: Call) -> Tensor:
        """A ReLU."""
        inputs = rectified(self, call)
        if type(call.module) is nn.ReLU or (call.module is None and call.name == "relu"):
            return backward_by(_guided, call.output, inputs, call.kept(call.output.detach()), keep=False)
        return backward_by(_positive, call.output, [call.output], keep=False)  # and then its own backward pass


@dataclasses.dataclass(frozen=True)
class DeconvNetRule(Rule):
    r"""Deconvolution: :math:`R_{in} = \max(R, 0)`, whatever the input was.

    ``convention="relevance"`` is the only form, as of :class:`GuidedBackpropRule`.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014.

    Examples:
        >>> import torch
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with DeconvNetRule().on(torch.nn.ReLU()) as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([1.0, 1.0, -1.0]))[0]
        tensor([1., 1., 0.])
    """

    forms: ClassVar[Any] = ("relevance",)
    on_nodes: ClassVar[bool] = True

    def hang(self, node: Any) -> Any:
        """What flows out is what flows in, where that is positive."""
        return node.register_hook(lambda out, flows: _positive_only(flows))

    def carry(self, call: Call) -> Tensor:
        """A ReLU."""
        return backward_by(_positive, call.output, rectified(self, call), keep=False)


def rectified(rule: Rule, call: Call) -> list[Tensor]:
    """The one input of an elementwise call.

    Raises:
        BadValue: for anything else.
    """
    inputs = call.inputs
    if len(inputs) != 1 or not isinstance(call.output, Tensor) or inputs[0].shape != call.output.shape:
        raise call.cannot(rule, "it is no activation", "a ReLU, or another elementwise function of one input")
    return inputs


def _positive(flow: Tensor) -> tuple[Tensor]:
    return (flow.clamp(min=0),)


def _positive_only(flows: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same at a node, where nothing may flow."""
    return tuple([None if flow is None else flow.clamp(min=0) for flow in flows])


def _guided(flow: Tensor, output: Tensor) -> tuple[Tensor]:
    if overwritable(flow):  # what is made of it, that is
        return (torch.ops.aten.threshold_backward(flow, output, 0).clamp_(min=0),)
    return (flow.clamp(min=0) * (output > 0),)
