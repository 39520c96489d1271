"""Changed backward passes that compare a forward with that of a reference: the engine, without a formula."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue
from tdconcepts.hooks.calls import refuse_scripted
from tdconcepts.hooks.flows import backward_by, changed, is_inplace, operation_name, tensors, untransformed
from tdconcepts.hooks.jacobian import differentiable
from tdconcepts.hooks.kept import overwrites
from tdconcepts.hooks.opened import OPENED, open_up
from tdconcepts.hooks.plans import Run, Step
from tdconcepts.hooks.pullback import Pullback, Wrt
from tdconcepts.hooks.sites import Place, Site
from tdconcepts.hooks.stages import overwrites_nothing
from tdconcepts.hooks.watch import Pulled

__all__ = ["Comparison", "References", "moves"]

_TAPE: Any = "what the reference did"  # among the points of a run, where it travels from the caller to the operations


class Noted(NamedTuple):
    """What an operation was given and wrote."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One call of an operation at the input, and what it was given and wrote at the reference.

    Args:
        name: of the operation.
        function: what was called.
        args, kwargs, output: at the input, as they were given.
        base: at the reference.
        points: where derivatives of the result are wanted, the same values with the graph of the unchanged model, by
            the identity of the tensor; else None.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    base: Noted
    points: Mapping[int, Tensor] | None

    def given(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, by its position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def derivative(self, x: Tensor, where: tuple[Tensor, ...]) -> Tensor:
        """The derivative of an elementwise function of ``x`` at some indices, for which it is called once more."""
        if len(tensors((self.args, self.kwargs))) > 1 or self.name == "rrelu":  # each element with others, or by chance
            at, y, seed = x, self.output, torch.zeros_like(x).index_put_(where, x.new_ones(()))
        else:
            at = x.detach()[where].requires_grad_()
            args, kwargs = changed((self.args, self.kwargs), lambda _: at.clone())
            y = self.function(*args, **kwargs)
            seed = torch.ones_like(y)
        found = torch.autograd.grad(y, at, seed, allow_unused=True)[0] if y.requires_grad else None
        found = torch.zeros_like(at) if found is None else found
        return found[where] if at is x else found

    def constant(self, value: Tensor) -> Tensor:
        """A tensor that it was given or wrote, for use in a factor: with its true graph, if that is wanted, or none."""
        return value.detach() if self.points is None else self.points.get(id(value), value)


class _Overwrites(BaseException):
    """Something writes over what was to be kept without a copy; no ``Exception``, for a model's handlers to swallow."""


class _Tape:
    """What the operations of a forward were given and wrote, in order."""

    def __init__(self, keep_graph: bool) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.position = -1  # below 0: recording
        self.keep_graph = keep_graph

    def record(self, name: str, noted: Noted) -> None:
        """Note a call."""
        noted = noted if self.keep_graph else changed(noted, torch.detach)  # which shares the count of its versions
        self.calls.append((name, noted, [_version(t) for t in tensors(noted)]))

    def next(self, name: str, output: Any) -> Noted:
        """The next call that was noted, which is the same one."""
        if self.position >= len(self.calls):
            raise _other_way(name, "nothing more")
        found, noted, versions = self.calls[self.position]
        now, then = ([tuple(t.shape) for t in tensors(value)] for value in (output, noted.output))
        if found != name or now != then:
            raise _other_way(f"{name} {now}", f"{found} {then}")
        if versions != [_version(t) for t in tensors(noted)]:
            raise _Overwrites
        self.calls[self.position] = (found, None, None)  # free what it held
        self.position += 1
        return noted

    def done(self) -> None:
        """Raise where not all has been met."""
        if self.position < len(self.calls):
            raise _other_way("nothing more", self.calls[self.position][0])


class _Meeting:
    """The tape of the reference, and that of the unchanged model where derivatives of the result are wanted."""

    def __init__(self, reference: _Tape, point: _Tape | None) -> None:
        self.reference, self.point = reference, point
        reference.position = 0
        if point is not None:
            point.position = 0

    def compared(self, name: str, func: Any, noted: Noted) -> Comparison:
        """The call, next to what was noted."""
        base = self.reference.next(name, noted.output)
        points = None
        if self.point is not None:
            true = tensors(self.point.next(name, noted.output))
            points = {id(t): other for t, other in zip(tensors(noted), true, strict=True)}
        return Comparison(name, func, *noted, base, points)


@dataclasses.dataclass(frozen=True)
class References:
    """Formulas for operations that know what the operation did at a reference: a program of a pull-back.

    Two forwards, the reference's first: what each operation with a formula was given and wrote there is kept, and met
    again in the same order. So nothing has to be known of where a model keeps its batch, and a row gets what it gets
    alone. Composite operations are opened up.

    Args:
        formulas: for names of operations, what gives their output with another backward pass.
        judge: ``judge(name, args, kwargs)`` says, for an operation without a formula, why it can't be followed and
            which tensors must stay the same for that not to matter (None: what it writes); or it says None.
        refuse: ``refuse(name, reason)`` is told of such an operation where these change and the target depends on it.
    """

    formulas: Mapping[str, Callable[[Comparison], Any]]
    judge: Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[str, list[Tensor] | None] | None]
    refuse: Callable[[str, str], None]
    in_keys: ClassVar[tuple[Any, ...]] = ()

    def around(self, module: nn.Module, steps: list[Step]) -> list[Step]:
        """Other steps, and the one that sees every operation."""
        refuse_scripted(module)
        whole = Place(Site("."), ".", module, "input", None, None, None, None)
        return [*steps, Step(whole, _Compare(self, overwrites_nothing(module)), every=True, whole=True)]

    def compared(
        self,
        pullback: Pullback,
        td: TensorDictBase,
        starts: Mapping[Wrt, Tensor],
        **how: Any,
    ) -> Pulled:
        """Pull a target back through this program: a forward with ``starts`` in the place of what is explained, then
        one at the input.

        Args:
            pullback: made with ``rules=`` this program.
            td: as for the pull-back.
            starts: for each *wrt* its value at the reference.
            how: further arguments of the pull-back.
        """
        try:
            return self._compared(pullback, td, starts, **how)
        except _Overwrites:  # what is noted is copied from now on
            acts: Any = pullback.plan.around
            for act in acts:
                act.safe = False
            return self._compared(pullback, td, starts, **how)

    def _compared(self, pullback: Pullback, td: TensorDictBase, starts: Mapping[Wrt, Tensor], **how: Any) -> Pulled:
        deep, held = how.get("create_graph", False), how.get("held")
        reference, point = _Tape(deep), _Tape(True) if deep else None
        with torch.enable_grad() if is_compiling() else differentiable():
            points = {w: start.clone() for w, start in starts.items()}  # an in-place operation may follow
            pullback.evaluate(td, points | _with(reference), held, create_graph=True)
            if point is not None:
                pullback.evaluate(td, _with(point), held, create_graph=True)
            pulled = pullback(td, _with(_Meeting(reference, point)), **how)
        reference.done()
        return pulled


def _with(tape: Any) -> dict[Wrt, Tensor]:
    return {_TAPE: tape}


class _Compare:
    """What a function mode does with each call of a function."""

    def __init__(self, program: References, safe: bool) -> None:
        self.program, self.safe = program, safe

    def __call__(self, tree: Any, run: Run, given: Any) -> Any:
        return tree

    def operate(self, run: Run, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``: note it, or compare it with what was noted."""
        tape: _Tape | _Meeting | None = run.store.get("points", {}).get(_TAPE)
        if tape is None:
            return func(*args, **kwargs)
        safe = self.safe and not is_compiling()
        if safe and overwrites(func, kwargs):
            raise _Overwrites
        name = operation_name(func)
        formula = self.program.formulas.get(name)
        if formula is None:
            return self._without(tape, name, run, func, args, kwargs)
        given = tensors((args, kwargs))
        if not any([value.is_floating_point() for value in given]):  # noqa: C419 - faster
            return func(*args, **kwargs)
        target = args[0] if is_inplace(func) or kwargs.get("inplace") is True else None
        if target is not None:
            kwargs = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
            args = (target.clone(), *args[1:])
        elif not safe:
            args, kwargs = changed((args, kwargs), _copied)
        output = func(*((args[0].clone(), *args[1:]) if target is not None else args), **kwargs)
        noted = Noted(args, kwargs, output)
        if isinstance(tape, _Tape):
            aliased = not safe or target is not None
            tape.record(name, noted._replace(output=changed(output, torch.clone)) if aliased else noted)
        else:
            compared = tape.compared(name, func, noted)
            if any(map(moves, given)):
                output = carried(formula, compared)
        return output if target is None else target.copy_(output)

    def _without(self, tape: _Tape | _Meeting, name: str, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        if name in OPENED:
            return open_up(name, self, run, args, kwargs)
        found = self.program.judge(name, args, kwargs)
        output = func(*args, **kwargs)
        if found is None:
            return output
        reason, values = found
        values = [t.clone() for t in tensors(output if values is None else values) if t.is_floating_point()]
        if not values:
            return output
        if isinstance(tape, _Tape):
            tape.record(name, Noted((), {}, values))
        elif _changes(values, tape.compared(name, func, Noted((), {}, values)).base.output):
            refused = functools.partial(_refused, self.program.refuse, name, reason)
            with torch._C.DisableTorchFunction() if not is_compiling() else contextlib.nullcontext():
                return changed(output, lambda t: backward_by(refused, t, [t], keep=False) if moves(t) else t)
        return output


def _refused(refuse: Callable[[str, str], None], name: str, reason: str, flow: Tensor) -> tuple[Tensor]:
    """The flow as it is; whoever is told of the operation may raise, now that it is on the way to the target."""
    refuse(name, reason)
    return (flow,)


def moves(value: Any) -> bool:
    """Whether a value may be another one than at the reference: it has a graph, and is no parameter."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def _changes(values: list[Tensor], base: list[Tensor]) -> bool:
    if not any(map(moves, values)):
        return False
    seen = all(map(untransformed, values))
    return not seen or not all(torch.equal(a, b) for a, b in zip(values, base, strict=True))


def carried(formula: Callable[[Comparison], Any], compared: Comparison) -> Any:
    """The output by a formula, whose own operations are not looked at."""
    if is_compiling():
        return formula(compared)
    with torch._C.DisableTorchFunction():
        return formula(compared)


def _version(value: Tensor) -> int:
    return value._version if untransformed(value) and not value.is_inference() else -1


def _copied(value: Tensor) -> Tensor:
    return value if isinstance(value, nn.Parameter) or not value.is_floating_point() else value.clone()


def _other_way(now: str, then: str) -> BadValue:
    return BadValue(
        "the model takes another way at the baseline than at the input",
        got=f"{now} at the input, {then} at the baseline",
        needed="the same operations in the same order",
        fix="another baseline; or IntegratedGradients, which only needs gradients",
    )
