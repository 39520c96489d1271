"""Functional calls under a plan: the mode that shows them to it, where modes stand, and which layer makes which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation
from torch.overrides import TorchFunctionMode

from tdconcepts.hooks.plans import Plan

__all__ = ["Functions", "operation_of", "push", "withdraw"]


class Functions(TorchFunctionMode):
    """Shows each torch function that is called to the innermost plan that knows what to do with it.

    It acts while a run of its plan is active on the thread: between two calls of a model it does nothing. What a plan
    swaps is swapped first; to compute it, the modes of the plans around this one see its functions in their turn.

    Args:
        plan: what to do, at functions.
        thread: this thread's runs, as ``thread.runs``.
    """

    def __init__(self, plan: Plan, thread: Any) -> None:
        self.plan, self.thread = plan, thread  # torch's own __init__ does nothing, and torch.compile can't trace it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {} if kwargs is None else kwargs
        for run in self.thread.runs:
            if run.plan is self.plan and run.active:
                for swap in self.plan.swaps:
                    args, given = swap.swap(func, args, given)
                if torch.is_grad_enabled() and not run.inside:
                    for act in self.plan.around:
                        return act.operate(run, func, args, given)
        return func(*args, **given)


def push(mode: Functions) -> None:
    """Let a mode stand on this thread, until it is withdrawn."""
    mode.__enter__()


def withdraw(plan: Plan) -> None:
    """Take the mode of a plan away, wherever it stands: others may have come after it."""
    above = []
    while torch._C._len_torch_function_stack():
        mode = torch._C._pop_torch_function_stack()
        if isinstance(mode, Functions) and mode.plan is plan:
            break
        above.append(mode)
    for mode in reversed(above):
        torch._C._push_on_torch_function_stack(mode)


def operation_of(layer: nn.Module) -> str:
    """The name of the one function that a layer of torch calls, if it is such a layer; else ``""``.

    Examples:
        >>> operation_of(nn.Conv2d(1, 1, 1)), operation_of(nn.SiLU()), operation_of(nn.LSTM(1, 1))
        ('conv2d', 'silu', '')
    """
    return _OPERATION_OF.get(type(layer), "") if "parametrizations" not in layer._modules else ""


_OPERATION_OF: dict[type, str] = {
    nn.Linear: "linear",
    **{getattr(nn, f"Conv{n}d"): f"conv{n}d" for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
    **{getattr(nn, f"BatchNorm{n}d"): "batch_norm" for n in (1, 2, 3)},
    **{getattr(nn, f"AvgPool{n}d"): f"avg_pool{n}d" for n in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{n}d"): f"adaptive_avg_pool{n}d" for n in (1, 2, 3)},
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "group_norm",
    nn.RMSNorm: "rms_norm",
    nn.LeakyReLU: "leaky_relu",
    **{getattr(nn, name): name.lower() for name in activation.__all__ if hasattr(nn.functional, name.lower())},
}
