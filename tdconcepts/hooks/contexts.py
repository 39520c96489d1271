"""The only enter and exit: inert taps on modules, and the thread-local plans that say what a tap does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue, TdConceptsError
from tdconcepts.hooks.leaves import get_leaf, set_leaf
from tdconcepts.hooks.sites import Place, is_compiled
from tdconcepts.keys import NestedKey

__all__ = ["Bound", "Plan", "Run", "Step", "Stop", "enter", "leave", "outside", "run_under"]


class Stop(BaseException):
    """Ends a forward early; not an ``Exception``, so that the model's own handlers don't swallow it."""


class Step(NamedTuple):
    """What happens when a place is reached: ``act(value, run)`` returns the value to go on with.

    ``every``: called at each call of the module (an edit), else a second call raises (a reading), unless the place says
    which call it means.
    """

    place: Place
    act: Callable[[Tensor, Run], Tensor]
    every: bool = False


class Bound(NamedTuple):
    """What a program comes to on one module.

    ``steps``: what happens at which place; ``in_keys`` / ``out_keys``: what it reads and writes besides the module's own;
    ``edit_inputs(td)``: changes entries that the module reads; ``finish(run, td)``: writes results at the end; ``pull``: a
    target and the places that it is pulled back to; ``stop``: the forward ends after the last place, and the module's
    outputs are not written.
    """

    steps: tuple[Step, ...] = ()
    in_keys: tuple[NestedKey, ...] = ()
    out_keys: tuple[NestedKey, ...] = ()
    edit_inputs: Callable[[TensorDictBase], None] | None = None
    finish: Callable[[Run, TensorDictBase], None] | None = None
    pull: tuple[Any, tuple[Place, ...]] | None = None
    stop: bool = False


class Plan:
    """Steps bound to the modules of one model: resolved and checked once, entered many times.

    Raises:
        BadValue: at :meth:`install`, for a compiled model without anchors.
    """

    def __init__(self, root: nn.Module, steps: Iterable[Step]) -> None:
        self.root, self.steps = root, tuple(steps)
        self.outputs: dict[nn.Module, tuple[Step, ...]] = {}
        self.inputs: dict[nn.Module, tuple[Step, ...]] = {}
        for step in self.steps:
            table = self.outputs if step.place.side == "output" else self.inputs
            table[step.place.module] = (*table.get(step.place.module, ()), step)
        self.names = frozenset(step.place.name for step in self.steps)
        compiled = [module for module in root.modules() if is_compiled(module)]
        self._deaf = {inner for module in compiled for inner in module.modules()}

    def install(self) -> None:
        """Put a tap on every module of the plan that has none; each :meth:`install` needs one :meth:`remove`."""
        for module, side in self._modules():
            if module in self._deaf and _tap(module, side) is None:
                names = [step.place.name for step in self.steps if step.place.module is module]
                raise BadValue(
                    "the model was compiled before the hooks came, and torch would silently ignore them",
                    got=f"a compiled model without an anchor at {names}",
                    needed="an anchor from before compiling",
                    fix=f"anchor(model, {names[0]!r}) first, then torch.compile(model); or hook the uncompiled model",
                )
        for module, side in self._modules():
            hold(module, side)

    def remove(self) -> None:
        """Take away the taps that nobody else holds."""
        for module, side in self._modules():
            release(module, side)

    def installed(self) -> bool:
        """Whether every module of the plan has its tap."""
        return all(_tap(module, side) is not None for module, side in self._modules())

    def _modules(self) -> Iterator[tuple[nn.Module, str]]:
        yield from ((module, "output") for module in self.outputs)
        yield from ((module, "input") for module in self.inputs if module is not self.root)
        if self.steps:
            yield self.root, "input"  # where a standing run learns that the model is called anew


class Run:
    """One forward of a model under a plan: what its steps have stored, and how often each place was reached.

    A *standing* run is what a context leaves on the thread for direct calls of the model; it starts anew at each of them.
    """

    __slots__ = ("begun", "calls", "owner", "plan", "reached", "standing", "store", "td")

    def __init__(self, plan: Plan, td: TensorDictBase | None = None, owner: object = None, standing: bool = False) -> None:
        self.plan, self.td, self.owner, self.standing = plan, td, owner, standing
        self.store: dict[Any, Any] = {}
        self.calls: dict[str, int] = {}
        self.reached: set[str] = set()
        self.begun = False

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start counting anew: the model is called once more."""
        first = args[0] if args else kwargs.get("tensordict")
        self.td = first if isinstance(first, TensorDictBase) else None
        self.begun = True
        self.store.clear()
        self.calls.clear()

    def fire(self, steps: tuple[Step, ...], tree: Any) -> Any:
        """Take ``steps`` at the output, or the inputs, of a module that has just been reached."""
        group = steps[0].place.name
        count = self.calls.get(group, 0)
        self.calls[group] = count + 1
        if self.standing:
            self.reached.add(group)
        for step in steps:
            place = step.place
            if isinstance(place.call, int):
                if place.call >= 0 and place.call != count:
                    continue
            elif place.call is None and count and not step.every:
                raise BadValue(
                    f"the module at {place.name!r} runs several times in one forward",
                    needed="a site that says which call",
                    fix=f'Site({place.name!r}, call=0), call=-1 or call="all"',
                )
            value = get_leaf(place, tree)
            changed = step.act(value, self)
            if changed is not value:
                tree = set_leaf(place, tree, changed)
        return tree

    def check_reached(self) -> None:
        """Raise for a place that was never reached in this run.

        Raises:
            BadValue: the path, and the number of calls where a later one was asked for.
        """
        for table in (self.plan.outputs, self.plan.inputs):
            for steps in table.values():
                count = self.calls.get(steps[0].place.name, 0)
                for step in steps:
                    wanted = step.place.call if isinstance(step.place.call, int) else 0
                    if count <= wanted or count < -wanted:
                        raise _never_ran(step.place, count)

    def check_standing(self) -> None:
        """As :meth:`check_reached`, over all the direct calls of a standing run."""
        for table in (self.plan.outputs, self.plan.inputs):
            for steps in table.values():
                if self.begun and steps[0].place.name not in self.reached:
                    raise _never_ran(steps[0].place, 0)


class _Tap:
    """The inert hook: it has no state but its holders' count, and does what this thread's plans say.

    Copies and pickles of the model carry it along; their modules are in no plan, so they behave unhooked.
    """

    __slots__ = ("handle", "holders")
    inert = True  # so that a container with nothing else on it counts as unwatched

    def __init__(self) -> None:
        self.handle: Any = None
        self.holders = 1

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: object) -> _Tap:
        return type(self)()


class _OutputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for run in _ACTIVE.runs:
            steps = run.plan.outputs.get(module)
            if steps is not None:
                output = run.fire(steps, output)
        return output


class _InputTap(_Tap):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        for run in _ACTIVE.runs:
            if run.standing and module is run.plan.root:
                run.begin(args, kwargs)
            steps = run.plan.inputs.get(module)
            if steps is not None:
                args, kwargs = run.fire(steps, (args, kwargs))
        return args, kwargs


class _Active(threading.local):
    runs: tuple[Run, ...] = ()


_ACTIVE = _Active()
_LOCK = threading.Lock()


def hold(module: nn.Module, side: str) -> None:
    """Hold a tap on one side of a module; the first holder registers it."""
    with _LOCK:
        tap = _tap(module, side)
        if tap is not None:
            tap.holders += 1
        elif side == "output":
            tap = _OutputTap()
            tap.handle = module.register_forward_hook(tap, with_kwargs=True)
        else:
            tap = _InputTap()
            tap.handle = module.register_forward_pre_hook(tap, with_kwargs=True)


def release(module: nn.Module, side: str) -> None:
    """Let go of a tap; the last holder removes it."""
    with _LOCK:
        tap = _tap(module, side)
        if tap is not None:
            tap.holders -= 1
            if not tap.holders and tap.handle is not None:
                tap.handle.remove()


def run_under(run: Run, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with ``run`` acting on this thread, in the place of its owner's standing run if there is one.

    Without one the taps are there for the call only. Errors of this package come out as they are, not wrapped in what
    TensorDict's modules make of them.

    Raises:
        BadValue: where taps would have to be installed while ``torch.compile`` traces.
    """
    before = _ACTIVE.runs
    owner = run.owner
    entered = [other for other in before if other.owner is owner] if owner is not None else []
    lasting = len(entered) > 0 or len(run.plan.steps) == 0
    if not lasting:
        if not is_compiling():
            run.plan.install()
        elif not run.plan.installed():
            raise BadValue(
                "hooks can't be installed while torch.compile traces",
                got=f"no taps at {sorted(run.plan.names)}",
                needed="taps from before",
                fix="anchor(model, ...) first, or compile inside the context",
            )
    try:
        _ACTIVE.runs = tuple([run if other.owner is owner else other for other in before]) if entered else (*before, run)
        return function(*args)
    except Exception as error:
        ours = None if isinstance(error, TdConceptsError) else _ours(error)
        if ours is None:
            raise
        raise ours from None
    finally:
        _ACTIVE.runs = before
        if not lasting and not is_compiling():
            run.plan.remove()


def enter(run: Run) -> None:
    """Let ``run`` stand on this thread until :func:`leave`: direct calls of the model obey its plan."""
    if any(other.owner is run.owner for other in _ACTIVE.runs):
        raise BadValue(
            "this context has been entered on this thread already",
            needed="one entry at a time",
            fix="make a second context: contexts of one model nest",
        )
    run.plan.install()
    _ACTIVE.runs = (*_ACTIVE.runs, run)


def leave(owner: object) -> Run:
    """End the standing run of ``owner``, whatever was entered after it."""
    run = next((run for run in _ACTIVE.runs if run.owner is owner), None)
    if run is None:
        raise BadValue("this context is not entered on this thread", needed="an exit on the thread of the entry")
    _ACTIVE.runs = tuple([other for other in _ACTIVE.runs if other is not run])
    run.plan.remove()
    return run


def outside(run: Run, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with ``run`` suspended: a model that it calls is not hooked by this run a second time."""
    before = _ACTIVE.runs
    _ACTIVE.runs = tuple([other for other in before if other is not run])
    try:
        return function(*args)
    finally:
        _ACTIVE.runs = before


def _never_ran(place: Place, count: int) -> BadValue:
    if count:
        return BadValue(
            f"the site {place.name!r} ran {count} times only", needed=f"call {place.call}", fix="a call that is there"
        )
    return BadValue(
        f"the site {place.name!r} never ran",
        needed="a module that this forward calls",
        fix="a module whose .forward() is called directly, a container that is only looped over and a branch that is not "
        "taken are never called: choose a module inside or around it",
    )


def _tap(module: nn.Module, side: str) -> _Tap | None:
    hooks = module._forward_hooks if side == "output" else module._forward_pre_hooks
    for hook in hooks.values():
        if isinstance(hook, _Tap):
            return hook
    return None


def _ours(error: BaseException) -> TdConceptsError | None:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, TdConceptsError):
            return error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None
