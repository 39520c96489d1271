"""One call under a rule: what the rule is given, and where it is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadType, BadValue, nearest
from tdconcepts.hooks.flows import by_formula, changed, depending, depends, operation_name, tensors
from tdconcepts.hooks.kept import Kept
from tdconcepts.hooks.sites import is_compiled

__all__ = [
    "CONVENTIONS",
    "Call",
    "Convention",
    "carried",
    "check_convention",
    "layer_of",
    "refuse_hidden",
    "refuse_middle",
]

Convention: TypeAlias = Literal["gradient", "relevance"]
CONVENTIONS: tuple[Convention, ...] = ("gradient", "relevance")


class Call:
    """One call of a module or a function under a rule: what a rule has to work with.

    Args:
        name: the module's path, or the name of the operation.
        function: what was called: the module, or the function.
        args: positional arguments, as they were given (before an in-place operation).
        kwargs: keyword arguments.
        output: what it wrote.
        convention: what flows.
        ends: how a terminal rule hands over relevance in the gradient convention: as ``"relevance"``, or as the
            ``"ratio"`` to :func:`nonzero` of the input.
        safe: whether nothing will overwrite the output.

    ``report``: what is told of the propagation, if anything is. ``before``: the ruled call whose output is the first
    argument: its rule, the call, and that output. ``folded``: a scale and a shift of each channel, which count as part
    of the layer. ``written``: what has been made of the output by what passes relevance on as it is, if anything: then
    this value gets the backward pass. ``found``: what a rule wants to know when it sees the call again.
    """

    __slots__ = (
        "_inputs",
        "args",
        "before",
        "convention",
        "ends",
        "folded",
        "found",
        "function",
        "how",
        "kwargs",
        "name",
        "output",
        "report",
        "safe",
        "written",
    )

    def __init__(
        self,
        name: str,
        function: Any,
        args: Any,
        kwargs: Any,
        output: Any,
        how: Any,
        inputs: list[Tensor] | None = None,
    ) -> None:
        self.name, self.function, self.args, self.kwargs, self.output = name, function, args, kwargs, output
        self.how: Any = how.how if isinstance(how, Call) else how
        self.convention, self.ends, self.safe, self.report = how.convention, how.ends, how.safe, how.report
        self.before: tuple[Any, Call, Any] | None = None
        self.folded: tuple[Tensor, Tensor] | None = None
        self.found: Any = None
        self.written: Tensor | None = None
        self._inputs = inputs

    def passed_on(self, value: Tensor) -> Call:
        """The same call, of whose output ``value`` has been made."""
        call = Call(self.name, self.function, self.args, self.kwargs, self.output, self.how)
        call.folded, call.found, call.written = self.folded, self.found, value
        return call

    @property
    def module(self) -> nn.Module | None:
        """The module, if it is one."""
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors it was given that the explained entry may have a part in."""
        if self._inputs is None:
            self._inputs = depending(self.args, self.kwargs)
        return self._inputs

    @property
    def carries_relevance(self) -> bool:
        """Whether relevance flows, not its ratio to the activation."""
        return self.convention == "relevance"

    def saved(self, value: Tensor) -> Tensor:
        """``value`` as a formula may keep it: a copy where an in-place operation may follow."""
        value = value.detach() if self.how.lean else value
        return value if self.safe else value.clone()

    def kept(self, value: Tensor) -> Tensor | Kept:
        """As :meth:`saved`, for what goes to :func:`~tdconcepts.hooks.flows.backward_by`: a copy only once it must."""
        return Kept(value) if not self.safe and self.how.keeps and Kept.can(value) else self.saved(value)

    def cannot(self, rule: object, why: str, fix: str | None = None) -> BadValue:
        """The error of a rule that can't serve this call."""
        return BadValue(
            f"{type(rule).__name__} can't serve {self.name!r}",
            got=f"{type(self.function).__name__ if self.module is not None else operation_name(self.function)}: {why}",
            fix=fix,
        )


def carried(rule: Any, call: Call) -> Any:
    """The output under a rule; what it computes is not seen by function modes again.

    A tensor that is alone in a dict or a tuple, as the one that depends on what is explained, is the output for a rule.

    Args:
        rule: the rule.
        call: what it has to work with.
    """
    tree = call.output
    leaves = [] if isinstance(tree, Tensor) else [value for value in tensors(tree) if depends(value)]
    if len(leaves) == 1:
        call.output = leaves[0]
    with contextlib.nullcontext() if is_compiling() else torch._C.DisableTorchFunction():
        output = rule.carry(call)
    return changed(tree, lambda value: output if value is leaves[0] else value) if len(leaves) == 1 else output


def check_convention(convention: object) -> None:
    """Raise for what is no convention.

    Raises:
        BadValue: the conventions that there are.

    Examples:
        >>> check_convention("relevance")
    """
    if convention not in CONVENTIONS:
        raise BadValue(
            "no such convention", got=repr(convention), needed=nearest(convention, CONVENTIONS), fix='"gradient"'
        )


def refuse_middle(call: Call, rule: object) -> None:
    """Raise for a terminal rule above other rules, in the gradient convention.

    Args:
        call: the call that the rule is for.
        rule: a rule that ends the propagation.

    Raises:
        BadValue: where something that a rule has made is among what the call depends on.
    """
    if is_compiling():
        return
    nodes = [value.grad_fn for value in call.inputs if value.grad_fn is not None]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if by_formula(node) and not getattr(node.formula, "reads_only", False):  # type: ignore[attr-defined]
            raise BadValue(
                f"{type(rule).__name__} ends the propagation, but stands in the middle of the model",
                got=f"{rule!r} at {call.name!r}, above other rules, in the gradient convention",
                needed="such a rule at the layer that the explained input enters",
                fix='convention="relevance", or another rule there',
            )
        nodes += [below for below, _ in node.next_functions if below is not None]


def layer_of(module: nn.Module) -> nn.Module:
    """The module of tensors that one rule is for: what a TensorDictModule wraps, or the module itself.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> layer_of(TensorDictModule(layer, ["x"], ["y"])) is layer
        True

    Raises:
        BadType: for another stage of a pipeline, whose inputs and outputs are entries.
    """
    while isinstance(module, TensorDictModule) and not isinstance(module, TensorDictSequential):
        if not isinstance(module.module, nn.Module):
            break  # a function
        module = module.module
    if isinstance(module, TensorDictModuleBase):
        raise BadType(
            "one rule for a stage that works on entries",
            got=type(module).__name__,
            needed="a module of tensors",
            fix="Composite({path: rule}).on(module)",
        )
    return module


def refuse_hidden(module: nn.Module, ruled: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise where a rule would be silently ignored: inside what torch has compiled or scripted.

    Args:
        module: the model.
        ruled: paths and modules that have a rule.

    Raises:
        BadValue: for a compiled part. BadType: for a rule inside a scripted or traced one.
    """
    hidden: dict[nn.Module, str] = {}
    for inner in module.modules():
        if is_compiled(inner):
            raise BadValue(
                "a part of the model is compiled, and rules are not seen there",
                got=f"torch.compile({type(getattr(inner, '_orig_mod', inner)).__name__})",
                needed="the module that was compiled",
                fix="explain the model as it was before, then compile the explainer: Compiled(LRP(...))",
            )
        if isinstance(inner, torch.jit.ScriptModule) and inner not in hidden:
            hidden |= dict.fromkeys(list(inner.modules())[1:], inner.original_name)
    for path, inner in ruled if hidden else ():
        if inner in hidden:
            raise BadType(
                f"a rule at {path!r}, inside a module that torch.jit has compiled",
                got=f"a ScriptModule, {hidden[inner]}",
                needed="a module that Python calls",
                fix="the module that was scripted or traced; or one rule for all of it, such as EpsilonRule()",
            )


def refuse_scripted(module: nn.Module) -> None:
    """Raise for parts that torch.jit has compiled, where every function counts: those that they call are not seen.

    Args:
        module: the model.

    Raises:
        BadType: for a scripted or traced module.
    """
    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            raise BadType(
                "a part of the model is compiled by torch.jit, and the functions that it calls are not seen",
                got=f"a ScriptModule, {inner.original_name}, at {path!r}",
                needed="a module that Python calls",
                fix="the module that was scripted or traced",
            )
