"""The multipliers of products and quotients of two values that both change, and what else DeepLift can follow."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tdconcepts.hooks.carrying import CARRIED
from tdconcepts.hooks.flows import backward_by, untransformed
from tdconcepts.hooks.references import Comparison, moves

_Verdict: TypeAlias = tuple[str, list[Tensor] | None]

__all__ = ["choice", "product", "quotient", "unfollowed"]


def product(call: Comparison) -> Tensor:
    r"""A product, of elements or matrices: :math:`\Delta(ab) = \Delta a\, (b + b_0) / 2 + (a + a_0) / 2\, \Delta b`.

    Each factor gets the change at the mean of the other: the Shapley value of the two. A factor that does not depend on
    what is explained is the same at both ends, and the gradient is right.
    """
    a, b = call.args[:2]
    if not (moves(a) and moves(b)):
        return call.output
    pairs = zip((a, b), call.base.args, strict=False)
    mean_a, mean_b = ((call.constant(t) + call.constant(base)) / 2 for t, base in pairs)
    if call.name not in ("matmul", "mv", "dot"):
        a, b, mean_a, mean_b = (t.expand(call.output.shape) for t in (a, b, mean_a, mean_b))
        return backward_by(_elements, call.output, [a, b], mean_a, mean_b, keep=False)
    formula = functools.partial(_matrices, a.ndim, b.ndim)
    a, mean_a = (t.unsqueeze(0) if t.ndim == 1 else t for t in (a, mean_a))
    b, mean_b = (t.unsqueeze(-1) if t.ndim == 1 else t for t in (b, mean_b))
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b, mean_a, mean_b = (t.expand(*lead, *t.shape[-2:]) for t in (a, b, mean_a, mean_b))
    return backward_by(formula, call.output, [a, b], mean_a, mean_b, keep=False)


def _elements(flow: Tensor, mean_a: Tensor, mean_b: Tensor) -> tuple[Tensor, Tensor]:
    return flow * mean_b, flow * mean_a


def _matrices(dims_a: int, dims_b: int, flow: Tensor, mean_a: Tensor, mean_b: Tensor) -> tuple[Tensor, Tensor]:
    if dims_b == 1:
        flow = flow.unsqueeze(-1)
    if dims_a == 1:
        flow = flow.unsqueeze(-2)
    return flow @ mean_b.transpose(-2, -1), mean_a.transpose(-2, -1) @ flow


def quotient(call: Comparison) -> Tensor:
    r"""A quotient: :math:`a` times :math:`1 / b`, of which :math:`1 / b` changes by :math:`-\Delta b / (b b_0)`."""
    reversed_ = getattr(call.function, "__name__", "").startswith("__r")
    if call.kwargs.get("rounding_mode") is not None:
        return call.output
    position = (1, 0) if reversed_ else (0, 1)
    (a, b), (a0, b0) = ([args[i] for i in position] for args in (call.args, call.base.args))
    if not moves(b):
        return call.output
    y = call.output
    inverse, inverse0 = (call.constant(t).expand(y.shape).reciprocal() for t in (b, b0))
    slope = -inverse * inverse0
    if not moves(a):
        factor = call.constant(a) if isinstance(a, Tensor) else a
        return backward_by(_times, y, [b.expand(y.shape)], slope * factor, keep=False)
    mean_a = ((call.constant(a) + call.constant(a0)) / 2).expand(y.shape)
    inputs = [a.expand(y.shape), b.expand(y.shape)]
    return backward_by(_both, y, inputs, (inverse + inverse0) / 2, slope * mean_a, keep=False)


def _times(flow: Tensor, factor: Tensor) -> tuple[Tensor]:
    return (flow * factor,)


def _both(flow: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return flow * one, flow * other


def choice(call: Comparison) -> str | None:
    """Why a choice by a mask (``where``, ``masked_fill``) can't be followed, if the two ends choose differently."""
    at = 0 if call.name == "where" else 1
    mask, base = call.args[at], call.base.args[at]
    if not isinstance(mask, Tensor) or not untransformed(mask) or torch.equal(mask, base):
        return None
    return "it chooses other elements at the baseline"


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Verdict | None:
    """Why a dropout can't be followed, if it is at work."""
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return ("it drops at random in training mode: model.eval()", None) if p and training else None


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Verdict | None:
    """Why a batch norm can't be followed, if it takes the statistics of the batch."""
    training = args[5] if len(args) > 5 else kwargs.get("training", False)
    return ("it takes the statistics of the batch in training mode: model.eval()", None) if training else None


def unfollowed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Verdict | None:
    """Why an operation without a formula can't be followed, unless some tensors stay the same (None: what it writes).

    None where it is linear, or moves values.
    """
    if name in _WEIGHTED:
        others = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor)]
        weights = [t for t in others if not isinstance(t, nn.Parameter)]
        return ("its weights depend on what is explained", weights) if weights else None
    if name in _CHECKED:
        return _CHECKED[name](args, kwargs)
    return None if name in _LINEAR or name.startswith("_") else ("it has no formula", None)


_WEIGHTED = frozenset(
    ["linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "embedding", "bilinear"]
)
_CHECKED = {"batch_norm": _batch_norm, **dict.fromkeys(["dropout", "alpha_dropout", "feature_dropout"], _dropout)}
_CHECKED |= {f"dropout{n}d": _dropout for n in (1, 2, 3)}
_LINEAR = CARRIED | frozenset(
    [
        "negative",
        "positive",
        "adjoint",
        "mt",
        "mh",
        "ravel",
        "dstack",
        "split_with_sizes",
        "tensor_split",
        "index",
        "broadcast_tensors",
        "diag",
        "diag_embed",
        "index_fill",
        "ndimension",
        "new_tensor",
        "empty_like",
        "rand_like",
        "randn_like",
        "is_complex",
        "nelement",
        "stride",
        "is_contiguous",
        "storage_offset",
        "data_ptr",
        "get_device",
        "item",
        "tolist",
        "numpy",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "isnan",
        "isinf",
        "isfinite",
        "argmax",
        "argmin",
        "any",
        "all",
        "allclose",
        "equal",
        "shape",
        "dtype",
        "device",
        "is_cuda",
        "layout",
        "atleast_2d",
        "atleast_3d",
        "format",
        "repr",
        "hash",
        "meshgrid",
        "result_type",
        "promote_types",
        "affine_grid",
        "fft",
        "rfft",
        "irfft",
        "ifft",
    ]
)
