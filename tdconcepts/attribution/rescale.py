"""The rescale rule: for each operation that is not linear, its change from the baseline in place of its derivative."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdconcepts.hooks.flows import backward_by, untransformed
from tdconcepts.hooks.references import Comparison, moves

__all__ = ["ELEMENTWISE", "Formula", "elementwise", "log_softmax", "logsumexp", "max_pool", "maximum", "softmax"]

Formula = Callable[[Comparison], Any]

# Functions of one number, each applied to every element.
ELEMENTWISE = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "prelu",
        "rrelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "softsign",
        "softplus",
        "logsigmoid",
        "sigmoid",
        "tanh",
        "threshold",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "erf",
        "erfc",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "pow",
        "abs",
        "absolute",
        "logit",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "sinc",
        "sign",
        "round",
        "floor",
        "ceil",
        "trunc",
        "frac",
    ]
)


def elementwise(call: Comparison, epsilon: float) -> Tensor:
    r"""An elementwise function: :math:`m = \Delta y / \Delta x`, and :math:`f'(x)` where :math:`\Delta x` is tiny.

    Tiny is below ``epsilon``, or lost in the rounding of x and y. Also for two inputs of which one is a constant.
    """
    y, y0 = call.output, call.base.output
    values = [t for t in call.args if isinstance(t, Tensor)]
    inputs = [t for t in values if moves(t)]
    if len(inputs) != 1 or inputs[0].shape != y.shape:
        return y
    x = inputs[0]
    x0 = call.base.args[next(i for i, t in enumerate(call.args) if t is x)]
    a, b, c, d = (call.constant(t) for t in (x, x0, y, y0))
    tiny = torch.finfo(y.dtype).eps ** 0.75
    if call.points is None and untransformed(a):  # the same with less memory, and a look at the numbers
        step, size = a - b, (a + b).abs_()  # of two signs, which are never near, it is less
        size = size if call.name in _THROUGH_ZERO else size.add_(c.abs()).add_(d.abs())
        share = size.mul_(tiny).clamp_(min=epsilon).div_(step)  # 1 or more where it is tiny
        near = None if _are_small(share) else (share.abs_() < 1).logical_not_().nonzero(as_tuple=True)
        ratio = (torch.sub(c, d, out=share) if c.dtype == share.dtype else c - d).div_(step)
        if near is not None:
            ratio[near] = call.derivative(x, near)
        return backward_by(_times, y, [x], ratio, keep=False)
    step, size = a - b, a.abs() + b.abs()
    size = size if call.name in _THROUGH_ZERO else size + c.abs() + d.abs()
    near = step.abs() <= (tiny * size).clamp(min=epsilon)
    ratio = torch.where(near, 0.0, (c - d) / torch.where(near, 1.0, step))
    return backward_by(_times_or_gradient, y, [x, y], ratio, near, keep=False)


# f(0) = 0 and |f'| is about 1 at most: the rounding of y is not larger than that of x.
_THROUGH_ZERO = frozenset(["relu", "relu6", "leaky_relu", "elu", "celu", "gelu", "silu", "mish", "hardtanh", "tanh"])


def _are_small(values: Tensor) -> bool:
    if not values.numel():
        return True
    low, high = values.aminmax()
    return bool((low > -1) & (high < 1))


def _times(flow: Tensor, ratio: Tensor) -> tuple[Tensor]:
    return (flow * ratio,)


def _times_or_gradient(flow: Tensor, ratio: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    return flow * ratio, torch.where(near, flow, 0.0)


def softmax(call: Comparison) -> Tensor:
    r"""Softmax, as :math:`\exp(x_i - L)` with :math:`L = \log\sum_j e^{x_j}`, each of these by its own change.

    With the mean of an exponential :math:`E(a, b) = (e^a - e^b) / (a - b)`: :math:`m_{ij} = E(z_i) (\delta_{ij} -
    E(x_j) / E(L))`, :math:`z = x - L`. So :math:`\sum_j m_{ij} \Delta x_j = \Delta y_i`, and what shifts all logits
    together gets nothing.
    """
    x, x0, dim = _logits(call)
    a, b, share = _shares(call, x, x0, dim)
    z, z0 = a - a.logsumexp(dim, keepdim=True), b - b.logsumexp(dim, keepdim=True)
    slope = _log_mean_exp(z, z0).exp()
    return backward_by(functools.partial(_softmax, dim, x.dtype), call.output, [x], slope, share, keep=False)


def log_softmax(call: Comparison) -> Tensor:
    """Log-softmax, as :func:`softmax` without the last exponential."""
    x, x0, dim = _logits(call)
    share = _shares(call, x, x0, dim)[2]
    one = torch.ones_like(share)
    return backward_by(functools.partial(_softmax, dim, x.dtype), call.output, [x], one, share, keep=False)


def logsumexp(call: Comparison) -> Tensor:
    """:math:`L` of :func:`softmax`: each gets the share of its exponential's change."""
    x, x0 = call.args[0], call.base.args[0]
    dims, keepdim = call.given(1, "dim"), call.given(2, "keepdim", False)
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    share = _shares(call, x, x0, dims)[2]
    spread = call.output if keepdim else call.output.reshape(_kept(x.shape, dims))
    found = backward_by(_times, spread.expand(x.shape), [x], share, keep=False)
    return _sum_of_flows(call.output, found, dims, keepdim)


def _sum_of_flows(value: Tensor, spread: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """``value`` whose flow goes to every element of ``spread`` along ``dims``."""
    total = spread.sum(dims, keepdim=keepdim)
    return backward_by(_same, value, [total], keep=False)


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _kept(shape: torch.Size, dims: tuple[int, ...]) -> list[int]:
    reduced = {dim % len(shape) for dim in dims}
    return [1 if i in reduced else n for i, n in enumerate(shape)]


def _logits(call: Comparison) -> tuple[Tensor, Tensor, int]:
    x = call.args[0]
    dim = call.given(1, "dim")
    if dim is None:  # torch's own, deprecated, choice
        dim = 0 if x.ndim in (0, 1, 3) else 1
    return x, call.base.args[0], int(dim)


def _shares(call: Comparison, x: Tensor, x0: Tensor, dim: Any) -> tuple[Tensor, Tensor, Tensor]:
    r"""The logits at both ends, and :math:`E(x_j) / E(L)`; 0 where a logit is masked."""
    a, b = (call.constant(t).to(torch.promote_types(t.dtype, call.output.dtype)) for t in (x, x0))
    total, total0 = a.logsumexp(dim, keepdim=True), b.logsumexp(dim, keepdim=True)
    masked = a.isinf() | b.isinf()
    share = _log_mean_exp(a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)) - _log_mean_exp(total, total0)
    low = torch.finfo(a.dtype).min
    a, b = (t.masked_fill(masked, low) if untransformed(t) and bool(masked.any()) else t for t in (a, b))
    return a, b, share.exp().masked_fill(masked, 0.0)


def _log_mean_exp(a: Tensor, b: Tensor) -> Tensor:
    """The logarithm of ``(exp(a) - exp(b)) / (a - b)``, also where they are near or far from each other."""
    half = (a - b).abs() / 2
    near = half < 1e-3
    safe = torch.where(near, 1.0, half)
    log_ratio = torch.where(near, half.square() / 6, safe + (-torch.expm1(-2 * safe) / (2 * safe)).log())
    return (a + b) / 2 + log_ratio


def _softmax(dim: Any, dtype: torch.dtype, flow: Tensor, slope: Tensor, share: Tensor) -> tuple[Tensor]:
    inner = flow * slope
    return ((inner - share * inner.sum(dim, keepdim=True)).to(dtype),)


def max_pool(call: Comparison) -> Any:
    r"""Max pooling: :math:`\Delta y` goes to the place of the larger maximum: that of the input if y rose, else that of
    the baseline. There :math:`|\Delta x| \ge |\Delta y|`, so the multiplier :math:`\Delta y / \Delta x` is in [0, 1].
    """
    name = call.name.removesuffix("_with_indices")
    indices_too = getattr(torch.nn.functional, f"{name}_with_indices")
    dims = int(re.findall(r"(\d)d", name)[0])
    x, x0 = call.args[0], call.base.args[0]
    kwargs = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
    arguments = call.args[1:] if name.startswith("adaptive") else call.args[1:6]
    several = isinstance(call.output, tuple)
    y, y0 = (call.output[0], call.base.output[0]) if several else (call.output, call.base.output)
    a, b, c, d = (call.constant(t) for t in (x, x0, y, y0))
    (_, at), (_, at0) = (indices_too(t.detach(), *arguments, **kwargs) for t in (a, b))
    where = torch.where(c >= d, at, at0).flatten(-dims)
    found = _routed(x.flatten(-dims), y, (a - b).flatten(-dims), c - d, where)
    return (found, *call.output[1:]) if several else found


def maximum(call: Comparison) -> Any:
    """``max`` and ``amax`` over one dim, by the rule of :func:`max_pool`; and minima."""
    low, several = "min" in call.name, isinstance(call.output, tuple)
    x, x0 = call.args[0], call.base.args[0]
    dim, keepdim = call.given(1, "dim"), call.given(2, "keepdim", False)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(dim, int):
        return call.output
    y, y0 = (call.output[0], call.base.output[0]) if several else (call.output, call.base.output)
    a, b, c, d = (call.constant(t) for t in (x, x0, y, y0))
    at, at0 = ((t.argmin if low else t.argmax)(dim, keepdim=True) for t in (a, b))
    y, c, d = (t if keepdim else t.unsqueeze(dim) for t in (y, c, d))
    rose = c >= d
    where = torch.where(~rose if low else rose, at, at0)
    wide, up, step, change, where = (t.movedim(dim, -1) for t in (x, y, a - b, c - d, where))
    moved = _routed(wide, up, step, change, where)
    found = moved.movedim(-1, dim) if keepdim else moved.squeeze(-1)
    return type(call.output)((found, call.output[1])) if several else found


def _routed(x: Tensor, y: Tensor, step: Tensor, change: Tensor, where: Tensor) -> Tensor:
    """``y``, whose flow goes to the places ``where`` of ``x`` (last dim), times its change over the step of x there."""
    step = step.gather(-1, where).reshape(y.shape)
    ratio = torch.where(change == 0, (step == 0).to(change.dtype), change / torch.where(step == 0, 1.0, step))
    return backward_by(_times, y, [x.gather(-1, where).reshape(y.shape)], ratio, keep=False)
