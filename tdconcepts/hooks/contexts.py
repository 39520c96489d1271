"""The only enter and exit: inert taps on modules, and the thread-local runs that say what a tap does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue, TdConceptsError
from tdconcepts.hooks.functions import Functions, push, withdraw
from tdconcepts.hooks.plans import Plan, Run
from tdconcepts.hooks.stages import is_watched

__all__ = ["enter", "hold", "install", "leave", "outside", "release", "remove", "run_under"]


_NUMBERS = itertools.count(-1, -1)  # torch numbers its own hooks from 0 up, so no hook has a tap's number


class _Tap:
    """The inert hook: it has no state but its holders' count, and does what this thread's plans say.

    Copies and pickles of the model carry it along; their modules are in no plan, so they behave unhooked.
    """

    __slots__ = ("holders", "number", "token")
    inert = True  # so that a container with nothing else on it counts as unwatched

    def __init__(self) -> None:
        self.holders = 1
        self.number = next(_NUMBERS)
        self.token = f"tap {self.number}"

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _OutputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, *given: Any) -> Any:
        if len(given) < 2:
            return None  # a TensorDictModuleWrapper copies hooks, without their kwargs; it is in no plan
        output = given[1]
        for run in _ACTIVE.runs if self.token else ():  # read, so that torch.compile guards which module's tap this is
            steps = run.plan.outputs.get(module)
            if steps is not None:
                output = run.fire(steps, output, (args, given[0]))
            if run.standing and module is run.plan.root:
                run.end()
        return output


class _InputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if kwargs is None:
            return None  # as above
        for run in _ACTIVE.runs if self.token else ():
            if run.standing and module is run.plan.root:
                run.begin(args, kwargs)
            steps = run.plan.inputs.get(module)
            if steps is not None:
                args, kwargs = run.fire(steps, (args, kwargs))
        return args, kwargs


class _Active(threading.local):
    """The runs of this thread, outer ones first."""

    def __init__(self) -> None:  # once for each thread; a class attribute would confuse the guards of torch.compile
        self.runs: tuple[Run, ...] = ()


_ACTIVE = _Active()
_LOCK = threading.Lock()


def install(plan: Plan, standing: bool = True) -> None:
    """Put a tap on every module of the plan that has none; each :func:`install` needs one :func:`remove`.

    Args:
        plan: what happens where.
        standing: whether direct calls of the model are to be noticed too.

    Raises:
        BadValue: for a compiled model without anchors.
    """
    deaf = plan.deaf()
    for module, side in plan.modules() if deaf else ():
        if module in deaf and _tap(_hooks(module, side)[0]) is None:
            names = [step.place.name for step in plan.steps if step.place.module is module] or ["."]
            raise BadValue(
                "the model was compiled before the hooks came, and torch would silently ignore them",
                got=f"a compiled model without an anchor at {names}",
                needed="an anchor from before compiling",
                fix=f"anchor(model, {names[0]!r}) first, then torch.compile(model); or hook the uncompiled model",
            )
    for module, side in plan.modules(standing):
        hold(module, side)


def remove(plan: Plan, standing: bool = True) -> None:
    """Take away the taps that nobody else holds."""
    for module, side in plan.modules(standing):
        release(module, side)


def installed(plan: Plan) -> bool:
    """Whether every module of the plan has its tap."""
    return all(_tap(_hooks(module, side)[0]) is not None for module, side in plan.modules())


def hold(module: nn.Module, side: str) -> None:
    """Hold a tap on one side of a module; the first holder puts it there."""
    hooks, with_kwargs = _hooks(module, side)
    with _LOCK:
        tap = _tap(hooks)
        if tap is not None:
            tap.holders += 1
            return
        # As register_forward_hook(tap, with_kwargs=True) does, whose handle costs more than all the rest.
        tap = _OutputTap() if side == "output" else _InputTap()
        hooks[tap.number] = tap
        with_kwargs[tap.number] = True


def release(module: nn.Module, side: str) -> None:
    """Let go of a tap; the last holder takes it away."""
    hooks, with_kwargs = _hooks(module, side)
    with _LOCK:
        tap = _tap(hooks)
        if tap is not None:
            tap.holders -= 1
            if not tap.holders:
                hooks.pop(tap.number, None)
                with_kwargs.pop(tap.number, None)


def run_under(run: Run, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with ``run`` acting on this thread, in the place of its owner's standing run if there is one.

    Without one the taps are there for the call only. Errors of this package come out as they are, not wrapped in what
    TensorDict's modules make of them.

    Raises:
        BadValue: where taps would have to be installed while ``torch.compile`` traces.
    """
    tracing = is_compiling()
    if tracing and not (run.plan.steps or run.plan.only_through or run.plan.sees_functions):
        return function(*args)
    before = _ACTIVE.runs
    owner = run.owner
    entered = owner is not None and any(other.owner is owner for other in before)
    lasting = entered or len(run.plan.steps) == 0
    if not lasting:
        if not tracing:
            install(run.plan, standing=False)
        elif not installed(run.plan):
            raise BadValue(
                "hooks can't be installed while torch.compile traces",
                got=f"no taps at {sorted(run.plan.names)}",
                needed="taps from before",
                fix="anchor(model, ...) first, or compile inside the context",
            )
    try:
        _ACTIVE.runs = _joined(before, run, entered) if before else (run,)
        if run.plan.sees_functions and not entered:
            with Functions(run.plan, _ACTIVE):
                return function(*args)
        return function(*args)
    except Exception as error:
        ours = None if isinstance(error, TdConceptsError) else _ours(error)
        if ours is None:
            raise
        raise ours from None
    finally:
        _ACTIVE.runs = before
        if not lasting and not tracing:
            remove(run.plan, standing=False)


def _joined(before: tuple[Run, ...], run: Run, entered: bool) -> tuple[Run, ...]:
    run.since = next((other.since for other in before if entered and other.owner is run.owner), _next(before))
    others = [
        run if entered and other.owner is run.owner else other.anew(run) if other.standing else other
        for other in before
    ]
    if entered:
        return tuple(others)
    standing = [other for other in others if other.standing]
    # before the runs of callers: what wraps a module sees what the module makes
    return (*standing, run, *[other for other in others if not other.standing])


def _next(before: tuple[Run, ...]) -> int:
    return 1 + max([other.since for other in before], default=0)


def enter(run: Run) -> None:
    """Let ``run`` stand on this thread until :func:`leave`: direct calls of the model obey its plan."""
    if any(other.owner is run.owner for other in _ACTIVE.runs):
        raise BadValue(
            "this context has been entered on this thread already",
            needed="one entry at a time",
            fix="make a second context: contexts of one model nest",
        )
    install(run.plan)
    run.since = _next(_ACTIVE.runs)
    _ACTIVE.runs = (*_ACTIVE.runs, run)
    if run.plan.sees_functions:
        push(Functions(run.plan, _ACTIVE))


def leave(owner: object) -> Run:
    """End the standing run of ``owner``, whatever was entered after it."""
    run = next((run for run in _ACTIVE.runs if run.owner is owner), None)
    if run is None:
        raise BadValue("this context is not entered on this thread", needed="an exit on the thread of the entry")
    _ACTIVE.runs = tuple([other for other in _ACTIVE.runs if other is not run])
    remove(run.plan)
    if run.plan.sees_functions:
        withdraw(run.plan)
    return run


def active() -> tuple[Run, ...]:
    """The runs of this thread, outer ones first."""
    return _ACTIVE.runs


def acted_on(modules: list[Any]) -> bool:
    """Whether calling one of ``modules`` does more than its forward: hooks of others, or steps of a run."""
    if not modules:
        return False
    for module in modules:
        if is_watched(module):
            return True
        for run in _ACTIVE.runs:
            if module in run.plan.outputs or module in run.plan.inputs:
                return True
    return False


def outside(run: Run, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with ``run`` suspended: a model that it calls is not hooked by this run a second time."""
    before = _ACTIVE.runs
    _ACTIVE.runs = tuple([other for other in before if other is not run])
    standing = [(other, other.td, other.active, dict(other.calls)) for other in before if other.standing]
    try:
        return function(*args)
    finally:
        _ACTIVE.runs = before
        for other, td, active, calls in standing:  # which a call of the model has begun and ended meanwhile
            other.td, other.active, other.calls = td, active, calls


def _tap(hooks: dict[int, Any]) -> _Tap | None:
    for hook in hooks.values() if hooks else ():
        if isinstance(hook, _Tap):
            return hook
    return None


def _hooks(module: nn.Module, side: str) -> tuple[dict[int, Any], dict[int, bool]]:
    """Torch's hooks on one side of a module by their numbers, and which of them take keyword arguments."""
    if side == "output":
        return module._forward_hooks, module._forward_hooks_with_kwargs
    return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def _ours(error: BaseException) -> TdConceptsError | None:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, TdConceptsError):
            return error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None
