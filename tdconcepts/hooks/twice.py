"""Second derivatives through changed backward passes: the first one is by the formulas, all later ones are ordinary."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ByFormulaOnce", "Pass", "differentiable_once_more", "now"]


class Pass:
    """Whether the backward pass of a graph is still to come that goes by the formulas."""

    __slots__ = ("first",)

    def __init__(self) -> None:
        self.first = True


class _Now(threading.local):
    def __init__(self) -> None:
        self.one: Pass | None = None


_NOW = _Now()


def now() -> Pass | None:
    """The pass that graphs made on this thread now belong to, where second derivatives are wanted."""
    return _NOW.one


@contextlib.contextmanager
def differentiable_once_more(wanted: bool = True) -> Iterator[None]:
    """Forward and backward by the formulas inside; outside, the graph of what they gave has ordinary derivatives.

    An explanation depends on activations. Its derivative asks how *they* change with the input, which is what the
    model's ordinary backward pass says, not the changed one. Fused attention has no second derivative, so it is taken
    apart. Explainers do this by themselves with ``create_graph=True``; it is for rules that are installed by hand,
    whose second derivatives would else be those of the formulas.

    Args:
        wanted: False for nothing at all.

    Examples:
        >>> from tdconcepts.lrp import ZPlusRule
        >>> layers = torch.nn.Linear(1, 1, bias=False), torch.nn.Tanh(), torch.nn.Linear(1, 1, bias=False)
        >>> net, x = torch.nn.Sequential(*layers).double(), torch.tensor([[0.5]], dtype=torch.float64)
        >>> _ = x.requires_grad_()
        >>> with differentiable_once_more(), ZPlusRule().on(net[0], "relevance"):
        ...     (relevance,) = torch.autograd.grad(net(x), x, torch.ones_like(x), create_graph=True)
        >>> torch.autograd.grad(relevance, x)[0].shape
        torch.Size([1, 1])
    """
    before = _NOW.one
    _NOW.one = one = Pass() if wanted else None
    try:
        with sdpa_kernel(SDPBackend.MATH) if wanted else contextlib.nullcontext():
            yield
    finally:
        _NOW.one = before
        if one is not None:
            one.first = False


class ByFormulaOnce(torch.autograd.Function):
    """``value`` going forwards; backwards by a formula in the first pass, and into the graph of ``value`` in others."""

    @staticmethod
    def forward(
        ctx: Any, one: Pass, formula: Callable[..., Any], count: int, keep: bool, value: Tensor, *given: Tensor
    ) -> Tensor:
        ctx.one, ctx.formula, ctx.rest, ctx.all = one, formula, len(given) - count, len(given)
        ctx.constant = not count  # nothing flows in the first pass
        ctx.save_for_backward(*(given if keep else given[count:]))
        ctx.set_materialize_grads(False)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, flow: Tensor | None) -> tuple[Any, ...]:
        if flow is None:
            return (None,) * (5 + ctx.all)
        if not ctx.one.first:
            return (None, None, None, None, flow, *[None] * ctx.all)
        return (None, None, None, None, None, *ctx.formula(flow, *ctx.saved_tensors), *[None] * ctx.rest)
