"""Flows: a value with a backward pass of one's own, which tensors have one, and what an operation is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.hooks.twice import ByFormulaOnce, now

__all__ = [
    "backward_by",
    "changed",
    "depends",
    "is_inplace",
    "operation_name",
    "overwritable",
    "tensors",
    "untransformed",
]


class _ByFormula(torch.autograd.Function):
    """``value`` going forwards; backwards, ``formula(flow, *saved)`` gives what flows into the ``count`` inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(formula: Callable[..., Any], count: int, keep: bool, value: Tensor, *given: Tensor) -> Tensor:
        return value.detach()  # the storage of value: no copy, and free for in-place operations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        formula, count, keep, _, *given = inputs
        ctx.formula, ctx.rest = formula, len(given) - count
        ctx.save_for_backward(*(given if keep else given[count:]))

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Any, ...]:
        found = ctx.formula(flow, *ctx.saved_tensors)
        return (None, None, None, None, *found, *[None] * ctx.rest)


class _ByFormulaAtOnce(torch.autograd.Function):
    """The same without a ``setup_context``, for which torch looks at the signature in each call, which takes longer."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Any], count: int, keep: bool, value: Tensor, *given: Tensor) -> Tensor:
        ctx.formula, ctx.rest = formula, len(given) - count
        ctx.save_for_backward(*(given if keep else given[count:]))
        ctx.set_materialize_grads(False)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, flow: Tensor | None) -> tuple[Any, ...]:
        if flow is None:  # where a value was only kept, not passed on
            return (None,) * len(ctx.needs_input_grad)
        return (None, None, None, None, *ctx.formula(flow, *ctx.saved_tensors), *[None] * ctx.rest)


_AtOnce: Any = super(torch.autograd.Function, _ByFormulaAtOnce)


def backward_by(
    formula: Callable[..., tuple[Any, ...]], value: Tensor, inputs: list[Tensor], *saved: Any, keep: bool = True
) -> Tensor:
    """``value``, with ``formula(flow, *inputs, *saved)`` for its backward pass: one flow for each of ``inputs``.

    With ``keep=False`` the inputs are not kept, and it is ``formula(flow, *saved)``.

    Args:
        formula: from what flows to ``value`` to what flows into each of ``inputs``.
        value: what is written.
        inputs: the tensors that the flows are for.
        saved: more tensors that the formula needs, or :class:`~tdconcepts.hooks.kept.Kept` ones.
        keep: whether the formula needs the inputs.

    The formula is made of differentiable operations, so a second derivative is that of the formula. It runs under
    ``vmap`` and ``torch.compile``.

    Examples:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> y = backward_by(lambda flow, x: (flow * x,), x.exp(), [x])
        >>> torch.autograd.grad(y.sum(), x)[0]
        tensor([1., 2.])
    """
    if not all([isinstance(part, Tensor) for part in saved]):  # noqa: C419 - some are kept elsewhere, see `kept`
        formula = functools.partial(_with_kept, formula, saved)
        saved = tuple(part for part in saved if isinstance(part, Tensor))
    given = [*inputs, *saved]
    kind: Any = _ByFormula
    if is_compiling():  # which can't trace one tensor given twice
        given = [t.clone() if any(t is other for other in given[:i]) else t for i, t in enumerate(given)]
    elif not torch._C._are_functorch_transforms_active():
        kind, one = _ByFormulaAtOnce, now()
        if one is not None:
            twice: Tensor = ByFormulaOnce.apply(one, formula, len(inputs), keep, value, *given)
            return twice
        if not any([torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (value, *given)]):  # noqa: C419 - faster
            kind = _AtOnce  # without what apply does for the values of function transforms
    found: Tensor = kind.apply(formula, len(inputs), keep, value.detach(), *given)
    return found


def _with_kept(formula: Callable[..., Any], saved: tuple[Any, ...], flow: Tensor, *given: Tensor) -> Any:
    """``formula``, with what is kept elsewhere at its place among what is given."""
    count = sum(isinstance(part, Tensor) for part in saved)
    first, rest = given[: len(given) - count], iter(given[len(given) - count :])
    return formula(flow, *first, *[next(rest) if isinstance(part, Tensor) else part.get() for part in saved])


class _Overwrite(torch.autograd.Function):
    """As ``copy_``, after which nothing flows to what was there, where ``copy_`` lets zeros flow."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(target)
        return target.copy_(value)

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[None, Tensor]:
        return None, flow


def overwrite(target: Tensor, value: Tensor) -> Tensor:
    """``target``, with the numbers and the graph of ``value``."""
    if not untransformed(target) or target._base is not None or target.grad_fn is None:
        return target.copy_(value)
    found: Tensor = _Overwrite.apply(target, value)
    return found


def by_formula(node: Any) -> bool:
    """Whether a node of a graph is one of :func:`backward_by`."""
    return type(node) in _NODES


_NODES = tuple(kind._backward_cls for kind in (_ByFormula, _ByFormulaAtOnce, ByFormulaOnce))


@torch.compiler.assume_constant_result  # else each entry of the table would be a guard of what is compiled
def operation_name(func: Callable[..., Any]) -> str:
    """The one name of an operation: of ``torch.mul``, ``Tensor.mul_``, ``x * y`` and ``x *= y`` it is ``"mul"``.

    Examples:
        >>> operation_name(torch.mul), operation_name(torch.Tensor.__rmul__), operation_name(torch.Tensor.mul_)
        ('mul', 'mul', 'mul')
    """
    name: str = getattr(func, "__name__", "")
    return _SPELLINGS.get(name, name)


def _spelling(name: str) -> str:
    plain = name.strip("_")
    if name.startswith("__") and plain[:1] in ("r", "i") and plain[1:] in _REFLECTED:
        plain = plain[1:]
    return _SAME.get(plain, plain)


_REFLECTED = ("add", "sub", "mul", "matmul", "pow", "mod", "truediv", "floordiv")
_SAME = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "rsub": "sub",
    "bmm": "matmul",
    "mm": "matmul",
}
_SPELLINGS = {name: _spelling(name) for name in (*dir(torch.Tensor), *dir(torch))} | {"_threshold": "threshold"}
_INPLACE = frozenset(
    name
    for name in dir(torch.Tensor)
    if (name.endswith("_") and not name.endswith("__")) or (name[:3] == "__i" and name[3:-2] in _REFLECTED)
)


def depends(value: Any) -> bool:
    """Whether a tensor may depend on what is explained: it has a graph that is not made of parameters alone.

    Examples:
        >>> layer, x = nn.Linear(2, 2), torch.ones(2, requires_grad=True)
        >>> depends(layer(x)), depends(layer(x.detach())), depends(layer.weight)
        (True, False, False)
    """
    if type(value) is not Tensor and (not isinstance(value, Tensor) or isinstance(value, nn.Parameter)):
        return False
    if not value.is_floating_point():
        return False
    if is_compiling():
        return value.requires_grad
    if not value.requires_grad:
        value = under_vmap(value)
        if not value.requires_grad or isinstance(value, nn.Parameter):
            return False
    nodes: list[Any] = [value.grad_fn]
    if nodes[0] is None:
        return True
    seen = 0
    while nodes and seen < 8:  # made of parameters, the graph is small: a weight's square, its normalisation
        node = nodes.pop()
        seen += 1
        kind = type(node)
        if kind in _NODES:
            if getattr(node, "constant", False):
                continue
            return True
        if kind.__name__.startswith("Embedding"):  # tokens, not parameters alone
            return True
        below = node.next_functions
        if not below:
            if not isinstance(getattr(node, "variable", None), nn.Parameter):
                return True
            continue
        nodes += [other for other, _ in below[::-1] if other is not None]  # what comes first is mostly no parameter
    return bool(nodes)


def depending(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call that the explained entry may have a part in."""
    given = [*args, *kwargs.values()]
    if any([isinstance(value, (tuple, list, dict)) for value in given]):  # noqa: C419 - faster
        given = tensors(given)
    return [value for value in given if depends(value)]


def under_vmap(value: Tensor) -> Tensor:
    """The tensor that a model's own ``vmap`` has wrapped, which knows of its graph."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(value):
        value = functorch.get_unwrapped(value)
    return value


def untransformed(value: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at: no compiler and no function transform is at work.

    Examples:
        >>> untransformed(torch.ones(1))
        True
    """
    if is_compiling():
        return False
    functorch = torch._C._functorch
    if functorch.maybe_current_level() is not None or functorch.is_functorch_wrapped_tensor(value):
        return False
    return not functorch.is_legacy_batchedtensor(value)  # what is_grads_batched makes


def overwritable(flow: Tensor) -> bool:
    """Whether a formula may write over its intermediate results: no second derivative and no transform needs them.

    Examples:
        >>> with torch.no_grad():
        ...     overwritable(torch.ones(1))
        True
    """
    return not torch.is_grad_enabled() and untransformed(flow)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts.

    Examples:
        >>> len(tensors({"a": torch.ones(1), "b": [torch.ones(1), (torch.ones(1), "c")]}))
        3
    """
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return found
    for part in tree:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)):
            found += tensors(part)
    return found


def changed(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree with every tensor changed.

    Args:
        tree: nested tuples, named tuples, lists and dicts.
        change: what is made of each tensor.

    Examples:
        >>> changed({"a": torch.ones(1), "b": [torch.ones(1), "c"]}, float)
        {'a': 1.0, 'b': [1.0, 'c']}
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        values = [changed(part, change) if isinstance(part, _TREES) else part for part in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, dict):
        new = {key: changed(part, change) if isinstance(part, _TREES) else part for key, part in tree.items()}
        return new if type(tree) is dict else type(tree)(**new)
    return tree


_TREES = (Tensor, tuple, list, dict)


@torch.compiler.assume_constant_result
def is_inplace(func: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument: ``x.mul_(y)``, ``x *= y``.

    Examples:
        >>> is_inplace(torch.Tensor.mul_), is_inplace(torch.Tensor.__imul__), is_inplace(torch.mul)
        (True, True, False)
    """
    return getattr(func, "__name__", "") in _INPLACE
