"""Kinds of layers and operations, as composites speak of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm, pooling

from tdconcepts.hooks.carrying import CARRIED
from tdconcepts.hooks.functions import operation_of

__all__ = [
    "ELEMENTWISE",
    "PLAIN",
    "activation",
    "average",
    "batch_norm",
    "is_operation",
    "operation_of",
    "rms_norm",
]

_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in [
        "ELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardtanh",
        "Hardswish",
        "LeakyReLU",
        "LogSigmoid",
        "PReLU",
        "ReLU",
        "ReLU6",
        "RReLU",
        "SELU",
        "CELU",
        "GELU",
        "Mish",
        "Sigmoid",
        "SiLU",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
        "Threshold",
    ]
)

# Functions of one value, by which its relevance passes: f(x) / x in the gradient convention.
ELEMENTWISE: tuple[str, ...] = (
    "relu",
    "leaky_relu",
    "prelu",
    "threshold",
    "elu",
    "hardshrink",
    "hardsigmoid",
    "hardtanh",
    "hardswish",
    "logsigmoid",
    "rrelu",
    "relu6",
    "selu",
    "celu",
    "gelu",
    "mish",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sin",
    "cos",
    "tan",
    "atan",
    "sinh",
    "asinh",
    "erf",
    "sqrt",
    "square",
    "pow",
    "logit",
)

# Operations that move, add or choose values: their gradient hands relevance on in either convention.
PLAIN = CARRIED | frozenset(
    [
        "relu",
        "threshold",
        "leaky_relu",
        "prelu",
        "abs",
        "sign",
        "round",
        "floor",
        "ceil",
        "trunc",
        "dropout",
        "dropout1d",
        "dropout2d",
        "alpha_dropout",
        "feature_dropout",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "where",
        "masked_fill",
        "masked_select",
        "max",
        "min",
        "amax",
        "amin",
        "maximum",
        "minimum",
        "topk",
        "sort",
        "clamp",
        "clip",
        "lerp",
        "embedding",
        "flatten_parameters",
        "kthvalue",
        "median",
    ]
)


def activation(layer: Any) -> bool:
    """An elementwise activation: of ``torch.nn``, or of Hugging Face's ``transformers``.

    Examples:
        >>> activation(nn.Mish()), activation(nn.Softmax(-1))
        (True, False)
    """
    if isinstance(layer, _ACTIVATIONS):
        return True
    return isinstance(layer, nn.Module) and type(layer).__module__ == "transformers.activations"


def batch_norm(layer: Any) -> bool:
    """A batch norm.

    Examples:
        >>> batch_norm(nn.BatchNorm2d(3)), batch_norm(nn.LayerNorm(3))
        (True, False)
    """
    return isinstance(layer, batchnorm._BatchNorm)


def average(layer: Any) -> bool:
    """An average pooling.

    Examples:
        >>> average(nn.AdaptiveAvgPool2d(1)), average(nn.MaxPool2d(2))
        (True, False)
    """
    return isinstance(layer, (pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd))


def rms_norm(layer: Any) -> bool:
    """An RMS norm: torch's, or a module of that name, such as those of Hugging Face.

    Examples:
        >>> rms_norm(nn.RMSNorm(3)), rms_norm(nn.LayerNorm(3))
        (True, False)
    """
    return isinstance(layer, nn.RMSNorm) or type(layer).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def is_operation(name: str) -> bool:
    """Whether torch has a function of this name, as :func:`~tdconcepts.hooks.flows.operation_name` gives names.

    Examples:
        >>> is_operation("matmul"), is_operation("getitem"), is_operation("special_i0"), is_operation("matmull")
        (True, True, True, False)
    """
    group, _, inner = name.partition("_")
    spelled = (name, f"__{name}__", f"{name}_")
    if name in PLAIN or any(hasattr(place, word) for place in (torch, torch.Tensor, nn.functional) for word in spelled):
        return True
    return bool(inner) and hasattr(getattr(torch, group, None), inner)
