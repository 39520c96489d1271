"""The rules that treat positive and negative contributions apart: z-plus, alpha-beta, gamma."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by, untransformed
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.affine import Affine, affine
from tdconcepts.lrp.stabilizers import Stabilizing, check_stabilizer, stabilized

__all__ = ["AlphaBetaRule", "GammaRule", "ZPlusRule"]

_EMPTY = 1e-5  # a side with less than this part of all contributions is rounding noise in float32
_EMPTY64 = 1e-13


@dataclasses.dataclass(frozen=True)
class AlphaBetaRule(Rule):
    r"""Alpha-beta: positive contributions get :math:`\alpha` times the relevance, negative ones :math:`-\beta` times.

    With :math:`z^+ = M^+x^+ + M^-x^- + b^+`, :math:`z^- = M^-x^+ + M^+x^- + b^-`, :math:`s^\pm = R \oslash
    \mathrm{stab}(z^\pm)`:

    .. math:: R_{in} = \alpha[x^+ M^{+T}s^+ + x^- M^{-T}s^+] - \beta[x^+ M^{-T}s^- + x^- M^{+T}s^-]

    It is computed in one extra forward and one extra backward, as :math:`\frac12[x M^T(s^+ - s^-) + |x| |M|^T(s^+ +
    s^-)]` with :math:`\alpha`, :math:`\beta` in the :math:`s`. Where one side is empty its share is lost, by
    definition.

    Args:
        alpha: weight of the positive side, >= 0.
        beta: weight of the negative side, >= 0; ``alpha - beta`` is 1.
        epsilon: a number or a stabiliser of both denominators.
        zero_params: names of parameters that count as zero.

    Raises:
        BadValue: ``alpha - beta != 1``, or one is negative; at the call, for what is no linear layer or convolution.

    Source: Bach et al., *On pixel-wise explanations*, 2015, eq. 60.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> with AlphaBetaRule(2.0, 1.0).on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0]]))[0].round(decimals=4)
        tensor([[ 2., -1.]])
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise BadValue(
                "alpha and beta do not conserve relevance",
                got=f"alpha={self.alpha}, beta={self.beta}",
                needed="both >= 0 and alpha - beta == 1",
                fix=f"alpha={1 + max(self.beta, 0)}, beta={max(self.beta, 0)}",
            )
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        return _by_sides(self, call, functools.partial(_alpha_beta, self.alpha, self.beta, self.epsilon))


@dataclasses.dataclass(frozen=True)
class ZPlusRule(Rule):
    r"""z-plus: positive contributions only, :math:`R_{in} = x^+ M^{+T}s + x^- M^{-T}s`.

    :math:`s = R \oslash \mathrm{stab}(M^+x^+ + M^-x^- + b^+)`: :class:`AlphaBetaRule` with 1 and 0. Inputs without
    a negative value cost one extra forward only.

    Args:
        epsilon: a number or a stabiliser.
        zero_params: names of parameters that count as zero.

    Raises:
        BadValue: at the call, for what is no linear layer or convolution.

    Source: Montavon et al., *Explaining nonlinear classification decisions with deep Taylor decomposition*, 2017.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> with ZPlusRule().on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0]]))[0].round(decimals=4)
        tensor([[1., 0.]])
    """

    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        return _by_sides(self, call, functools.partial(_alpha_beta, 1.0, 0.0, self.epsilon))


@dataclasses.dataclass(frozen=True)
class GammaRule(Rule):
    r"""Gamma: favours contributions of the output's own sign, for inputs and outputs of any sign.

    With :math:`P = M + \gamma M^+`, :math:`N = M + \gamma M^-`, biases alike, :math:`d^+ = Px^+ + Nx^- + b_P`,
    :math:`d^- = Nx^+ + Px^- + b_N`, :math:`s^\pm = 1[z \gtrless 0] R \oslash \mathrm{stab}(d^\pm)`:

    .. math:: R_{in} = x^+ P^Ts^+ + x^- N^Ts^+ + x^+ N^Ts^- + x^- P^Ts^-

    It is computed in one extra forward and one extra backward. An output of exactly zero passes nothing on.

    Args:
        gamma: how much the favoured side weighs more; 0 is :class:`EpsilonRule`.
        epsilon: a number or a stabiliser.
        zero_params: names of parameters that count as zero.

    Raises:
        BadValue: a negative gamma; at the call, for what is no linear layer or convolution.

    Source: Montavon et al., *Layer-wise relevance propagation: an overview*, 2019; for all signs Andéol et al., 2021.

    Examples:
        >>> layer, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> with GammaRule(1.0).on(layer, convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0]]))[0].round(decimals=4)
        tensor([[ 1.2000, -0.2000]])
    """

    gamma: float = 0.25
    epsilon: Stabilizing = 1e-6
    zero_params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise BadValue("not a gamma", got=repr(self.gamma), needed="a number >= 0")
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        return _by_sides(self, call, functools.partial(_gamma, self.gamma, self.epsilon))


def _by_sides(rule: AlphaBetaRule | ZPlusRule | GammaRule, call: Call, formula: Callable[..., Tensor]) -> Tensor:
    view = affine(call, rule, rule.zero_params)
    z = call.output
    positive = untransformed(view.x) and bool((view.x.detach() >= 0).all())
    simple = positive and isinstance(rule, ZPlusRule)
    changes = bool(rule.zero_params)
    saved = [] if simple and call.carries_relevance else [call.saved(z)]
    return backward_by(
        functools.partial(_flow, formula, view, positive, call.carries_relevance, changes), z, [view.x], *saved
    )


def _flow(
    formula: Callable[..., Tensor],
    view: Affine,
    positive: bool,
    relevance: bool,
    changes: bool,
    flow: Tensor,
    x: Tensor,
    z: Any = None,
) -> tuple[Tensor]:
    """From the flow out to the flow in: both are relevance, or both its ratio to the activation."""
    share = flow if relevance else flow * z
    if changes:  # some parameters count as zero
        z = view.push(x, view.weight)
        z = z if view.bias is None else z + view.bias
    ratio = formula(share, x, z, view, positive)
    return (x * ratio if relevance else ratio,)


def _alpha_beta(
    alpha: float, beta: float, by: Stabilizing, share: Tensor, x: Tensor, z: Tensor | None, view: Affine, positive: bool
) -> Tensor:
    weight, bias = view.weight, view.bias
    if positive and not beta:
        plus = weight.clamp(min=0)
        top = view.push(x, plus)
        if bias is not None:
            top = top + bias.clamp(min=0)
        return view.pull(alpha * share / stabilized(top, by) if alpha != 1 else share / stabilized(top, by), plus, x)
    assert z is not None
    size = weight.abs()
    total = view.push(x if positive else x.abs(), size)
    plain = z if bias is None else z - bias
    up = _half(plain, total, 1, bias, by)
    top = _safe(share, up, alpha)
    if beta:
        down = _half(plain, total, -1, bias, by)
        low = _safe(share, down, beta)
        through, around = top - low, top + low
    else:
        through = around = top
    found = view.pull(around, size, x)
    found = found if positive else x.sgn() * found
    return (view.pull(through, weight, x) + found) * 0.5


def _half(
    plain: Tensor, total: Tensor, sign: int, bias: Tensor | None, by: Stabilizing
) -> tuple[Tensor, Tensor | None]:
    """The contributions of one sign, stabilised, and where they are more than rounding noise."""
    some = (plain + total if sign > 0 else plain - total) * 0.5
    noise = some.abs() > total * (_EMPTY64 if some.dtype == torch.float64 else _EMPTY)
    return stabilized(_with(some, bias, sign), by), noise


def _with(some: Tensor, bias: Tensor | None, sign: int) -> Tensor:
    """Contributions of one sign, with those of the bias."""
    if bias is None:
        return some
    return some + (bias.clamp(min=0) if sign > 0 else bias.clamp(max=0))


def _safe(share: Tensor, side: tuple[Tensor, Tensor | None], weight: float) -> Tensor:
    denominator, there = side
    found = share / denominator if weight == 1 else share * weight / denominator
    return torch.where(there, found, 0.0) if there is not None else found


def _gamma(gamma: float, by: Stabilizing, share: Tensor, x: Tensor, z: Tensor, view: Affine, positive: bool) -> Tensor:
    weight, bias = view.weight, view.bias
    size = weight.abs()
    total = view.push(x if positive else x.abs(), size)
    plain = z if bias is None else z - bias
    if callable(by):  # which may look at all outputs of a row: each side whole, as it is defined
        up, down = (z + gamma * _with((plain + sign * total) * 0.5, bias, sign) for sign in (1, -1))
        denominator = torch.where(z > 0, stabilized(up, by), stabilized(down, by))
    else:
        half = (plain + torch.where(z > 0, total, -total)) * 0.5
        if bias is not None:
            half = half + torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
        denominator = stabilized(z + gamma * half, by)
    s = torch.where(z == 0, 0.0, share / denominator)
    found = view.pull(torch.where(z > 0, s, -s) * (gamma / 2), size, x)
    found = found if positive else x.sgn() * found
    return view.pull(s * (1 + gamma / 2), weight, x) + found
