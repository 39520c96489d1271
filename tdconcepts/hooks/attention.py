"""Attention weights where a model uses them, in the order of execution, and gradients of a target there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue
from tdconcepts.hooks.batching import dense
from tdconcepts.hooks.contexts import run_under
from tdconcepts.hooks.flows import operation_name
from tdconcepts.hooks.jacobian import differentiable, seeds, vector_jacobian
from tdconcepts.hooks.opened import OPENED, open_up
from tdconcepts.hooks.plans import Run, Step
from tdconcepts.hooks.pullback import Pullback
from tdconcepts.hooks.sites import Place, Site

__all__ = ["Attended", "Attention"]

_FOUND = "attention weights"
_SOFT = frozenset(["softmax", "safe_softmax"])
_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")
_SHAPES = ("view", "view_as", "reshape", "unflatten", "flatten", "expand", "squeeze", "unsqueeze", "contiguous")
_SAME = frozenset(["dropout", "clone", "masked_fill", "nan_to_num", *_CASTS, *_SHAPES])
_ATTENTION = frozenset(["scaled_dot_product_attention", "multi_head_attention_forward", "addmm", "baddbmm"])


class Attention(NamedTuple):
    """What one forward has shown.

    ``weights``: ``[*B, heads, T, S]`` for each layer, in the order in which they are used; ``gradients``: of the target
    at each, ``[*B, heads, T, S]``, or ``[*B, n, heads, T, S]`` for n targets; ``values``: the target's; ``outputs``:
    what the model wrote.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    values: Tensor | None
    outputs: TensorDictBase


@dataclasses.dataclass(frozen=True)
class Attended:
    """A program of a pull-back that watches attention weights: what a softmax gives that is multiplied with values.

    As modules (``nn.MultiheadAttention``, Hugging Face's in eager or SDPA form) or written out; fused operations are
    opened up.

    Args:
        rules: a program of changed backward passes to pull back through; what is inside a module with a rule of its own
            is not seen.
    """

    rules: Any = None
    in_keys: ClassVar[tuple[Any, ...]] = ()

    def around(self, module: nn.Module, steps: list[Step]) -> list[Step]:
        """Other steps, and the one that sees every operation."""
        whole = Place(Site("."), ".", module, "input", None, None, None, None)
        steps = steps if self.rules is None else self.rules.around(module, steps)
        inner = [step.act for step in steps if hasattr(step.act, "operate")]
        others = [step for step in steps if not hasattr(step.act, "operate")]
        return [*others, Step(whole, _Look(inner[0] if inner else None), every=True, whole=True)]

    def seen(
        self,
        pullback: Pullback,
        td: TensorDictBase,
        *,
        gradients: bool = True,
        create_graph: bool = False,
        held: Tensor | None = None,
        width: int | None = None,
    ) -> Attention:
        """Run the module once, and pull the target back to the attention weights.

        Args:
            pullback: made with ``rules=`` this program.
            td: the module's inputs, ``[*B]``.
            gradients: whether they are wanted; else nothing of the target is asked for.
            create_graph, held, width: as of :class:`Pullback`.

        Raises:
            BadValue: a model in which nothing attends.
        """
        if is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return _functional(pullback, td, gradients, create_graph, held, width)
        with differentiable():
            found = _Found()
            work, values, several = _forward(pullback, td, found, held, gradients)
            grads: list[Tensor] = []
            if gradients:
                assert values is not None
                name = pullback.target.name
                given = vector_jacobian(values, found.handles, several, create_graph, width, name)
                grads = [
                    torch.zeros_like(w if not several else w.expand(values.shape[-1], *w.shape)) if g is None else g
                    for g, w in zip(given, found.weights, strict=True)
                ]
        return _shaped(found.weights, grads, values, work, td, several, create_graph)


class _Found:
    """The attention weights of one forward, and where gradients are taken."""

    def __init__(self, zeros: tuple[Tensor, ...] | None = None, shapes: bool = False) -> None:
        self.weights: list[Tensor] = []
        self.handles: list[Any] = []
        self.soft: list[Tensor] = []  # kept, so that no other tensor can take their identity
        self.zeros, self.shapes = zeros, shapes

    def is_soft(self, value: Any) -> bool:
        """Whether a value is what a softmax gave."""
        return any(value is one for one in self.soft)

    def take(self, value: Tensor) -> Tensor:
        """The weights to go on with."""
        if self.zeros is not None:
            value = value + self.zeros[len(self.weights)]
        elif not self.shapes:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.handles.append(get_gradient_edge(value) if value.grad_fn is not None else value)
        self.weights.append(value)
        return value


class _Look:
    """What a function mode does with each call of a function."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, tree: Any, run: Run, given: Any) -> Any:
        return tree

    def operate(self, run: Run, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``; note what is a softmax, and take it where it is multiplied with values."""
        found: _Found | None = run.store.get(_FOUND)
        if found is None:
            return func(*args, **kwargs) if self.inner is None else self.inner.operate(run, func, args, kwargs)
        name = operation_name(func)
        if name in _ATTENTION and name in OPENED:
            return open_up(name, self, run, args, kwargs)
        if name == "matmul" and found.is_soft(args[0]):
            args = (found.take(args[0]), *args[1:])
        elif name == "einsum" and len(args) > 1:
            args = tuple(found.take(value) if found.is_soft(value) else value for value in args)
        inner = self.inner
        output = func(*args, **kwargs) if inner is None else inner.operate(run, func, args, kwargs)
        if name in _SOFT or (name in _SAME and args and found.is_soft(args[0])):
            found.soft.append(output)
        return output


def _forward(
    pullback: Pullback, td: TensorDictBase, found: _Found, held: Tensor | None, gradients: bool
) -> tuple[TensorDictBase, Tensor | None, bool]:
    work = dense(td, pullback.reads(td))
    run = Run(pullback.plan, work)
    run.store["points"], run.store[_FOUND] = {}, found
    work = run_under(run, pullback._forward, work, run)
    if not found.weights:
        raise BadValue(
            "the model has no attention weights",
            got="no softmax whose result is multiplied with values",
            needed="attention: nn.MultiheadAttention, scaled_dot_product_attention, or softmax(...) @ values",
            fix="attention in a kernel of one's own, or inside a module that has a rule, can't be seen; Hugging Face: "
            "attn_implementation='eager'",
        )
    if not gradients:
        return work, None, False
    values, several = pullback._values(work, td, run, held)
    return work, values, several


def _functional(
    pullback: Pullback,
    td: TensorDictBase,
    gradients: bool,
    create_graph: bool,
    held: Tensor | None,
    width: int | None,
) -> Attention:
    """The same by ``torch.func``: what ``torch.compile`` and the function transforms can trace."""
    shapes = _Found(shapes=True)
    with torch.enable_grad():
        work, _, _ = _forward(pullback, td, shapes, held, False)
        if not gradients:
            return _shaped(shapes.weights, [], None, work, td, False, create_graph)
        zeros = tuple(torch.zeros_like(weights).detach() for weights in shapes.weights)
        several = False

        def forward(*given: Tensor) -> tuple[Tensor, Any]:
            nonlocal several
            found = _Found(zeros=given)
            work, values, several = _forward(pullback, td, found, held, True)
            assert values is not None
            return values, (found.weights, {key: work.get(key) for key in work.keys(True, True)})

        values, pull, (weights, wrote) = torch.func.vjp(forward, *zeros, has_aux=True)  # type: ignore[misc]
        grads = list(torch.vmap(pull, chunk_size=width)(seeds(values)) if several else pull(torch.ones_like(values)))
    outputs = dense(td, [])
    for key, value in wrote.items():
        outputs.set(key, value)
    return _shaped(weights, grads, values, outputs, td, several, create_graph)


def _shaped(
    weights: list[Tensor],
    gradients: list[Tensor],
    values: Tensor | None,
    outputs: TensorDictBase,
    td: TensorDictBase,
    several: bool,
    create_graph: bool,
) -> Attention:
    batch, lead = td.batch_size, td.batch_dims
    shaped = [_heads(weight, batch) for weight in weights]
    if several:
        gradients = [torch.stack([_heads(one, batch) for one in each], lead) for each in gradients]
    else:
        gradients = [_heads(each, batch) for each in gradients]
    if not create_graph:
        shaped, gradients = [w.detach() for w in shaped], [g.detach() for g in gradients]
        values = None if values is None else values.detach()
        outputs = outputs.detach()
    return Attention(shaped, gradients, values, outputs)


def _heads(value: Tensor, batch: torch.Size) -> Tensor:
    """Weights ``[*B, heads, T, S]``: of one head or several, with batch dims merged into one, or with the heads."""
    lead, places = value.shape[:-2], value.shape[-2:]
    if lead[: len(batch)] == batch:
        return value.reshape(*batch, max(1, lead[len(batch) :].numel()), *places)
    rows = batch.numel()
    if lead and rows and lead[0] % rows == 0:
        return value.reshape(*batch, lead.numel() // rows, *places)
    if not rows:
        return value.reshape(*batch, max(1, lead[1:].numel()), *places)
    raise BadValue(
        "the attention weights do not have the batch in front",
        got=f"shape {list(value.shape)} for a TensorDict of batch size {list(batch)}",
        needed=f"{[*batch, 'heads', 'T', 'S']}, or the batch dims merged into one",
    )
