"""One call under a rule: what the rule is given, and where it is refused."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue, nearest
from tdconcepts.hooks.flows import by_formula, depends, operation_name, tensors

__all__ = ["CONVENTIONS", "Call", "Convention", "check_convention", "refuse_middle"]

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

    def __init__(self, name: str, function: Any, args: Any, kwargs: Any, output: Any, how: Any) -> None:
        self.name, self.function, self.args, self.kwargs, self.output = name, function, args, kwargs, output
        self.how: Any = how.how if isinstance(how, Call) else how
        self.convention, self.ends, self.safe, self.report = how.convention, how.ends, how.safe, how.report
        self.before: tuple[Any, Call, Any] | None = None
        self.folded: tuple[Tensor, Tensor] | None = None
        self.found: Any = None
        self.written: Tensor | None = None
        self._inputs: list[Tensor] | None = None

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
            self._inputs = [value for value in tensors((self.args, self.kwargs)) if depends(value)]
        return self._inputs

    @property
    def carries_relevance(self) -> bool:
        """Whether relevance flows, not its ratio to the activation."""
        return self.convention == "relevance"

    def saved(self, value: Tensor) -> Tensor:
        """``value`` as a formula may keep it: a copy where an in-place operation may follow."""
        value = value.detach() if self.how.lean else value
        return value if self.safe else value.clone()

    def cannot(self, rule: object, why: str, fix: str | None = None) -> BadValue:
        """The error of a rule that can't serve this call."""
        return BadValue(
            f"{type(rule).__name__} can't serve {self.name!r}",
            got=f"{type(self.function).__name__ if self.module is not None else operation_name(self.function)}: {why}",
            fix=fix,
        )


def check_convention(convention: object) -> None:
    """Raise for what is no convention."""
    if convention not in CONVENTIONS:
        raise BadValue(
            "no such convention", got=repr(convention), needed=nearest(convention, CONVENTIONS), fix='"gradient"'
        )


def refuse_middle(call: Call, rule: object) -> None:
    """Raise for a terminal rule above other rules, in the gradient convention."""
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
