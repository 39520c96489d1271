"""Batch norms as part of the layer in front of them: folded while the model runs, with nothing written to it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch  # noqa: F401 - the examples use it
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.affine import by_channel, is_convolution, is_linear
from tdconcepts.lrp.composites import Composite
from tdconcepts.lrp.kinds import batch_norm
from tdconcepts.lrp.passing import PassRule

__all__ = ["FoldRule", "FoldedBatchNorm", "fold"]


def FoldedBatchNorm(otherwise: Rule | None = None) -> Composite:  # noqa: N802
    """Rules on top of a composite, by which batch norms count as part of the layer that ran in front of them.

    Args:
        otherwise: the rule of a batch norm that no layer with a rule ran in front of; default: pass.

    Examples:
        >>> from tdconcepts.lrp import EpsilonPlus
        >>> (EpsilonPlus() | FoldedBatchNorm()).rules[0][1]
        FoldRule(otherwise=PassRule(epsilon=1e-06))
    """
    return Composite({batch_norm: FoldRule(otherwise or PassRule())})


@dataclasses.dataclass(frozen=True)
class FoldRule(Rule):
    r"""A batch norm in evaluation mode, merged into the layer in front: :math:`W' = kW`, :math:`b' = k(b - m) + t`.

    :math:`k = \gamma / \sqrt{v + \epsilon}` for each output channel, :math:`t` the batch norm's bias. The rule of the
    layer then acts on the merged layer, and what flows goes straight from the batch norm's output to the layer's input.
    Which layer is in front is seen when the model runs: the one whose output *is* the batch norm's input, so a layer
    that was only declared next to it, or with an activation in between, is left alone.

    Args:
        otherwise: the rule where there is no such layer.

    Source: Hui and Binder, *BatchNorm decomposition for deep neural network interpretation*, 2019.

    Examples:
        >>> from tdconcepts.lrp import EpsilonRule
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.BatchNorm1d(3)).eval()
        >>> x = torch.randn(1, 2, 4, requires_grad=True)
        >>> rules = Composite({torch.nn.Conv1d: EpsilonRule()}) | FoldedBatchNorm()
        >>> with rules.on(net, convention="relevance") as m:
        ...     torch.autograd.grad(m(x).sum(), x)[0].shape
        torch.Size([1, 2, 4])
    """

    otherwise: Rule = PassRule()  # noqa: RUF009
    reads_before: ClassVar[bool] = True

    def carry(self, call: Call) -> Any:
        """A batch norm."""
        module: Any = call.module
        before = call.before
        if module is None or not batch_norm(module) or not _scales(module):
            return self.otherwise.carry(call)
        if before is None or not _fits(before[1]):
            return self.otherwise.carry(call)
        rule, layer, _ = before
        k, shift = _scale_and_shift(module)
        axis = (1, -1, *[1] * (layer.output.ndim - 2))
        merged = Call(layer.name, layer.function, layer.args, layer.kwargs, layer.output, layer)
        merged.output = layer.output * k.reshape(axis) + shift.reshape(axis)
        merged.folded = (k, shift)
        if call.report is not None:
            call.report.fold(call.name, layer.name)
        return backward_by(_same, call.output, [rule.carry(merged)], keep=False)


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _scales(module: Any) -> bool:
    return not module.training and module.running_var is not None


def _fits(call: Call) -> bool:
    """Whether the layer's outputs are the batch norm's channels."""
    module = call.module
    if module is None or call.folded is not None:
        return False
    return is_convolution(module) or (is_linear(module) and call.output.ndim == 2)


def _scale_and_shift(module: Any) -> tuple[Tensor, Tensor]:
    k = (module.running_var + module.eps).rsqrt()
    k = k if module.weight is None else k * module.weight
    shift = -module.running_mean * k
    return k, shift if module.bias is None else shift + module.bias


def fold(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``layer`` with the batch norm ``norm`` merged into it; neither is changed.

    For linear layers and all convolutions, transposed and grouped ones too; ``affine=False`` and a missing bias count
    as one and zero.

    Args:
        layer: a linear layer or a convolution.
        norm: a batch norm of its outputs, in evaluation mode.

    Raises:
        BadType: for another layer, or another norm. BadValue: for a batch norm in training mode, or without statistics.

    Examples:
        >>> layer, norm = torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3).eval()
        >>> weight, bias = fold(layer, norm)
        >>> x = torch.randn(1, 2, 4, 4)
        >>> torch.allclose(torch.conv2d(x, weight, bias), norm(layer(x)), atol=1e-6)
        True
    """
    if not (is_linear(layer) or is_convolution(layer)) or not batch_norm(norm):
        raise BadType(
            "no pair to fold",
            got=f"{type(layer).__name__} and {type(norm).__name__}",
            needed="a linear layer or a convolution, and a batch norm",
        )
    if not _scales(norm):
        raise BadValue(
            "the batch norm has no fixed scale",
            got=f"training={norm.training}, running_var={norm.running_var is not None}",
            fix="model.eval()",
        )
    k, shift = _scale_and_shift(norm)
    weight, bias = layer.weight, layer.bias
    return weight * by_channel(k, layer, weight), shift if bias is None else bias * k + shift
