"""Affine views: a linear layer or a convolution, module or functional call, as x, W, b and the two passes through W."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdconcepts.hooks.flows import depends, operation_name, overwritable
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.parameters import check_names

__all__ = ["Affine", "affine", "by_channel", "is_convolution", "is_linear", "magnitude", "padded", "positive_part"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear,)
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_NAMES = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}


def is_linear(layer: Any) -> bool:
    """Whether a module, or the name of an operation, is a matrix product with a weight.

    Examples:
        >>> is_linear(nn.Linear(1, 1)), is_linear("linear"), is_linear(nn.Bilinear(1, 1, 1))
        (True, True, False)
    """
    return layer == "linear" if isinstance(layer, str) else isinstance(layer, LINEAR) or _is_conv1d_of_hf(layer)


def is_convolution(layer: Any) -> bool:
    """Whether a module, or the name of an operation, is a convolution, transposed ones among them.

    Examples:
        >>> is_convolution(nn.ConvTranspose1d(1, 1, 1)), is_convolution("conv2d"), is_convolution(nn.Unfold(1))
        (True, True, False)
    """
    return layer in _NAMES if isinstance(layer, str) else isinstance(layer, CONVOLUTIONS)


def _is_conv1d_of_hf(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


@dataclasses.dataclass(frozen=True)
class Affine:
    """``z = M x + b``, where ``M`` is made of ``weight``.

    Args:
        x: the input, as the layer convolves it (padded where the padding is not zero).
        weight: the weight.
        bias: the bias ``[outputs]``, or None.
        outputs: how many outputs, or output channels.
        push: ``push(x, weight, bias=None)`` is ``M x + b``.
        pull: ``pull(s, weight, x)`` is ``M^T s``, in the shape of ``x``.
        single: for one output of each group, a weight of ones, and from a flow for all outputs to one, by sums.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int
    push: Callable[..., Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]
    single: tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]

    def one_row(self, x: Tensor) -> Tensor:
        """``x``, as one row of a batch if it is one, where a number for all rows is wanted."""
        return x[:1] if self.batched else x

    @property
    def batched(self) -> bool:
        """Whether the first dim of ``x`` runs over rows: torch takes a single one without that dim too."""
        return self.x.ndim >= self.weight.ndim

    def above(self, bias: Tensor | None, least: float) -> Tensor | None:
        """``bias`` (or zero) plus a number: what keeps ``push`` above it where all contributions are positive."""
        if bias is None:
            return self.weight.new_full((self.outputs,), least) if least else None
        return bias + least if least else bias


class _Scratch(threading.local):
    """For each thread the memory that a changed weight is written to: fresh pages would cost more than the numbers."""

    most = 2**26  # bytes

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.views: dict[Any, Tensor] = {}

    def like(self, weight: Tensor) -> Tensor | None:
        """A tensor like ``weight``, good until the next call; None where fresh memory is better."""
        size = weight.numel() * weight.element_size()
        if weight.device.type != "cpu" or size > self.most or not weight.is_contiguous():
            return None
        if self.held is None or self.held.numel() < size:
            self.held, self.views = torch.empty(size, dtype=torch.uint8), {}
        kind = weight.dtype, weight.shape
        view = self.views.get(kind)
        if view is None:
            view = self.views[kind] = self.held[:size].view(weight.dtype).view(weight.shape)
        return view


_SCRATCH = _Scratch()


def positive_part(weight: Tensor, fleeting: bool) -> Tensor:
    """``max(weight, 0)``.

    Args:
        weight: any tensor.
        fleeting: in memory that is good until the next weight is changed on this thread.

    Examples:
        >>> positive_part(torch.tensor([-1.0, 2.0]), fleeting=False)
        tensor([0., 2.])
    """
    return torch.clamp(weight, min=0, out=_SCRATCH.like(weight)) if fleeting else weight.clamp(min=0)


def magnitude(weight: Tensor, fleeting: bool) -> Tensor:
    """``|weight|``; arguments as of :func:`positive_part`.

    Examples:
        >>> magnitude(torch.tensor([-1.0, 2.0]), fleeting=False)
        tensor([1., 2.])
    """
    return torch.abs(weight, out=_SCRATCH.like(weight)) if fleeting else weight.abs()


def affine(call: Call, rule: Rule, zero: tuple[str, ...] = ()) -> Affine:
    """The affine view of a call, or the error that says why it has none.

    Args:
        call: a call of a linear layer or a convolution.
        rule: who asks, for the error.
        zero: names of parameters that count as zero.

    Raises:
        BadValue: for what is no linear layer and no convolution, or has no such parameter.
    """
    module = call.module
    if module is None:
        found = _functional(call, rule)
    elif is_linear(module):
        transposed = _is_conv1d_of_hf(module)
        weight: Any = module.weight
        found = _linear(call.inputs[0], weight.t() if transposed else weight, module.bias)  # type: ignore[arg-type]
    elif is_convolution(module):
        found = _of_module(call, module)
    else:
        fix = "a rule for any differentiable module: EpsilonRule, PassRule, PseudoIdentityRule, ..."
        raise call.cannot(rule, "it is no linear layer and no convolution", fix)
    if call.folded is not None:
        found = _folded(found, call)
    if zero:
        check_names(call, rule, (zero,) if isinstance(zero, str) else zero)
    if "weight" in zero:
        found = dataclasses.replace(found, weight=torch.zeros_like(found.weight))
    return dataclasses.replace(found, bias=None) if "bias" in zero else found


def _folded(found: Affine, call: Call) -> Affine:
    """With a scale and a shift of each output channel, which came after the layer."""
    assert call.folded is not None
    k, shift = call.folded
    weight = found.weight
    bias = shift if found.bias is None else found.bias * k + shift
    return dataclasses.replace(found, weight=weight * by_channel(k, call.module, weight), bias=bias)


def by_channel(k: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """A number for each output channel of a layer, in a shape that broadcasts to its weight.

    Args:
        k: the numbers ``[outputs]``.
        layer: a linear layer or a convolution, transposed and grouped ones too.
        weight: its weight.

    Examples:
        >>> layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
        >>> by_channel(torch.ones(6), layer, layer.weight).shape
        torch.Size([4, 3, 1])
    """
    tail = [1] * (weight.ndim - 2)
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return k.reshape(-1, 1, *tail)
    each = k.reshape(layer.groups, 1, -1).expand(layer.groups, weight.shape[0] // layer.groups, -1)
    return each.reshape(weight.shape[0], -1, *tail)


def _functional(call: Call, rule: Rule) -> Affine:
    name = operation_name(call.function)
    args, kwargs = list(call.args), call.kwargs
    if name == "addmm" and len(args) == 3 and not kwargs and not depends(args[2]) and not depends(args[0]):
        return _linear(args[1], args[2].t(), args[0])
    get = lambda i, key, default: args[i] if len(args) > i else kwargs.get(key, default)  # noqa: E731
    x, weight, bias = get(0, "input", None), get(1, "weight", None), get(2, "bias", None)
    if name not in _NAMES and name != "linear":
        raise call.cannot(rule, "it is no linear layer and no convolution", "EpsilonRule, UniformEpsilonRule, ...")
    if depends(weight):
        raise call.cannot(rule, "its weight depends on the input", "UniformEpsilonRule shares between the two factors")
    if name == "linear":
        return _linear(x, weight, bias)
    n = int(name[-2])
    if "transpose" in name:
        stride, padding = _tuple(get(3, "stride", 1), n), _tuple(get(4, "padding", 0), n)
        extra = _tuple(get(5, "output_padding", 0), n)
        groups, dilation = get(6, "groups", 1), _tuple(get(7, "dilation", 1), n)
        return _transposed(x, weight, bias, n, (stride, padding, extra, groups, dilation))
    stride, dilation = _tuple(get(3, "stride", 1), n), _tuple(get(5, "dilation", 1), n)
    padding, groups = get(4, "padding", 0), get(6, "groups", 1)
    return _convolution(x, weight, bias, n, (stride, padding, dilation, groups))


def _of_module(call: Call, m: Any) -> Affine:
    x, n = call.inputs[0], len(m.kernel_size)
    if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        size = call.args[1] if len(call.args) > 1 else call.kwargs.get("output_size")
        extra: Any = m.output_padding
        m = cast(Any, m)
        if size is not None:
            extra = m._output_padding(x, size, m.stride, m.padding, m.kernel_size, n, m.dilation)
        return _transposed(x, m.weight, m.bias, n, (m.stride, m.padding, tuple(extra), m.groups, m.dilation))
    padding = m.padding
    if m.padding_mode != "zeros":
        x, padding = padded(m, x), (0,) * n
    return _convolution(x, m.weight, m.bias, n, (m.stride, padding, m.dilation, m.groups))


def padded(layer: Any, x: Tensor) -> Tensor:
    """``x`` as a layer convolves it: padded by itself, where the padding is not zero.

    Examples:
        >>> padded(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[3., 1., 2., 3., 1.]]])
    """
    if getattr(layer, "padding_mode", "zeros") == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Affine:
    single = (lambda: weight.new_ones(1, weight.shape[1]), lambda flow: flow.sum(-1, keepdim=True))
    return Affine(x, weight, bias, weight.shape[0], F.linear, lambda s, w, like: torch.matmul(s, w), single)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, how: tuple[Any, ...]) -> Affine:
    stride, padding, dilation, groups = how
    sides: list[int] = []
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)] if padding == "same" else [0] * n
        padding = tuple(t // 2 for t in total)
        sides = [part for t in reversed(total) for part in (0, t % 2)] if any(t % 2 for t in total) else []
    how = (stride, _tuple(padding, n), dilation, False, (0,) * n, groups)

    def push(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        found: Tensor = _CONVOLVE[n](F.pad(x, sides) if sides else x, w, b, stride, how[1], dilation, groups)
        return found

    def pull(s: Tensor, w: Tensor, like: Tensor) -> Tensor:
        if not sides:
            return _pull(s, w, like, how, n)
        return F.pad(_pull(s, w, F.pad(like, sides), how, n), [-side for side in sides])

    one = lambda: weight.new_ones(groups, *weight.shape[1:])  # noqa: E731
    return Affine(x, weight, bias, weight.shape[0], push, pull, (one, _grouped(groups, weight.shape[0], n)))


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, how: tuple[Any, ...]) -> Affine:
    stride, padding, extra, groups, dilation = how
    push = lambda x, w, b=None: _TRANSPOSE[n](x, w, b, stride, padding, extra, groups, dilation)  # noqa: E731
    pull = lambda s, w, like: _pull(s, w, like, (stride, padding, dilation, True, extra, groups), n)  # noqa: E731
    one = lambda: weight.new_ones(weight.shape[0], 1, *weight.shape[2:])  # noqa: E731
    outputs = weight.shape[1] * groups
    return Affine(x, weight, bias, outputs, push, pull, (one, _grouped(groups, outputs, n)))


def _grouped(groups: int, channels: int, n: int) -> Callable[[Tensor], Tensor]:
    """From all outputs to one for each group, by sums."""
    axis = -n - 1

    def gather(flow: Tensor) -> Tensor:
        shape = (*flow.shape[:axis], groups, channels // groups, *flow.shape[len(flow.shape) + axis + 1 :])
        return flow.reshape(shape).sum(axis)

    return gather


def _pull(s: Tensor, w: Tensor, like: Tensor, how: tuple[Any, ...], n: int) -> Tensor:
    stride, padding, dilation, transposed, extra, groups = how
    single = like.ndim == n + 1  # a convolution of one row without a batch dim
    if single:
        s, like = s.unsqueeze(0), like.unsqueeze(0)
    if not overwritable(s):  # its size is all that is asked, and a function transform wants to see nothing else
        like = s.new_empty(1).expand(like.shape)
    mask = [True, False, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        s, like, w, None, list(stride), list(padding), list(dilation), transposed, list(extra), groups, mask
    )[0]
    return found.squeeze(0) if single else found


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n
