"""A call with other parameters, functionally: what rules with ``zero_params`` and modifiers work with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdconcepts.hooks.rules import Call, Rule

__all__ = ["check_names", "output_without", "substituted"]

Modify = Callable[[str, Tensor], Tensor]
_WEIGHTED = {"linear", *(f"conv{t}{n}d" for n in (1, 2, 3) for t in ("", "_transpose"))}


def substituted(call: Call, rule: Rule, modify: Modify) -> tuple[Any, Any, Any]:
    """What is called in the place of what was called, and with which arguments; the module keeps its parameters.

    Args:
        call: a call of a module, or of a linear layer or convolution as a function.
        rule: who asks, for the error.
        modify: ``(name, parameter) -> tensor``.
    """
    if call.module is not None:
        return _with_parameters(call.module, modify), call.args, call.kwargs
    if call.name not in _WEIGHTED:
        raise call.cannot(rule, "it has no weight", "a module, or a linear layer or convolution as a function")
    args, kwargs = list(call.args), dict(call.kwargs)
    for place, name in enumerate(("weight", "bias"), 1):
        given = args[place] if len(args) > place else kwargs.get(name)
        if given is not None and len(args) > place:
            args[place] = modify(name, given)
        elif given is not None:
            kwargs[name] = modify(name, given)
    return call.function, tuple(args), kwargs


def _with_parameters(module: nn.Module, modify: Modify, prefix: str = "") -> nn.Module:
    """A copy of a module that shares all but its parameters, and has no hooks."""
    other = copy.copy(module)
    state = vars(other)
    for name, value in vars(module).items():
        state[name] = dict(value) if isinstance(value, dict) else value
    for name in [name for name in state if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]:
        state[name] = {}
    state["_parameters"] = {
        name: None if p is None else modify(f"{prefix}{name}", p) for name, p in module._parameters.items()
    }
    state["_modules"] = {
        name: None if inner is None else _with_parameters(inner, modify, f"{prefix}{name}.")
        for name, inner in module._modules.items()
    }
    return other


def output_without(call: Call, rule: Rule, names: tuple[str, ...]) -> Tensor:
    """The output of a call whose parameters of these names are zero.

    Args:
        call: a call of a module, or of a linear layer or convolution as a function.
        rule: who asks, for the error.
        names: of parameters.

    Raises:
        BadValue: for a name that is no parameter, and an output that is no tensor.
    """
    check_names(call, rule, names)
    function, args, kwargs = substituted(call, rule, lambda name, p: torch.zeros_like(p) if name in names else p)
    module = isinstance(function, nn.Module)
    found: Tensor = function.forward(*args, **kwargs) if module else function(*args, **kwargs)
    if not isinstance(found, Tensor):
        why = f"it writes a {type(found).__name__}, with zero_params"
        raise call.cannot(rule, why, "a rule on the modules inside it")
    if call.folded is None:
        return found
    k, shift = (part.reshape(1, -1, *[1] * (found.ndim - 2)) for part in call.folded)
    return found * k if "bias" in names else found * k + shift


def check_names(call: Call, rule: Rule, names: tuple[str, ...]) -> None:
    """Raise for a name that is no parameter; a weight and a bias any layer may have.

    Args:
        call: a call.
        rule: who asks, for the error.
        names: of parameters.

    Raises:
        BadValue: the name, and those that there are.
    """
    known = [] if call.module is None else [name for name, _ in call.module.named_parameters()]
    wrong = [name for name in names if name not in ("weight", "bias", *known)]
    if wrong:
        raise call.cannot(rule, f"it has no parameter {wrong[0]!r}", f"zero_params of {known or ['weight', 'bias']}")
