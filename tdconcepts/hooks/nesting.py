"""Rules of several contexts on one thread: of two that have a rule the later one counts; conventions do not mix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.contexts import active
from tdconcepts.hooks.functions import operation_of
from tdconcepts.hooks.plans import Run

__all__ = ["alone", "overruled", "refuse_mixture", "yields"]


def overruled(run: Run, module: nn.Module) -> bool:
    """Whether a context that was entered later than ``run`` has a rule for the same module, or for what is around it.

    Of a module that is more than one function, a later context has a rule where it has rules for functions at all.

    Args:
        run: the context that has a rule for the module.
        module: the module that is called.
    """
    for other in _later(run):
        if other.inside or any(hasattr(step.act, "rule") for step in other.plan.outputs.get(module, ())):
            return True
        covers = _covers(other)
        if covers and any(module is inner for inner in other.plan.root.modules()):
            name = operation_of(module)
            if not name or name in covers:
                return True
    return False


def yields(run: Run, name: str) -> bool:
    """Whether a context that was entered later than ``run`` has a rule for this operation, or for what is around it.

    Args:
        run: a context that sees the operation.
        name: of the operation, as :func:`~tdconcepts.hooks.flows.operation_name` gives it.
    """
    return any(other.inside or name in _covers(other) for other in _later(run))


@contextlib.contextmanager
def alone(run: Run) -> Iterator[None]:
    """Let the rules of all other contexts rest: the one that counts is at work."""
    others = [other for other in active() if other is not run]
    for other in others:
        other.inside += 1
    try:
        yield
    finally:
        for other in others:
            other.inside -= 1


def refuse_mixture(run: Run, convention: str, rule: Any, name: str) -> None:
    """Raise where another context on this thread carries the other convention through the same model.

    Args:
        run: the context that is at work.
        convention: what flows under it.
        rule: a rule of it that is about to be applied.
        name: the path or operation of that rule.

    Raises:
        BadValue: both rules, where they are and what flows.
    """
    runs = active()
    if len(runs) < 2:
        return
    for other in runs:
        theirs = None if other is run else _other_rule(other, convention, name)
        if theirs is None or not ((run.standing and other.standing) or _meet(run.plan.root, other.plan.root)):
            continue
        where, which, how = theirs
        raise BadValue(
            "two contexts mix two conventions",
            got=f"{rule!r} at {name!r} ({convention}) and {which!r} at {where!r} ({how})",
            needed="one convention for all: the gradient, or relevance",
            fix=f'.on(model, convention="{how}")',
        )


def _meet(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models share a module; of two parts of a model that stand side by side nobody knows."""
    return not set(one.modules()).isdisjoint(other.modules())


def _later(run: Run) -> list[Run]:
    runs = active()
    return [] if len(runs) < 2 else [other for other in runs if other.since > run.since]


def _covers(run: Run) -> set[str]:
    """The operations that a context has rules for, while its model runs."""
    acts = run.plan.around if run.active else ()
    return {name for act in acts for name in getattr(act, "covers", ())}


def _other_rule(run: Run, convention: str, name: str) -> tuple[str, Any, str] | None:
    """A rule of a context that carries another convention: where, which and what flows."""
    acts: list[Any] = [step.act for steps in run.plan.outputs.values() for step in steps if hasattr(step.act, "rule")]
    for act in acts:
        if act.how.convention != convention:
            return act.place.name, act.rule, act.how.convention
    acts = [act for act in run.plan.around if getattr(act, "covers", None)]
    for act in acts:
        if act.how.convention != convention:
            where = name if name in act.covers else next(iter(act.covers))
            return where, act.covers[where], act.how.convention
    return None
