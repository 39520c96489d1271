"""Functions under rules: how the rules of one binding are carried out, and what becomes of each call of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from tdconcepts.hooks.calls import Call, carried, refuse_middle
from tdconcepts.hooks.contexts import active
from tdconcepts.hooks.flows import (
    backward_by,
    changed,
    depending,
    depends,
    is_inplace,
    operation_name,
    overwrite,
    tensors,
)
from tdconcepts.hooks.kept import Scale, overwrites, spare
from tdconcepts.hooks.nesting import alone, refuse_mixture, yields
from tdconcepts.hooks.plans import Run
from tdconcepts.hooks.signs import note_sign, tells_sign

__all__ = ["How", "Operate", "joined", "watched"]


class How:
    """How the rules of one binding are carried out."""

    __slots__ = ("convention", "ends", "joins", "keeps", "lean", "remembers", "report", "safe")

    def __init__(self, rules: Any, safe: bool) -> None:
        self.keeps = rules.lean and rules.sees_operations  # without a copy, as operations in place are seen
        self.convention, self.ends, self.report, self.safe = rules.convention, rules.ends, rules.report, safe
        self.lean, self.joins = rules.lean, rules.lean and rules.report is None and rules.convention == "gradient"
        chosen = [rule for _, rule in rules.modules] + list(rules.operations.values()) + list((rules.first or ())[1:])
        self.remembers = self.joins or any(rule.reads_before for rule in chosen)  # else others can have the memory


class Operate:
    """What a function mode does with each call of a function."""

    def __init__(self, rules: Any, how: How) -> None:
        self.covers, self.how, self.first, self.unknown = rules.operations, how, rules.first, rules.unknown
        acts = {n: r for n, r in rules.operations.items() if not r.is_plain(rules.convention) or rules.report}
        self.operations = acts if rules.first is None else rules.operations
        self._passing: dict[str, bool] = {}

    def __call__(self, tree: Any, run: Run, given: Any) -> Any:
        return tree

    def operate(self, run: Run, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` under the rule of its name, if there is one."""
        if self._passes(func) and not (kwargs and ("inplace" in kwargs or "out" in kwargs)):
            return self._passed(run, func(*args, **kwargs))
        name = operation_name(func)
        if overwrites(func, kwargs):
            spare(args[:1], kwargs.get("out"))
        runs = active()
        if len(runs) > 1:
            if yields(run, name):
                return func(*args, **kwargs)
            if name in self.covers:
                with alone(run):
                    return self._operated(run, name, func, args, kwargs)
        return note_sign(name, args, self._operated(run, name, func, args, kwargs))

    def _passes(self, func: Callable[..., Any]) -> bool:
        """Whether ``func`` is none of those that are looked at: with a rule, in place, or one that tells a sign."""
        if is_compiling():
            return False
        spelled = getattr(func, "__name__", "")
        found = self._passing.get(spelled)
        if found is None:
            name = operation_name(func)
            looks = name in self.covers or tells_sign(name) or overwrites(func, {}) or self.first is not None
            found = not looks and (self.unknown is None or self.unknown.knows(name))
            self._passing[spelled] = found
        return found

    def _passed(self, run: Run, output: Any) -> Any:
        if isinstance(output, Tensor):  # no question for a shape, but an operation
            run.store.pop("last call", None)
        return output

    def _operated(self, run: Run, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        rule = self.operations.get(name)
        if rule is None and (self.unknown is None or self.unknown.knows(name)):
            return self._passed(run, func(*args, **kwargs))
        given, named, inputs = args, kwargs, depending(args, kwargs)
        if not inputs:
            return func(*args, **kwargs)
        if rule is None:
            output = func(*args, **kwargs)
            if any(map(depends, tensors(output))):
                self.unknown(name)
            return output
        if len(active()) > 1:
            refuse_mixture(run, self.how.convention, rule, name)
        if self.first is not None and "first layer" not in run.store and self.first[0](name):
            run.store["first layer"] = name
            rule = self.first[1]
        inplace, first = is_inplace(func), args[0] if args else None
        target = first if inplace or kwargs.get("inplace") is True else None
        last = run.store.pop("last call", None)
        before = last if last is not None and first is last[2] else None
        if before is None or not joins(rule, before, self.how):
            plain = rule.is_plain(self.how.convention, name)
            if plain and target is None and self.how.report is None:
                return func(*args, **kwargs)
            if target is not None and not plain:
                args = (target.clone(), *args[1:])  # a rule may want what is written over
        if target is not None and "inplace" in kwargs:
            kwargs = {**kwargs, "inplace": False}
        shown = name if self.how.report is None else _numbered(name, run)
        if self.how.report is not None:
            args, kwargs = watched((args, kwargs), self.how, shown, rule, "in")
        if rule.scaled and self.how.convention == "relevance":
            args, kwargs = changed((args, kwargs), Scale(self.how, seen=True))
        args, kwargs = rule.prepare(name, args, kwargs)
        output = func(*((args[0].clone(), *args[1:]) if inplace else args), **kwargs)
        made = (output,) if isinstance(output, Tensor) else tensors(output)
        if not any([value.is_floating_point() for value in made]):  # noqa: C419 - faster
            return _written(output, target)
        same = not is_compiling() and args is given and kwargs is named
        call = Call(name, func, args, kwargs, output, self.how, inputs if same else None)
        call.before = before
        rule, call = joined(rule, call)
        output = watched(carried(rule, call), self.how, shown, rule, "out")
        output = _written(output, target)
        run.store["last call"] = (rule, call, output) if self.how.remembers else None
        return output


def _written(output: Any, target: Tensor | None) -> Any:
    """The output, written over ``target`` where the operation was one in place."""
    if target is None:
        return output
    spare(target)  # of which the rule may just have kept something
    return overwrite(target, output)


def joins(rule: Any, before: tuple[Any, Call, Any], how: How) -> bool:
    """Whether ``rule`` and that of the call before become one step."""
    return how.joins and rule.passes_on and before[0].takes_on


def joined(rule: Any, call: Call) -> tuple[Any, Call]:
    """The rule and the call to carry: those of the call before, if both become one step."""
    if call.before is not None and joins(rule, call.before, call.how):
        other, before, _ = call.before
        if isinstance(call.output, Tensor) and call.output.shape == before.output.shape:
            return other, before.passed_on(call.output)
    if rule.terminal and not call.carries_relevance:
        refuse_middle(call, rule)
    return rule, call


def watched(tree: Any, how: How, name: str, rule: Any, side: str) -> Any:
    """The same tree, whose flows are noted in the report, if there is one."""
    if how.report is None:
        return tree
    note, relevance = how.report, how.convention == "relevance"

    def watch(value: Tensor) -> Tensor:
        if not depends(value):
            return value

        def formula(flow: Tensor, *kept: Tensor) -> tuple[Tensor]:
            note(name, rule, side, flow, *kept)
            return (flow,)

        formula.reads_only = True  # type: ignore[attr-defined]
        return backward_by(formula, value, [value], *([] if relevance else [value.clone()]), keep=False)

    return changed(tree, watch)


def _numbered(name: str, run: Run) -> str:
    """The name of an operation in the report: ``"add"`` for its first call in a run, then ``"add#1"``, ``"add#2"``."""
    times = run.store["times", name] = run.store.get(("times", name), -1) + 1
    return f"{name}#{times}" if times else name
