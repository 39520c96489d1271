"""The epsilon family: relevance in proportion to each input's contribution, for any differentiable module."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch  # noqa: F401 - the examples use it
from torch import Tensor

from tdconcepts.hooks.flows import backward_by, changed, depends, overwritable
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.parameters import output_without
from tdconcepts.lrp.stabilizers import Stabilizing, check_stabilizer, damped, shared, stabilized

__all__ = ["EpsilonRule", "NormRule", "UniformEpsilonRule"]


@dataclasses.dataclass(frozen=True)
class EpsilonRule(Rule):
    r"""LRP-epsilon: :math:`R_i = x_i \sum_j \frac{\partial z_j}{\partial x_i} \frac{R_j}{\mathrm{stab}(z_j)}`.

    For a linear layer or a convolution :math:`z = Mx + b`, so :math:`R_{in} = x \odot M^T(R \oslash \mathrm{stab}(z))`;
    the bias, and epsilon, absorb what is theirs. It serves any differentiable module of any number of inputs; of an
    addition each summand gets its share, of a product each factor gets all (:class:`UniformEpsilonRule` shares).
    Gradient convention: :math:`G_{in} = J^T(G \odot z \oslash \mathrm{stab}(z))`.

    Args:
        epsilon: added to :math:`z` with its sign, in units of :math:`z`; or a stabiliser. 0 gives LRP-0.
        zero_params: names of parameters that count as zero, ``("bias",)`` for instance.

    Raises:
        BadType: for what is no stabiliser. BadValue: a negative epsilon; at the call, for an output that is no tensor
            and no tree of them, and for a name that is no parameter.

    Source: Bach et al., *On pixel-wise explanations*, 2015, eq. 58.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> _ = layer.weight.data.fill_(0.5)
        >>> with EpsilonRule().on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[4.0]]))[0].round(decimals=4)
        tensor([[1., 3.]])
    """

    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()
    scaled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)
        if isinstance(self.zero_params, str):
            object.__setattr__(self, "zero_params", (self.zero_params,))

    def is_plain(self, convention: str, name: str = "") -> bool:
        """LRP-0 is the ordinary gradient in the gradient convention."""
        return convention == "gradient" and self.epsilon == 0 and not self.zero_params

    def carry(self, call: Call) -> Any:
        """Any output: a tensor, or tuples, lists and dicts of them."""
        output = call.output
        if isinstance(output, Tensor):
            return self._carried(call, output, self._denominator(call))
        if self.zero_params or not isinstance(output, (tuple, list, dict)):
            why = f"it writes a {type(output).__name__}" + (", with zero_params" if self.zero_params else "")
            raise call.cannot(self, why, "a rule on the modules inside it")
        return changed(output, lambda value: self._carried(call, value, None) if depends(value) else value)

    def _carried(self, call: Call, z: Tensor, denominator: Tensor | None) -> Tensor:
        formula = functools.partial(_epsilon, self.epsilon, call.carries_relevance, self._shares(call))
        if denominator is not None:
            return backward_by(formula, z, [denominator], denominator, call.kept(z), keep=False)
        return backward_by(formula, z, [z], call.kept(z), keep=False)

    def _denominator(self, call: Call) -> Tensor | None:
        """The output with parameters zeroed, where some are."""
        return output_without(call, self, self.zero_params) if self.zero_params else None

    def _shares(self, call: Call) -> int:
        return 1


def _epsilon(
    by: Stabilizing, relevance: bool, shares: int, flow: Tensor, z: Tensor, a: Tensor | None = None
) -> tuple[Tensor]:
    """The cotangent of the denominator ``z``, for an output ``a`` where that is another one."""
    fresh = overwritable(flow)
    if relevance:
        new = shared(flow, z, by, fresh)
    elif a is None:
        new = damped(flow, z, by, fresh)
    else:
        new = flow * (a / stabilized(z, by))
    return (new / shares if shares > 1 else new,)


@dataclasses.dataclass(frozen=True)
class NormRule(EpsilonRule):
    r"""Epsilon for what has no parameters, average pooling and sums: :math:`R_i = x_i \cdot J^T(R \oslash z)`.

    The formula of :class:`EpsilonRule`, with another name in the printed table.

    Args:
        epsilon: a number or a stabiliser.
        zero_params: as in :class:`EpsilonRule`.

    Source: Bach et al., *On pixel-wise explanations*, 2015, eq. 58.

    Examples:
        >>> x = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
        >>> with NormRule().on(torch.nn.AvgPool1d(2), convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[[4.0]]]))[0].round(decimals=4)
        tensor([[[1., 3.]]])
    """


@dataclasses.dataclass(frozen=True)
class UniformEpsilonRule(EpsilonRule):
    r"""Epsilon, shared equally between n inputs: :math:`R_i = \frac1n x_i \odot J_i^T(R \oslash \mathrm{stab}(z))`.

    For products of two values that both depend on the explained input: ``a * b``, ``a @ b``. An input that does not
    depend on it takes no share. Gradient convention: the ordinary gradient, divided by n.

    Args:
        epsilon: a number or a stabiliser.
        zero_params: as in :class:`EpsilonRule`.

    Source: Achtibat et al., *AttnLRP*, 2024, eqs. 13 and 14.

    Examples:
        >>> from tdconcepts.lrp import UniformEpsilonRule
        >>> class Product(torch.nn.Module):
        ...     def forward(self, a, b):
        ...         return a * b
        >>> a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
        >>> with UniformEpsilonRule().on(Product(), convention="relevance") as m:
        ...     [r.round(decimals=4) for r in torch.autograd.grad(m(a, b), [a, b], torch.tensor([4.0]))]
        [tensor([2.]), tensor([2.])]
    """

    def is_plain(self, convention: str, name: str = "") -> bool:
        """Never: it divides by the number of inputs."""
        return False

    def _shares(self, call: Call) -> int:
        return max(1, len(call.inputs))
