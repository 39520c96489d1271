"""Plans and runs: what happens at which place, bound to one model, and one forward under it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.leaves import get_leaf, set_leaf
from tdconcepts.hooks.sites import Place, is_compiled
from tdconcepts.keys import NestedKey

__all__ = ["Bound", "Plan", "Run", "Step", "Stop", "stopping"]

_BEGUN = "the model was called"


class Stop(BaseException):
    """Ends a forward early; not an ``Exception``, so that the model's own handlers don't swallow it."""


class Step(NamedTuple):
    """What happens when a place is reached: ``act(value, run)`` returns the value to go on with.

    ``every``: called at each call of the module (an edit), else a second call raises (a reading), unless the place says
    which call it means. ``whole``: ``act(tree, run, given)`` changes everything that the module is given or writes, and
    ``given`` is what it was given; such a module need not run. An ``act`` with a method ``operate(run, function, args,
    kwargs)`` is called for every torch function that runs under the plan too, and one with a method ``swap(function,
    args, kwargs)`` says what each of them is given instead.
    """

    place: Place
    act: Callable[..., Any]
    every: bool = False
    whole: bool = False


class Bound(NamedTuple):
    """What a program comes to on one module.

    Args:
        steps: what happens at which place.
        in_keys, out_keys: what it reads and writes besides the module's own.
        edit_inputs: ``(td)``, changes entries that the module reads.
        finish: ``(run, td)``, writes results at the end.
        pull: a target and the places that it is pulled back to.
        stop: the forward ends after the last place, and the module's outputs are not written.
        only_through: names of what direct calls of the module can't obey.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Capture
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ["x"], ["y"])
        >>> (bound,) = Capture("0", stop=True).bind(net)
        >>> [step.place.name for step in bound.steps], bound.out_keys, bound.stop
        (['0'], (('activation', '0'),), True)
    """

    steps: tuple[Step, ...] = ()
    in_keys: tuple[NestedKey, ...] = ()
    out_keys: tuple[NestedKey, ...] = ()
    edit_inputs: Callable[[TensorDictBase], None] | None = None
    finish: Callable[[Run, TensorDictBase], None] | None = None
    pull: tuple[Any, tuple[Place, ...]] | None = None
    stop: bool = False
    only_through: tuple[str, ...] = ()


class Plan:
    """Steps bound to the modules of one model: resolved and checked once, entered many times.

    Args:
        root: the model.
        steps: what happens where, in this order.
        only_through: names of what a direct call of the model can't obey, so that it must raise.

    """

    def __init__(self, root: nn.Module, steps: Iterable[Step], only_through: tuple[str, ...] = ()) -> None:
        steps = tuple(steps)
        self.root, self.only_through = root, only_through
        self.around = tuple(step.act for step in steps if hasattr(step.act, "operate"))  # these need no tap
        self.swaps = tuple(step.act for step in steps if hasattr(step.act, "swap"))
        self.sees_functions = bool(self.around or self.swaps)
        self.steps = tuple(s for s in steps if not (hasattr(s.act, "operate") or hasattr(s.act, "swap")))
        self.outputs: dict[nn.Module, tuple[Step, ...]] = {}
        self.inputs: dict[nn.Module, tuple[Step, ...]] = {}
        for step in self.steps:
            table = self.outputs if step.place.side == "output" else self.inputs
            table[step.place.module] = (*table.get(step.place.module, ()), step)
        self.names = frozenset(step.place.name for step in self.steps)
        self._tree = tuple(root.modules())
        self._compiled = [module for module in self._tree if is_compiled(module)]  # and those that will be later
        self._own = (*[(module, "output") for module in self.outputs], *[(module, "input") for module in self.inputs])
        self._taps = (*self._own, *self._standing())

    def deaf(self) -> set[nn.Module]:
        """The modules inside a compiled one, where torch ignores hooks that come later."""
        compiled = [module for module in self._tree if module._compiled_call_impl is not None]
        compiled += self._compiled
        return {inner for module in compiled for inner in module.modules()} if compiled else set()

    def modules(self, standing: bool = True) -> tuple[tuple[nn.Module, str], ...]:
        """The sides of modules that need a tap: for a run of one call, or for one that stands until a context ends."""
        return self._taps if standing else self._own

    def _standing(self) -> Iterator[tuple[nn.Module, str]]:
        if self.steps or self.only_through or self.sees_functions:
            if self.root not in self.inputs:
                yield self.root, "input"  # where a standing run learns that the model is called anew,
            if self.root not in self.outputs:
                yield self.root, "output"  # and that the call has ended


def stopping(steps: Iterable[Step]) -> tuple[Step, ...]:
    """The same steps, and the forward ends when each of their places has been reached."""
    steps = tuple(steps)
    names = frozenset(step.place.name for step in steps)
    return (*steps, *(Step(step.place, _StopAfter(step.place.name, names)) for step in steps))


class _StopAfter:
    def __init__(self, name: str, names: frozenset[str]) -> None:
        self.name, self.names = name, names

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        done = run.store.setdefault("done", set())
        done.add(self.name)
        if done == self.names:
            raise Stop
        return value


class Run:
    """One forward of a model under a plan: what its steps have stored, and how often each place was reached.

    A *standing* run is what a context leaves on the thread for direct calls of the model; it starts anew at each of
    them. ``since``: of two runs on a thread, the later one has the greater number.
    """

    __slots__ = ("active", "calls", "inside", "owner", "plan", "reached", "since", "standing", "store", "td")

    def __init__(
        self, plan: Plan, td: TensorDictBase | None = None, owner: object = None, standing: bool = False
    ) -> None:
        self.plan, self.td, self.owner, self.standing = plan, td, owner, standing
        self.store: dict[Any, Any] = {}
        self.calls: dict[str, int] = {}
        self.reached: set[str] = set()
        self.active = not standing
        self.inside = 0  # modules with a rule that are running now
        self.since = 0

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start counting anew: the model is called once more."""
        if self.plan.only_through:
            raise _only_through(self.plan.only_through)
        first = args[0] if args else kwargs.get("tensordict")
        self.td = first if isinstance(first, TensorDictBase) else None
        self.active = True
        self.reached.add(_BEGUN)
        self.calls.clear()
        self.inside = 0
        self.store.pop("first layer", None)

    def end(self) -> None:
        """Forget the call that has ended."""
        self.td, self.active = None, False
        self.store.pop("last call", None)

    def anew(self, run: Run) -> Run:
        """What this standing run is for the time of ``run``, which may reach stages without calling the model."""
        if self.plan.only_through and run.plan.root is self.plan.root:
            raise _only_through(self.plan.only_through)
        other = Run(self.plan, run.td, self.owner, standing=True)
        other.reached, other.active, other.since = self.reached, True, self.since
        return other

    def fire(self, steps: tuple[Step, ...], tree: Any, given: Any = None) -> Any:
        """Take ``steps`` at the output, or the inputs, of a module that has just been reached."""
        group = steps[0].place.name
        count = self.calls.get(group, 0)
        self.calls[group] = count + 1
        if self.standing:
            self.reached.update((group, _BEGUN))
            flowing = _flowing(tree)
            if flowing is not None or not self.active:
                self.td = flowing
        for step in steps:
            place = step.place
            if step.whole:
                tree = step.act(tree, self, given)
                continue
            if self.standing and not step.every:
                continue  # what is read is read by calls of the context's own module
            if isinstance(place.call, int):
                if not self.active:
                    raise BadValue(
                        f"{place.name!r} counts calls, but the model itself is not called",
                        needed="a call of the module that the context gives back",
                    )
                if place.call >= 0 and place.call != count:
                    continue
            elif place.call is None and count and not step.every:
                raise BadValue(
                    f"the module at {place.name!r} runs several times in one forward",
                    needed="a site that says which call",
                    fix=f'Site({place.name!r}, call=0), call=-1 or call="all"',
                )
            self.store.pop("last call", None)  # its output is read, so it is no mere link of rules: see Rules
            value = tree if place.leaf is None and isinstance(tree, Tensor) else get_leaf(place, tree)
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
                    if step.whole:
                        continue
                    wanted = step.place.call if isinstance(step.place.call, int) else 0
                    if count <= wanted or count < -wanted:
                        raise _never_ran(step.place, count)

    def check_standing(self) -> None:
        """As :meth:`check_reached`, over all the direct calls of a standing run."""
        for table in (self.plan.outputs, self.plan.inputs):
            for steps in table.values():
                edits = any(step.every and not step.whole for step in steps)
                if edits and _BEGUN in self.reached and steps[0].place.name not in self.reached:
                    raise _never_ran(steps[0].place, 0)


def _never_ran(place: Place, count: int) -> BadValue:
    if count:
        return BadValue(
            f"the site {place.name!r} ran {count} times only", needed=f"call {place.call}", fix="a call that is there"
        )
    return BadValue(
        f"the site {place.name!r} never ran",
        needed="a module that this forward calls",
        fix="a module whose .forward() is called directly, a container that is only looped over and a branch that "
        "is not taken are never called: choose a module inside or around it",
    )


def _only_through(names: tuple[str, ...]) -> BadValue:
    return BadValue(
        f"an edit of what the model reads can't be obeyed by direct calls of the model: {list(names)}",
        needed="a call of the module that the context gives back",
        fix="with patch(model, ...) as m: m(td), env.rollout(n, m), or an explainer of m",
    )


def _flowing(tree: Any) -> TensorDictBase | None:
    """The TensorDict that a stage was called with, if there is one in its output or inputs."""
    first = tree[0][0] if isinstance(tree, tuple) and tree and isinstance(tree[0], tuple) and tree[0] else tree
    return first if isinstance(first, TensorDictBase) else None
