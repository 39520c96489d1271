"""Composite operations of torch written out in simple ones, so that what looks at operations can follow them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdconcepts.errors import BadValue
from tdconcepts.hooks.plans import Run
from tdconcepts.hooks.recurrences import gru, gru_cell, lstm, lstm_cell

__all__ = ["OPENED", "Operates", "open_up"]


class Operates(Protocol):
    """What is shown every operation that runs under a plan."""

    def operate(self, run: Run, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``."""


class _Inside(TorchFunctionMode):
    """Shows the simple operations of one composite call to whoever was shown the call."""

    def __init__(self, act: Operates, run: Run) -> None:
        self.act, self.run = act, run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.act.operate(self.run, func, args, {} if kwargs is None else kwargs)


def open_up(name: str, act: Operates, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the composite operation ``name`` part by part, each part shown to ``act``."""
    with _Inside(act, run):
        return OPENED[name](*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention``."""
    refuse_dropout("scaled_dot_product_attention", dropout_p)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if is_causal:
        attn_mask = _causal(query.shape[-2], key.shape[-2], query)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is None:
        return torch.matmul(scores.softmax(-1), value)
    scores = scores + _additive(attn_mask, scores)
    nothing = scores.isneginf().all(-1, keepdim=True)  # a query without a key gets 0, as from torch
    return torch.matmul(scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0), value)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """``multi_head_attention_forward``: ``[L, B, E]`` or ``[L, E]``."""
    if bias_k is not None or bias_v is not None or add_zero_attn:
        raise BadValue("attention that adds keys of its own can't be followed", got="add_bias_kv or add_zero_attn")
    if given.get("static_k") is not None or given.get("static_v") is not None:
        raise BadValue("attention with static keys or values can't be followed", got="static_k or static_v")
    refuse_dropout("multi_head_attention_forward", dropout_p if given.get("training", True) else 0.0)
    single = query.ndim == 2
    parts = [t.unsqueeze(1) if single else t for t in (query, key, value)]
    apart: list[Any] = [given.get(f"{name}_proj_weight") for name in "qkv"]
    weights = apart if in_proj_weight is None or given.get("use_separate_proj_weight") else in_proj_weight.chunk(3)
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    projected = [F.linear(t, w, b) for t, w, b in zip(parts, weights, biases, strict=True)]
    q, k, v = (t.reshape(*t.shape[:2], num_heads, t.shape[-1] // num_heads).permute(1, 2, 0, 3) for t in projected)
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    mask = given.get("attn_mask")
    if mask is None and given.get("is_causal"):
        mask = _causal(q.shape[-2], k.shape[-2], q)
    if mask is not None:
        mask = mask.reshape(-1, num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        scores = scores + _additive(mask, scores, keeps=False)
    if (padding := given.get("key_padding_mask")) is not None:
        padding = padding.unsqueeze(0) if single else padding
        scores = scores + _additive(padding[:, None, None], scores, keeps=False)
    found = scores.softmax(-1)
    mixed = torch.matmul(found, v).permute(2, 0, 1, 3).flatten(-2)
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    if not given.get("need_weights", True):
        return out.squeeze(1) if single else out, None
    found = found.mean(1) if given.get("average_attn_weights", True) else found
    return (out.squeeze(1), found.squeeze(0)) if single else (out, found)


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``layer_norm``."""
    dims = list(range(-len(normalized_shape), 0)) if hasattr(normalized_shape, "__len__") else [-1]
    centred = x - x.mean(dims, keepdim=True)
    return _affine(centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, bias)


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """``rms_norm``."""
    dims = list(range(-len(normalized_shape), 0)) if hasattr(normalized_shape, "__len__") else [-1]
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * (x.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``group_norm``."""
    rows = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:])
    dims = list(range(2, rows.ndim))
    centred = rows - rows.mean(dims, keepdim=True)
    scaled = (centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()).flatten(1, 2)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return _affine(scaled, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``addmm`` and ``baddbmm``."""
    product = torch.matmul(a, b)
    return (bias if beta == 1 else bias * beta) + (product if alpha == 1 else product * alpha)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    """``glu``."""
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """``normalize``, to a Euclidean length of one."""
    if p != 2:
        raise BadValue("only Euclidean lengths can be followed", got=f"normalize(p={p})", needed="p=2")
    return x / x.square().sum(dim, keepdim=True).sqrt().clamp_min(eps)


def _norm(x: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    """``norm``, the Euclidean one."""
    if p not in ("fro", None, 2, 2.0):
        raise BadValue("only Euclidean norms can be followed", got=f"norm(p={p})", needed="p=2")
    squares = x.square()
    return (squares.sum() if dim is None else squares.sum(dim, keepdim=keepdim)).sqrt()


OPENED: Mapping[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "glu": _glu,
    "normalize": _normalize,
    "norm": _norm,
    "lstm": lstm,
    "gru": gru,
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "addmm": _addmm,
    "baddbmm": _addmm,
}


def refuse_dropout(name: str, p: float) -> None:
    """Raise for dropout that is at work: another forward draws another mask."""
    if p:
        raise BadValue(f"{name!r} drops at random", got=f"p={p}", needed="evaluation mode", fix="model.eval()")


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _causal(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril()


def _additive(mask: Tensor, scores: Tensor, keeps: bool = True) -> Tensor:
    """A mask as what is added; a bool one says what is kept (``keeps``), or what is masked."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask if keeps else mask, -math.inf)
