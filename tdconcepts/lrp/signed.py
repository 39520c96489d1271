"""The rules that treat positive and negative contributions apart: z-plus, alpha-beta, gamma."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by, overwritable, untransformed
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.hooks.signs import known_positive
from tdconcepts.lrp.affine import Affine, affine, magnitude, positive_part
from tdconcepts.lrp.stabilizers import Stabilizing, check_number, check_stabilizer, stabilized

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
    takes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        check_number("beta", self.beta)
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
    takes_on: ClassVar[bool] = True

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
    takes_on: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma)
        if not self.gamma >= 0:
            raise BadValue("not a gamma", got=repr(self.gamma), needed="a number >= 0")
        check_stabilizer(self.epsilon)

    def carry(self, call: Call) -> Tensor:
        """A linear layer or a convolution."""
        return _by_sides(self, call, functools.partial(_gamma, self.gamma, self.epsilon))


def _by_sides(rule: AlphaBetaRule | ZPlusRule | GammaRule, call: Call, formula: Callable[..., Tensor]) -> Tensor:
    if call.found is None:
        view = affine(call, rule, rule.zero_params)
        call.found = view, _is_positive(view.x), {}
    view, positive, memo = call.found
    z, changes = call.output, bool(rule.zero_params)
    value = z if call.written is None else call.written
    saved = [] if call.carries_relevance else [call.kept(value)]  # of which the flow is a ratio
    if not (changes or (positive and isinstance(rule, ZPlusRule))) and (call.carries_relevance or value is not z):
        saved.append(call.kept(z))
    flow = functools.partial(_flow, formula, view, positive, call.carries_relevance, changes, memo)
    return backward_by(flow, value, [view.x], *saved)


def _is_positive(x: Tensor) -> bool:
    """Whether no input is negative: one pass to see it saves passes through the weight."""
    return untransformed(x) and (known_positive(x) or x.numel() == 0 or bool(x.detach().amin() >= 0))


def _flow(
    formula: Callable[..., Tensor],
    view: Affine,
    positive: bool,
    relevance: bool,
    changes: bool,
    memo: dict[str, Tensor | None],
    flow: Tensor,
    x: Tensor,
    *saved: Tensor,
) -> tuple[Tensor]:
    """From the flow out to the flow in: both are relevance, or both its ratio to the activation."""
    share = _Share(flow, None if relevance else saved[0], overwritable(flow), memo)
    z = saved[-1] if saved else None
    if changes:  # some parameters count as zero
        z = view.push(x, view.weight, view.bias)
    ratio = formula(share, x, z, view, positive)
    return (share.times(ratio, x) if relevance else ratio,)


class _Share:
    """What a denominator divides: the flow, times the value that it is a ratio to.

    ``fresh``: what has just been computed may be written over, which is how all passes over large activations find
    their memory.
    """

    def __init__(self, flow: Tensor, value: Tensor | None, fresh: bool, memo: dict[str, Tensor | None]) -> None:
        self.flow, self.value, self.fresh, self.memo = flow, value, fresh, memo

    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        """A denominator, which is kept from the second pass through the same graph on: one for each target follows."""
        if not self.fresh:
            return compute()
        kept = self.memo.get("denominator")
        if kept is None:
            kept = compute()
            self.memo["denominator"] = kept if self.memo else None
        return kept

    def over(self, denominator: Tensor, weight: float = 1) -> Tensor:
        alone = self.fresh and denominator is not self.memo.get("denominator")
        found = torch.div(self.flow, denominator, out=denominator if alone else None)
        found = found if self.value is None else self.times(found, self.value)
        return found if weight == 1 else self.times(found, weight)

    def times(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a.mul_(b) if self.fresh else a * b

    def plus(self, a: Tensor, b: Tensor, weight: float = 1) -> Tensor:
        return a.add_(b, alpha=weight) if self.fresh else a.add(b, alpha=weight)

    def cleared(self, side: Tensor, z: Tensor, sign: int, by: Stabilizing, scale: int) -> Tensor:
        """A stabilised denominator, infinite where it is but the rounding noise of a difference with ``sign * z``.

        ``side`` is ``scale`` times the denominator of one side, positive; a number ``by`` is in it already. Made of
        sums and a threshold, because a mask of random places costs ten times as much.
        """
        noise = -sign * (_EMPTY64 if side.dtype == torch.float64 else _EMPTY)
        if callable(by):
            return torch.where(side > noise * z, by(sign * side / scale) * (sign * scale), torch.inf)
        side = self.plus(side, z, -noise)
        side = F.threshold(side, scale * by, torch.inf, inplace=self.fresh)
        return self.plus(side, z, noise)


def _number(by: Stabilizing) -> float:
    """What is added to a bias, and so to the denominator; 0 for what is more than a number."""
    return 0.0 if callable(by) else by


def _alpha_beta(
    alpha: float, beta: float, by: Stabilizing, share: _Share, x: Tensor, z: Tensor | None, view: Affine, positive: bool
) -> Tensor:
    bias, fresh = view.bias, share.fresh
    if positive:
        plus = positive_part(view.weight, fresh)
        least = view.above(None if bias is None else bias.clamp(min=0), _number(by))
        top = view.push(x, plus, least) if beta else share.once(lambda: view.push(x, plus, least))
        low = None
        if beta:
            assert z is not None
            low = share.over(share.cleared(top - z, z, -1, by, 1), beta)
        if not _number(by):
            top = stabilized(top, by)
        top = share.over(top, alpha)
        if low is None:
            return view.pull(top, plus, x)
        found = view.pull(share.plus(top, low, -1), plus, x)
        return share.plus(found, view.pull(low, view.weight, x))
    assert z is not None
    size = magnitude(view.weight, fresh)
    least = view.above(None if bias is None else bias.abs(), 2 * _number(by))

    def upper(both: Tensor) -> Tensor:
        return share.cleared(share.plus(both, z), z, 1, by, 2)

    if beta:
        both = view.push(x.abs(), size, least)
        low = share.over(share.cleared(both - z, z, -1, by, 2), beta)
        top = share.over(upper(both), alpha)
    else:
        low, top = None, share.over(share.once(lambda: upper(view.push(x.abs(), size, least))), alpha)
    around = top if low is None else top - low
    found = share.times(view.pull(around, size, x), x.sgn())
    return share.plus(found, view.pull(top if low is None else share.plus(top, low), view.weight, x))


def _gamma(gamma: float, by: Stabilizing, share: _Share, x: Tensor, z: Tensor, view: Affine, positive: bool) -> Tensor:
    bias, half, sign = view.bias, gamma / 2, z.sgn()
    if not gamma:
        return view.pull(torch.where(z == 0, 0.0, share.over(stabilized(z, by))), view.weight, x)
    size = magnitude(view.weight, share.fresh)
    least = view.above(None if bias is None else bias.abs(), _number(by) / half)
    both = view.push(x if positive else x.abs(), size, least)
    if callable(by):  # which may look at all outputs of a row: each side whole, as it is defined
        up, down = (by(z * (1 + half) + side * half * both) for side in (1, -1))
        around = torch.where(z == 0, 0.0, share.over(torch.where(z > 0, up, down))) * sign
    else:
        both = torch.copysign(both, z, out=both if share.fresh else None)
        denominator = share.plus(share.times(both, half), z, 1 + half)
        around = share.times(share.over(denominator if by else stabilized(denominator, by)), sign)  # nothing at 0
    through = share.times(around * sign, 1 + half)
    found = view.pull(share.times(around, half), size, x)
    found = found if positive else share.times(found, x.sgn())
    return share.plus(found, view.pull(through, view.weight, x))
