"""Vector-Jacobian products: one seed for each target, pulled back together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tdconcepts.errors import BadValue

__all__ = ["differentiable", "new_leaf", "seeds", "tangent", "vector_jacobian"]


def vector_jacobian(
    values: Tensor,
    inputs: Sequence[Any],
    several: bool,
    create_graph: bool,
    width: int | None,
    name: str,
    take: Callable[[int, slice, Tensor], None] | None = None,
) -> list[Tensor | None]:
    """Gradients of ``values`` (``[*B]``, or ``[*B, T]``: then with T in front) with respect to tensors or graph edges.

    With ``take`` they are not collected: it gets the number of an input, which targets, and their gradients.

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
        found = torch.autograd.grad(values, inputs, seed, create_graph=create_graph, allow_unused=True)
        if take is None:
            return list(found)
        return _given(take, slice(0, 1), found, 1)
    outputs: Tensor | GradientEdge = values
    each, count = seeds(values), values.shape[-1]
    step = max(1, width or count)
    if step == 1 < count and not create_graph and (neck := _neck(values, inputs)) is not None:
        flat, shaped = torch.autograd.grad(values, neck, each, retain_graph=True, is_grads_batched=True)
        if torch.equal(flat.reshape(shaped.shape), shaped):  # else somebody's hook is there, which must act once
            outputs, each = neck[1], shaped
        del flat, shaped
    together: list[Tensor | None] = [None] * len(inputs)
    parts: list[Sequence[Tensor | None]] = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        found = torch.autograd.grad(
            outputs,
            inputs,
            each[start] if step == 1 else each[start:stop],
            retain_graph=create_graph or stop < count,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=step > 1,
        )
        if take is not None:
            _given(take, slice(start, stop), found, step)
        elif create_graph or stop - start == count:
            parts.append(found if step > 1 else [None if g is None else g.unsqueeze(0) for g in found])
        else:
            at = start if step == 1 else slice(start, stop)
            together = [_put(g, many, at, values) for g, many in zip(found, together, strict=True)]
    if not parts:
        return together
    return [
        None if piece[0] is None else torch.cat(piece) if len(piece) > 1 else piece[0]
        for piece in zip(*parts, strict=True)
    ]


def _given(
    take: Callable[[int, slice, Tensor], None], targets: slice, found: Sequence[Tensor | None], step: int
) -> list[Tensor | None]:
    for i, gradient in enumerate(found):
        if gradient is not None:
            take(i, targets, gradient if step > 1 else gradient.unsqueeze(0))
    return []


def _put(piece: Tensor | None, many: Tensor | None, at: int | slice, values: Tensor) -> Tensor | None:
    """``piece`` at its place in ``many`` ``[T, *B, ...]``, whose memory is in the order ``[*B, T, ...]``."""
    if many is None and piece is not None:
        lead, row = values.ndim - 1, piece.shape if isinstance(at, int) else piece.shape[1:]
        many = piece.new_zeros(*row[:lead], values.shape[-1], *row[lead:]).movedim(min(lead, len(row)), 0)
    if many is not None and piece is not None:
        many[at] = piece
    return many


# Backward passes that are faster for many flows at once: a matrix is read once for all; and what lies between these.
_MATRICES = frozenset(["AddmmBackward0", "MmBackward0"])
_BETWEEN = frozenset(
    [
        *("ViewBackward0", "UnsafeViewBackward0", "CloneBackward0", "SqueezeBackward1", "UnsqueezeBackward0"),
        *("SliceBackward0", "IndexBackward0", "SelectBackward0", "TransposeBackward0", "PermuteBackward0"),
        *("ReluBackward0", "LeakyReluBackward0", "EluBackward0", "GeluBackward0", "SiluBackward0", "TanhBackward0"),
        *("SigmoidBackward0", "SoftplusBackward0", "SoftmaxBackward0", "LogSoftmaxBackward0"),
    ]
)


def _neck(values: Tensor, inputs: Sequence[Any]) -> list[GradientEdge] | None:
    """An edge that all of the graph goes through, with only such passes after it and no more numbers than ``inputs``:
    the last one before a view, and with it the edge after that view, where the same numbers flow.

    Flows of many targets are pulled back to it together, and then on one by one: a convolution is not faster together.
    """
    edges = [get_gradient_edge(one) if isinstance(one, Tensor) else one for one in inputs]
    wanted, most = {edge.node for edge in edges}, sum(map(_size, edges))
    node, number, neck, matrices = values.grad_fn, values.output_nr, None, False
    while node is not None and node not in wanted and node.name() in _MATRICES | _BETWEEN:
        rest = [GradientEdge(after, i) for after, i in node.next_functions if after is not None]
        rest = [edge for edge in rest if not _is_parameter(edge.node, wanted)] if len(rest) > 1 else rest
        if len(rest) != 1 or rest[0].node in wanted or _size(rest[0]) > most:
            break
        matrices = matrices or node.name() in _MATRICES
        if matrices and node.name() == "ViewBackward0":
            neck = [GradientEdge(node, number), rest[0]]
        node, number = rest[0].node, rest[0].output_nr
    return neck


def _size(edge: GradientEdge) -> int:
    found: Any = edge.node
    return math.prod(found._input_metadata[edge.output_nr].shape)


def _is_parameter(node: Node, wanted: set[Node]) -> bool:
    """Whether nothing but a leaf that nobody asks for lies behind ``node``, as it is or transposed."""
    if node.name() == "TBackward0":
        node = node.next_functions[0][0]  # type: ignore[assignment]
    return node is not None and node not in wanted and node.name().endswith("AccumulateGrad")


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
