"""A module under a program: the TensorDictModule that a context gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.calling import dispatch_rows, explained
from tdconcepts.hooks.contexts import enter, leave, run_under
from tdconcepts.hooks.plans import Bound, Plan, Run, Stop, stopping
from tdconcepts.hooks.pullback import Pullback
from tdconcepts.hooks.stages import check_module
from tdconcepts.keys import GRADIENT, NestedKey, check_writable
from tdconcepts.tunables import Replaceable

__all__ = ["Hooked", "Program", "check_td"]


class Program(Protocol):
    """A frozen description of what to do in a model: data, without a model in it."""

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """Resolve every path and key in ``module``, or raise before anything is installed."""


class _Finishes:
    def __init__(self, each: tuple[Callable[[Run, TensorDictBase], None], ...]) -> None:
        self.each = each

    def __call__(self, run: Run, td: TensorDictBase) -> None:
        for finish in self.each:
            finish(run, td)


class Hooked(Replaceable, TensorDictModuleBase):
    """``module`` under a program: a context manager, and a TensorDictModule.

    | reads | writes |
    |---|---|
    | the module's ``in_keys``, the entries that edits and targets name | the module's ``out_keys``, the captures |

    Inside ``with``, direct calls of the original module on this thread obey the program's *edits* too; captures are
    written by calls of this module only. Outside ``with`` a call enters for its own time. Contexts nest, and end in any
    order. The original is bit-identical afterwards. ``replace(module=...)`` or ``replace(program=...)`` makes another,
    to be entered in its place: inside it, the edits of both would act.

    Args:
        module: a TensorDictModule; it is used, not copied.
        program: what to do in it.

    Raises:
        BadType: for a bare ``nn.Module``. BadKey: for a path or an entry that does not exist.
        BadValue: at the call, for a site that never ran, a replacement of another shape, or a locked TensorDict.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Capture
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), ["x"], ["y"])
        >>> with Hooked(net, Capture("0")) as m:
        ...     td = m(TensorDict(x=torch.zeros(2, 4), batch_size=[2]))
        >>> td["activation", "0"].shape
        torch.Size([2, 3])
    """

    def __init__(self, module: TensorDictModuleBase, program: Program) -> None:
        super().__init__()
        self.module = check_module(module)
        self.program = program
        self._bound = program.bind(module)
        stops = [bound.stop for bound in self._bound]
        if any(stops) and len(stops) > 1:
            raise BadValue("a program that stops early can't be added to another", fix="capture without stop=True")
        self._stops = any(stops)
        inner_in = [key for bound in self._bound for key in bound.in_keys if key not in module.in_keys]
        extra_out = [key for bound in self._bound for key in bound.out_keys]
        steps = tuple(step for bound in self._bound for step in bound.steps)
        through = tuple(name for bound in self._bound for name in bound.only_through)
        self._pull = self._pullback(
            Bound(steps, tuple(inner_in), finish=self._finishes(), stop=self._stops, only_through=through)
        )
        own = stopping(steps) if self._stops else steps
        self._plan = Plan(module, own, through) if self._pull is None else self._pull.plan
        self.in_keys = list(dict.fromkeys([*module.in_keys, *inner_in, *(self._pull.in_keys if self._pull else ())]))
        self.out_keys = [*([] if self._stops else module.out_keys), *extra_out]
        edits_entries = any(s.every and s.place.side == "input" and s.place.out_keys is not None for s in steps)
        self._apart = self._stops or edits_entries or any(bound.edit_inputs for bound in self._bound)
        check_writable(extra_out, self.in_keys)

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the module once under the program."""
        check_td(tensordict)
        work = tensordict.copy() if self._apart else tensordict
        for bound in self._bound:
            if bound.edit_inputs is not None:
                bound.edit_inputs(work)
        if self._pull is not None:
            return self._pulled(self._pull, work, tensordict)
        run, made = Run(self._plan, work, owner=self), work
        try:
            made = run_under(run, self.module, work)  # a module may give a new TensorDict
        except Stop:
            pass
        except Exception as error:
            reason = explained(error, self.in_keys, work)
            if reason is error:
                raise
            raise reason from error
        run.check_reached()
        for bound in self._bound:
            if bound.finish is not None:
                bound.finish(run, tensordict)
        if made is not tensordict and not self._stops:
            _copy_entries(made, tensordict, self.module.out_keys)
        return tensordict

    def _pulled(self, pull: Pullback, work: TensorDictBase, tensordict: TensorDictBase) -> TensorDictBase:
        pulled = pull(work, owner=self, create_graph=False)
        _copy_entries(
            pulled.outputs, tensordict, [k for k in self.out_keys if k[0] != GRADIENT or k in self.module.out_keys]
        )
        for name, gradient in zip(pull.names, pulled.gradients, strict=True):
            tensordict.set((GRADIENT, name), gradient)
        return tensordict

    def _pullback(self, program: Bound) -> Pullback | None:
        wanted = [bound.pull for bound in self._bound if bound.pull is not None]
        if len(wanted) > 1:
            raise BadValue("gradients of one target at a time", got=f"{[target for target, _ in wanted]}", needed="one")
        if not wanted:
            return None
        target, found = wanted[0]
        return Pullback(self.module, target, [place.what for place in found], whole=not self._stops, program=program)

    def _finishes(self) -> Callable[[Run, TensorDictBase], None]:
        return _Finishes(tuple(bound.finish for bound in self._bound if bound.finish is not None))

    def __enter__(self) -> Hooked:
        enter(Run(self._plan, owner=self, standing=True))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        run = leave(self)
        if kind is None:
            run.check_standing()


def check_td(td: Any) -> None:
    """Raise for what can't be written to: no TensorDict, or a locked one.

    Args:
        td: what a ``forward`` was given.

    Raises:
        BadType: no TensorDict. BadValue: a locked one.

    Examples:
        >>> from tensordict import TensorDict
        >>> check_td(TensorDict({}, batch_size=[]).lock_())
        Traceback (most recent call last):
        ...
        tdconcepts.errors.BadValue: the TensorDict is locked...
    """
    if type(td) is not TensorDict and not isinstance(td, TensorDictBase):
        raise BadType(
            "not a TensorDict",
            got=type(td).__name__,
            needed="a TensorDict with the entries of in_keys",
            fix="a TensorClass has no place for new entries: td.to_tensordict()",
        )
    if td.is_locked:
        raise BadValue(
            "the TensorDict is locked", needed="one that can be written to", fix="td.copy() shares its tensors"
        )


def _copy_entries(source: TensorDictBase, to: TensorDictBase, keys: Iterable[NestedKey]) -> None:
    for key in keys:
        value = source.get(key)
        if value is not None:
            to.set(key, value)
