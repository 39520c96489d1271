"""The rules that pass relevance on as it is, in equal parts, or not at all."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdconcepts.hooks.flows import backward_by, changed, depends, overwritable, untransformed
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.hooks.twice import now
from tdconcepts.lrp.stabilizers import Stabilizing, check_stabilizer, shared, stabilized

__all__ = [
    "ConstantRule",
    "IgnoreRule",
    "NumeratorRule",
    "PassRule",
    "PseudoIdentityRule",
    "StopRule",
    "UniformRule",
]


@dataclasses.dataclass(frozen=True)
class PassRule(Rule):
    r"""Pass: :math:`R_{in} = R`, also where an activation is inactive.

    Gradient convention: :math:`G_{in} = G \odot z \oslash \mathrm{stab}(x)`, so that :math:`x \odot G` is passed on.

    Args:
        epsilon: a number or a stabiliser, for the division by x in the gradient convention.

    Raises:
        BadValue: at the call, for a module whose output has another shape than its one input.

    Source: Bach et al., *On pixel-wise explanations*, 2015, section 2.3 (activations).

    Examples:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> with PassRule().on(nn.ReLU(), convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([3.0, 4.0]))[0]
        tensor([3., 4.])
    """

    epsilon: Stabilizing = 1e-6
    passes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def is_plain(self, convention: str, name: str = "") -> bool:
        """In the gradient convention a rectifier's own gradient passes relevance on."""
        return convention == "gradient" and name == "relu"

    def carry(self, call: Call) -> Tensor:
        """One input and one output of one shape."""
        inputs, z = call.inputs, call.output
        if not isinstance(z, Tensor) or len(inputs) != 1 or inputs[0].shape != z.shape:
            shapes = [list(value.shape) for value in inputs]
            raise call.cannot(
                self,
                f"inputs of shapes {shapes}, output {list(z.shape) if isinstance(z, Tensor) else type(z).__name__}",
                "UniformRule shares between several inputs, EpsilonRule changes shapes",
            )
        if call.carries_relevance:
            return backward_by(_same, z, inputs, keep=False)
        if _is_relu(call):
            return z  # its gradient passes x * G on
        return backward_by(functools.partial(_quotient, self.epsilon), z, inputs, call.kept(z))


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _quotient(by: Stabilizing, flow: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor]:
    fresh = overwritable(flow)
    ratio = shared(z, x, by, fresh)
    return (ratio.mul_(flow) if fresh and ratio.shape == flow.shape else ratio * flow,)


def _is_relu(call: Call) -> bool:
    return isinstance(call.module, (nn.ReLU, nn.Identity)) or call.name == "relu"


@dataclasses.dataclass(frozen=True)
class IgnoreRule(Rule):
    r"""Ignore: the ordinary backward pass, :math:`J^T` of what flows.

    For what moves values without changing them (max pooling, dropout, reshapes), and to say of a module or an
    operation that its gradient is right.

    Source: none; it is what back-propagation does.

    Examples:
        >>> x = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
        >>> with IgnoreRule().on(nn.MaxPool1d(2), convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[[4.0]]]))[0]
        tensor([[[0., 4.]]])
    """

    def carry(self, call: Call) -> Any:
        """Anything."""
        return call.output


@dataclasses.dataclass(frozen=True)
class UniformRule(Rule):
    r"""Uniform: equal parts to n inputs, :math:`R_k = R / n`.

    An input of another shape than the output gets the sum over what it was broadcast to. Gradient convention: each
    gets :math:`G \odot z \oslash (n\,\mathrm{stab}(x_k))`.

    Args:
        epsilon: a number or a stabiliser, for the division by x in the gradient convention.

    Raises:
        BadValue: at the call, for inputs that do not broadcast to the output.

    Source: Achtibat et al., *AttnLRP*, 2024 (section 3.3).

    Examples:
        >>> class Sum(nn.Module):
        ...     def forward(self, a, b):
        ...         return a + b
        >>> a, b = torch.tensor([1.0], requires_grad=True), torch.tensor([7.0], requires_grad=True)
        >>> with UniformRule().on(Sum(), convention="relevance") as m:
        ...     torch.autograd.grad(m(a, b), [a, b], torch.tensor([4.0]))
        (tensor([2.]), tensor([2.]))
    """

    epsilon: Stabilizing = 1e-6

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """Inputs that broadcast to the output."""
        z, inputs = call.output, call.inputs
        try:
            spread = [value.expand(z.shape) for value in inputs]
        except (RuntimeError, AttributeError):
            shapes = [list(value.shape) for value in inputs]
            raise call.cannot(self, f"inputs of shapes {shapes} do not broadcast to the output") from None
        if call.carries_relevance:
            return backward_by(functools.partial(_equal, len(spread)), z, spread, keep=False)
        formula = functools.partial(_equal_ratios, self.epsilon)
        return backward_by(formula, z, spread, call.kept(z))


def _equal(n: int, flow: Tensor) -> tuple[Tensor, ...]:
    return (flow / n,) * n


def _equal_ratios(by: Stabilizing, flow: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    *inputs, z = given
    return tuple(flow * z / stabilized(x, by) / len(inputs) for x in inputs)


@dataclasses.dataclass(frozen=True)
class StopRule(Rule):
    r"""Stop: :math:`R_{in} = 0`.

    What lies in front gets zeros from here, also where this is the only way.

    Source: none; attention weights held constant are an example (Ali et al., 2022).

    Examples:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> with StopRule().on(nn.Tanh()) as m:
        ...     torch.autograd.grad(m(x), x)[0]
        tensor([0.])
    """

    def carry(self, call: Call) -> Any:
        """Anything; each output becomes a constant."""
        inputs = call.inputs
        stop = functools.partial(_nothing, [tuple(value.shape) for value in inputs])
        return changed(call.output, lambda z: backward_by(stop, z, inputs, keep=False) if depends(z) else z)


def _nothing(shapes: list[tuple[int, ...]], flow: Tensor) -> tuple[Tensor, ...]:
    return tuple(flow.new_zeros(shape) for shape in shapes)


@dataclasses.dataclass(frozen=True)
class ConstantRule(Rule):
    r"""Constant: the output does not depend on the input, so a product with it gives all to the other factor.

    :class:`StopRule` stops relevance that has arrived; this says that none arrives. For attention weights (CP-LRP) and
    the scale of a normalisation.

    Source: Ali et al., *XAI for transformers*, 2022.

    Examples:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> with ConstantRule().on(nn.Tanh()) as m:
        ...     m(x).requires_grad
        False
    """

    def carry(self, call: Call) -> Any:
        """Anything."""
        return changed(call.output, constant)


def constant(value: Tensor) -> Tensor:
    """``value``, which nothing flows to; where second derivatives are wanted, it changes with the input all the same.

    Examples:
        >>> constant(torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    return value.detach() if now() is None else backward_by(_none, value, [], keep=False)


def _none(flow: Tensor) -> tuple[()]:
    return ()


@dataclasses.dataclass(frozen=True)
class NumeratorRule(Rule):
    r"""A quotient: all to the numerator, :math:`G_a = G / b`; relevance convention: :math:`R_a = R`.

    Raises:
        BadValue: at the call, for what has not two operands.

    Source: Ali et al., *XAI for transformers*, 2022 (normalisations have constant scales).

    Examples:
        >>> class Normalised(nn.Module):
        ...     def forward(self, x):
        ...         return x / x.norm()
        >>> from tdconcepts.lrp import Composite
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> with Composite(operations={"div": NumeratorRule()}, on_missing="gradient").on(Normalised()) as m:
        ...     torch.autograd.grad(m(x).sum(), x)[0]
        tensor([0.2000, 0.2000])
    """

    def carry(self, call: Call) -> Any:
        """``a / b``."""
        if len(call.args) < 2:
            raise call.cannot(self, "it has not two operands", "EpsilonRule")
        a, b = call.args[:2]
        if operation_reversed(call.function):
            a, b = b, a
        z = call.output
        if not depends(a):
            return constant(z)
        relevance = call.carries_relevance
        b = torch.as_tensor(b, dtype=z.dtype, device=z.device)
        b = b.detach() if now() is None else b
        spread = a.expand(z.shape)
        return backward_by(functools.partial(_numerator, relevance), z, [spread], b, keep=False)


def _numerator(relevance: bool, flow: Tensor, b: Tensor) -> tuple[Tensor]:
    return (flow if relevance else flow / b,)


def operation_reversed(function: Any) -> bool:
    """Whether a function is the reflected form of an operator: ``2 / x``."""
    return getattr(function, "__name__", "").startswith("__r")


@dataclasses.dataclass(frozen=True)
class PseudoIdentityRule(Rule):
    r"""The identity rule in the gradient convention: :math:`G_{in} = G \odot f(x) \oslash \mathrm{stab}(x)`.

    So that :math:`x \odot G_{in} = f(x) \odot G`, the relevance as it came. Where :math:`|x| \le \epsilon` it is the
    limit :math:`f'(x)`: half for GELU and SiLU at 0. Relevance convention: :math:`R_{in} = R`.

    Args:
        epsilon: added to x with its sign; a number >= 0.

    Raises:
        BadValue: at the call, for a module whose output has another shape than its one input.

    Source: Achtibat et al., *AttnLRP*, 2024 (section 3.3); the limit is ours.

    Examples:
        >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> with PseudoIdentityRule().on(nn.SiLU()) as m:
        ...     torch.autograd.grad(m(x).sum(), x)[0].round(decimals=3)
        tensor([0.5000, 0.8810])
    """

    epsilon: float = 1e-6
    forms: ClassVar[Any] = ("gradient", "relevance")
    passes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def is_plain(self, convention: str, name: str = "") -> bool:
        """As :class:`PassRule`."""
        return convention == "gradient" and name == "relu"

    def carry(self, call: Call) -> Tensor:
        """An elementwise function."""
        z, inputs = call.output, call.inputs
        if not isinstance(z, Tensor) or len(inputs) != 1 or inputs[0].shape != z.shape:
            raise call.cannot(self, "it is no elementwise function of one input", "EpsilonRule or IgnoreRule")
        if call.carries_relevance:
            return backward_by(_same, z, inputs, keep=False)
        if _is_relu(call):
            return z
        x, saved = inputs[0], call.kept(z)
        if untransformed(x) and (x.numel() == 0 or bool(x.detach().abs().amin() > self.epsilon)):
            return backward_by(functools.partial(_quotient, self.epsilon), z, [x], saved)
        return backward_by(functools.partial(_pseudo, self.epsilon), z, [x, z], x, saved, keep=False)


def _pseudo(by: float, flow: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    near = x.abs() <= (1e-12 if callable(by) else by)
    ratio = torch.where(near, 0.0, z / torch.where(near, 1.0, stabilized(x, by)))
    return flow * ratio, torch.where(near, flow, 0.0)
