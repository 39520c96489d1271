"""The rules for the layer that the explained input enters: flat, w-square, z-box."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.flows import backward_by, untransformed
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.affine import Affine, affine, is_convolution, is_linear, padded
from tdconcepts.lrp.stabilizers import Stabilizing, check_stabilizer, stabilized

__all__ = ["FlatRule", "WSquareRule", "ZBoxRule", "nonzero"]


def nonzero(x: Tensor) -> Tensor:
    """``x``, with a tiny number for what is nearer to zero than that: relevance is a ratio to it times it again.

    Examples:
        >>> bool((nonzero(torch.zeros(2)) > 0).all()), nonzero(torch.tensor([0.5]))
        (True, tensor([0.5000]))
    """
    tiny = 2.0**-40 if torch.finfo(x.dtype).max > 1e30 else 2.0**-8  # a power of two rounds nothing
    return torch.where(x.abs() < tiny, torch.where(x < 0, -tiny, tiny).to(x.dtype), x)


@dataclasses.dataclass(frozen=True)
class FlatRule(Rule):
    r"""Flat: each output's relevance in equal parts to the inputs it sees, :math:`R_i = \sum_{j \ni i} R_j / n_j`.

    :math:`n_j` is the number of connected inputs; zero padding does not count. It is no matter what the input and the
    weights are, so it also serves layers without parameters. In the gradient convention it ends the propagation: what
    flows out is the relevance itself, and nothing with a rule may lie in front.

    Args:
        epsilon: a number or a stabiliser of the counts.

    Raises:
        BadValue: at the call, in the gradient convention with rules in front.

    Source: Lapuschkin et al., *Unmasking Clever Hans predictors*, 2019 (supplement).

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1), torch.tensor([[0.0, 9.0]], requires_grad=True)
        >>> with FlatRule().on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[4.0]]))[0].round(decimals=4)
        tensor([[2., 2.]])
    """

    epsilon: Stabilizing = 1e-6
    terminal: ClassVar[bool] = True
    takes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer, a convolution, or any layer that maps equal inputs to a sum or mean of them."""
        layer: Any = call.module if call.module is not None else call.name
        if not (is_linear(layer) or is_convolution(layer)):
            return _flat_without_weights(self, call)
        view = affine(call, self)
        return _ended(call, view.x, functools.partial(_flat, self.epsilon, view))


def _flat(by: Stabilizing, view: Affine, share: Tensor, x: Tensor) -> Tensor:
    ones, gather = view.single[0](), view.single[1]
    count = view.push(torch.ones_like(view.one_row(x)), ones)
    return view.pull(gather(share) / stabilized(count, by), ones, x)


def _flat_without_weights(rule: FlatRule, call: Call) -> Tensor:
    module = call.module
    if module is None or len(call.inputs) != 1 or any(True for _ in module.parameters()):
        raise call.cannot(rule, "it is no linear layer, no convolution and no pooling", "EpsilonRule or PassRule")

    def flat(share: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z, pull, *_ = torch.func.vjp(module.forward, torch.ones_like(x))
        found: Tensor = pull(share / stabilized(z, rule.epsilon))[0]
        return found

    return _ended(call, call.inputs[0], flat)


@dataclasses.dataclass(frozen=True)
class WSquareRule(Rule):
    r"""w-square: relevance in proportion to the squared weights, :math:`R_{in} = (M^2)^T(R \oslash \mathrm{stab}(d))`.

    :math:`d_j = \sum_i M_{ji}^2 + b_j^2`; the bias takes its part. It is no matter what the input is. In the gradient
    convention it ends the propagation, as :class:`FlatRule` does.

    Args:
        epsilon: a number or a stabiliser.
        zero_params: names of parameters that count as zero, ``("bias",)`` for instance.

    Raises:
        BadValue: at the call, for what is no linear layer or convolution, or with rules in front (gradient
            convention).

    Source: Montavon et al., *Explaining nonlinear classification decisions with deep Taylor decomposition*, 2017.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[0.0, 9.0]], requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> with WSquareRule().on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0]]))[0].round(decimals=4)
        tensor([[0.1000, 0.9000]])
    """

    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()
    terminal: ClassVar[bool] = True
    takes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        view = affine(call, self, self.zero_params)
        return _ended(call, view.x, functools.partial(_wsquare, self.epsilon, view))


def _wsquare(by: Stabilizing, view: Affine, share: Tensor, x: Tensor) -> Tensor:
    square = view.weight.square()
    d = view.push(torch.ones_like(view.one_row(x)), square, None if view.bias is None else view.bias.square())
    return view.pull(share / stabilized(d, by), square, x)


@dataclasses.dataclass(frozen=True)
class ZBoxRule(Rule):
    r"""z-box, for inputs between two bounds: :math:`R_{in} = x M^Ts - l M^{+T}s - h M^{-T}s`.

    :math:`s = R \oslash \mathrm{stab}(Mx - M^+l - M^-h)`. In the gradient convention it ends the propagation, as
    :class:`FlatRule` does.

    Args:
        low: the smallest value an input can have: a number, or a tensor that broadcasts to the input.
        high: the largest value.
        epsilon: a number or a stabiliser.
        zero_params: names of parameters that count as zero.

    Raises:
        BadType: a bound that is no number. BadValue: a low that is not below high, a NaN; at the call, for what is no
            linear layer or convolution.

    Source: Montavon et al., *Explaining nonlinear classification decisions with deep Taylor decomposition*, 2017.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[0.5, 1.0]], requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> with ZBoxRule(0.0, 1.0).on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0]]))[0].round(decimals=4)
        tensor([[1., 0.]])
    """

    low: Any
    high: Any
    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()
    terminal: ClassVar[bool] = True
    takes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)
        low, high = (_number("low", self.low), _number("high", self.high))
        try:
            empty = bool((low > high).any())
        except RuntimeError:  # for inputs of several shapes
            empty = bool(low.min() > high.max())
        if empty:
            raise BadValue("the box is empty", got=f"low={self.low!r}, high={self.high!r}", needed="low <= high")

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        view = affine(call, self, self.zero_params)
        low, high = (padded(call.module, _bound(bound, call.inputs[0], self, call)) for bound in (self.low, self.high))
        return _ended(call, view.x, functools.partial(_zbox, self.epsilon, view, low, high))


def _number(name: str, bound: Any) -> Tensor:
    try:
        value = torch.as_tensor(bound).detach()
    except (TypeError, RuntimeError, ValueError):
        raise BadType(f"{name} is no bound", got=repr(bound), needed="a number, or a tensor of numbers") from None
    if value.is_complex() or value.dtype == torch.bool or value.numel() == 0 or bool(value.isnan().any()):
        raise BadValue(f"{name} is no bound", got=repr(bound), needed="a number, or a tensor of numbers")
    return value


def _bound(bound: Any, x: Tensor, rule: Rule, call: Call) -> Tensor:
    value = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    if value.ndim == x.ndim and value.shape[0] > max(1, x.shape[0]):
        if untransformed(value) and not torch.equal(value[:1].expand_as(value), value):
            raise call.cannot(rule, f"bounds of {value.shape[0]} rows for {x.shape[0]}", "bounds without a batch dim")
        value = value[: x.shape[0]]
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise call.cannot(rule, f"a bound of shape {list(value.shape)} for inputs {list(x.shape)}") from None


def _zbox(by: Stabilizing, view: Affine, low: Tensor, high: Tensor, share: Tensor, x: Tensor) -> Tensor:
    weight = view.weight
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    d = view.push(x, weight) - view.push(low, plus) - view.push(high, minus)
    s = share / stabilized(d, by)
    return x * view.pull(s, weight, x) - low * view.pull(s, plus, x) - high * view.pull(s, minus, x)


def _ended(call: Call, x: Tensor, formula: Any) -> Tensor:
    value = call.output if call.written is None else call.written
    if call.carries_relevance:
        return backward_by(functools.partial(_relevance, formula), value, [x])
    return backward_by(functools.partial(_from_gradient, formula, call.ends), value, [x], call.kept(value))


def _relevance(formula: Any, flow: Tensor, x: Tensor) -> tuple[Tensor]:
    return (formula(flow, x),)


def _from_gradient(formula: Any, ends: str, flow: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor]:
    found = formula(flow * z, x)
    return (found / nonzero(x) if ends == "ratio" else found,)
