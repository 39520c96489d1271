"""Vector-Jacobian products: one seed for each target, pulled back together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tdconcepts.errors import BadValue

__all__ = ["differentiable", "new_leaf", "seeds", "tangent", "vector_jacobian"]


def vector_jacobian(
    values: Tensor, inputs: Sequence[Any], several: bool, create_graph: bool, width: int | None, name: str
) -> list[Tensor | None]:
    """Gradients of ``values`` (``[*B]``, or ``[*B, T]``: then with T in front) with respect to tensors or graph edges.

    Raises:
        BadValue: when ``values`` has no graph.
    """
    if not values.requires_grad:
        raise BadValue(
            f"no gradient reaches the target {name}",
            got="a value without a graph",
            needed="a target that depends on what is explained",
            fix="the model detaches it or computes it under no_grad, or nothing that is explained matters for it",
        )
    if not several:
        seed = torch.ones_like(values)
        return list(torch.autograd.grad(values, inputs, seed, create_graph=create_graph, allow_unused=True))
    each = seeds(values)
    step = max(1, width or len(each))
    parts: list[Sequence[Tensor | None]] = []
    for start in range(0, len(each), step):
        keep = create_graph or start + step < len(each)
        found = torch.autograd.grad(
            values,
            inputs,
            each[start] if step == 1 else each[start : start + step],
            retain_graph=keep,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=step > 1,
        )
        parts.append(found if step > 1 else [None if g is None else g.unsqueeze(0) for g in found])
    return [
        None if piece[0] is None else torch.cat(piece) if len(piece) > 1 else piece[0]
        for piece in zip(*parts, strict=True)
    ]


def tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)``, and its derivative at x in the direction of x: equal where it is homogeneous of degree one.

    Examples:
        >>> tangent(torch.relu, torch.tensor([-1.0, 2.0]))
        (tensor([0., 2.]), tensor([0., 2.]))
    """
    # twice backwards: torch's forward mode knows fewer functions
    value, pull = torch.func.vjp(function, x)  # type: ignore[misc]
    _, along = torch.func.vjp(lambda flow: pull(flow)[0], torch.zeros_like(value))  # type: ignore[misc]
    return value, along(x)[0]


def seeds(values: Tensor) -> Tensor:
    """``[T, *B, T]``: for each target a one in its own column."""
    count = values.shape[-1]
    eye = torch.eye(count, dtype=values.dtype, device=values.device)
    return eye.view(count, *[1] * (values.ndim - 1), count).expand(count, *values.shape)


def new_leaf(value: Tensor, create_graph: bool) -> Tensor:
    """Where a gradient is taken: ``value`` itself if its graph is to go on, else a leaf that requires grad."""
    if create_graph and value.requires_grad:
        return value
    return (value.clone() if value.is_inference() else value.detach()).requires_grad_()


def differentiable() -> contextlib.AbstractContextManager[Any]:
    """Gradient mode on, whatever the caller is in: collectors run under ``no_grad``, some under ``inference_mode``."""
    if torch.is_inference_mode_enabled():
        return _left_inference()
    return contextlib.nullcontext() if torch.is_grad_enabled() else torch.enable_grad()


@contextlib.contextmanager
def _left_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
