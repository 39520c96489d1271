"""Changed backward passes, on modules and on functional calls: the engine of rules, without a formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.calls import (
    CONVENTIONS,
    Call,
    Convention,
    carried,
    check_convention,
    layer_of,
    refuse_hidden,
)
from tdconcepts.hooks.flows import changed, depends, tensors
from tdconcepts.hooks.hooked import Hooked
from tdconcepts.hooks.kept import Scale, spare
from tdconcepts.hooks.nesting import overruled, refuse_mixture
from tdconcepts.hooks.operating import How, Operate, joined, watched
from tdconcepts.hooks.plans import Bound, Run, Step
from tdconcepts.hooks.programs import Programs, _Adds
from tdconcepts.hooks.sites import Place, Site, places
from tdconcepts.hooks.stages import overwrites_nothing
from tdconcepts.hooks.wrapped import Wrapped

__all__ = ["Call", "Convention", "Rule", "Rules", "check_convention"]


class Rule:
    """A changed backward pass, as frozen data: subclasses are dataclasses with the numbers of a formula.

    ``forms``: the conventions it has a form in. ``scaled``: in the relevance convention the engine scales what flows
    into each input by that input, and the rule gives only the ratio. ``terminal``: its relevance is not proportional to
    the input, so in the gradient convention it ends the propagation. ``reads_before``: it asks which call came before.
    ``passes_on``: relevance passes from its output to its one input as it is, and ``takes_on``: it can start from the
    relevance of a value that such a rule has made of its output (:attr:`Call.written`); see :class:`Rules`, ``lean``.
    ``on_nodes``: for a function it does no more than change what flows into or out of its own backward pass, which
    :meth:`hang` does to a node of a graph.

    Examples:
        >>> from tdconcepts.hooks.flows import backward_by
        >>> class Double(Rule):
        ...     def carry(self, call):
        ...         return backward_by(lambda flow: (2 * flow,), call.output, call.inputs, keep=False)
        >>> x = torch.zeros(2, requires_grad=True)
        >>> with Double().on(nn.Tanh()) as m:
        ...     torch.autograd.grad(m(x).sum(), x)[0]
        tensor([2., 2.])
    """

    forms: ClassVar[tuple[Convention, ...]] = CONVENTIONS
    scaled: ClassVar[bool] = False
    terminal: ClassVar[bool] = False
    reads_before: ClassVar[bool] = False
    passes_on: ClassVar[bool] = False
    takes_on: ClassVar[bool] = False
    on_nodes: ClassVar[bool] = False

    def carry(self, call: Call) -> Any:
        """The output of ``call``, with the backward pass of this rule."""
        raise NotImplementedError

    def prepare(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What an operation is called with, in the place of what it was given."""
        return args, kwargs

    def hang(self, node: Any) -> Any:
        """Hang this rule on a node of a graph, and return the handle that takes it down."""
        raise NotImplementedError

    def is_plain(self, convention: Convention, name: str = "") -> bool:
        """Whether it is the ordinary backward pass, so that a layer needs no tap; ``name``: of an operation."""
        return False

    def on(self, module: nn.Module, convention: Convention | None = None) -> Any:
        """This rule on one module, as a context whose target is called as the module is.

        Args:
            module: any module, of any number of inputs.
            convention: what flows; default: the gradient, where the rule has that form.

        Raises:
            BadType: for what is no module of tensors. BadValue: a convention that the rule has no form in, and a
                compiled module.

        Examples:
            >>> from tdconcepts.lrp import EpsilonRule
            >>> linear, x = nn.Linear(3, 2, bias=False), torch.randn(1, 3, requires_grad=True)
            >>> with EpsilonRule(1e-9).on(linear, convention="relevance") as m:
            ...     relevance = torch.autograd.grad(m(x), x, torch.ones(1, 2))[0]
            >>> torch.allclose(relevance.sum(), torch.tensor(2.0), rtol=1e-3)
            True
        """
        return Rules(((".", self),), convention=convention or self.forms[0]).on(module)

    def __add__(self, other: Any) -> Programs:
        return Rules((("**", self),), convention=self.forms[0]) + other


@dataclasses.dataclass(frozen=True)
class Rules(_Adds):
    """A program of rules that are already chosen: paths with their rules, and operations with theirs.

    Args:
        modules: pairs of a path (``"."`` for the model) and a rule.
        operations: names of functions with their rules.
        convention: what flows.
        first: a choice of the rule for the first layer, in the order of execution: ``(kinds, rule)``.
        unknown: ``unknown(name)`` is told of an operation that has no rule, if not ``unknown.knows(name)``. If it has a
            ``report``, ``report(name, rule, side, flow, *value)`` is told what flows out of (``"in"``) and into
            (``"out"``) each rule: relevance, or its ratio to the value that is given then.
        ends: see :class:`Call`.
        lean: whether first derivatives are wanted only, and only of what steps of the plan read. Then nothing is kept
            for second ones; and in the gradient convention a layer and what passes relevance on to it (a batch norm,
            an activation) become one step: there is no quotient in between, and nothing flows at the layer's own
            output.

    Raises:
        BadKey: when bound, a path that matches nothing. BadValue: no such convention, rules of two conventions.
    """

    modules: tuple[tuple[str, Rule], ...]
    operations: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    convention: Convention = "gradient"
    first: tuple[Callable[[Any], bool], Rule] | None = None
    unknown: Any = None
    ends: str = "relevance"
    lean: bool = False
    in_keys: ClassVar[tuple[Any, ...]] = ()

    @property
    def sees_operations(self) -> bool:
        """Whether functional calls are looked at."""
        return bool(self.operations) or self.first is not None or self.unknown is not None

    @property
    def on_nodes(self) -> bool:
        """Whether they can be hung on the nodes of a graph: rules for functions only, that all can."""
        if self.modules or self.first is not None or self.report is not None:
            return False
        return bool(self.operations) and all(rule.on_nodes for rule in self.operations.values())

    @property
    def report(self) -> Callable[..., None] | None:
        """Who is told what flows, if anybody is."""
        found: Callable[..., None] | None = getattr(self.unknown, "report", None)
        return found

    def on(self, module: nn.Module) -> Any:
        """Bind: a TensorDictModule gives a TensorDictModule, any other module what is called as it is."""
        if isinstance(module, TensorDictModuleBase):
            return Hooked(module, self)
        if not isinstance(module, nn.Module):
            raise BadType("rules are installed on modules", got=type(module).__name__, needed="an nn.Module")
        return Wrapped(module, self)

    def bind(self, module: nn.Module) -> list[Bound]:
        """The steps of every rule, checked."""
        check_convention(self.convention)
        chosen: dict[nn.Module, tuple[Place, Rule]] = {}
        for path, rule in self.modules:
            found = [_whole(layer_of(module))] if path == "." else places(module, Site(path))
            for place in found:
                chosen[place.module] = (place, rule)
        refuse_hidden(module, ((place.name, layer) for layer, (place, _) in chosen.items()))
        self._check_forms([(place.name, rule) for place, rule in chosen.values()])
        how = How(self, overwrites_nothing(module))
        steps = []
        for place, rule in chosen.values():
            if rule.is_plain(self.convention) and not (self.report or self.first):
                if any(rule is other for other in self.operations.values()):
                    continue  # what the layer calls is plain too, so that it needs no tap
            leave = _Leave(place, rule, how, self.first)
            steps.append(
                Step(place._replace(side="input", name=f"{place.name}:in"), _Enter(leave), every=True, whole=True)
            )
            steps.append(Step(place._replace(side="output"), leave, every=True, whole=True))
        if self.sees_operations:
            whole = _whole(module)._replace(side="input")
            steps.append(Step(whole, Operate(self, how), every=True, whole=True))
        return [Bound(tuple(steps))]

    def around(self, module: nn.Module, steps: list[Step]) -> list[Step]:
        """Other steps with those of the rules: what is read of an input comes before its rule, of an output after."""
        ruled = [step for bound in self.bind(module) for step in bound.steps]
        first = [step for step in steps if step.place.side == "input"]
        return [*first, *ruled, *(step for step in steps if step.place.side == "output")]

    def _check_forms(self, chosen: list[tuple[str, Rule]]) -> None:
        named = [*chosen, *self.operations.items()]
        wrong = next((pair for pair in named if self.convention not in pair[1].forms), None)
        if wrong is None:
            return
        other = next((pair for pair in named if self.convention in pair[1].forms and len(pair[1].forms) == 1), None)
        other = other or next((pair for pair in named if self.convention in pair[1].forms), None)
        has = f" and {other[1]!r} at {other[0]!r} in the {self.convention} convention" if other else ""
        raise BadValue(
            "the rules mix two conventions",
            got=f"{wrong[1]!r} at {wrong[0]!r}, which has the {wrong[1].forms[0]} convention only,{has}",
            needed="one convention for all: the gradient, or relevance",
            fix=f'.on(model, convention="{wrong[1].forms[0]}"), or another rule at {wrong[0]!r}',
        )


class _Enter:
    """The step at a ruled module's input."""

    def __init__(self, leave: _Leave) -> None:
        self.leave = leave
        inplace = getattr(leave.place.module, "inplace", False) is True
        self.keeps, self.writes = inplace, not overwrites_nothing(leave.place.module)

    def __call__(self, tree: Any, run: Run, given: Any) -> Any:
        run.inside += 1
        if self.writes and self.leave.how.keeps:
            spare(tree)  # operations inside are not seen
        if run.inside > 1 or not torch.is_grad_enabled() or overruled(run, self.leave.place.module):
            return tree
        if not any(map(depends, tensors(tree))):
            return tree
        refuse_mixture(run, self.leave.how.convention, self.leave.rule, self.leave.place.name)
        rule = run.store[("rule", self.leave)] = self.leave.chosen(run)
        last = run.store.pop("last call", None)
        if last is not None and tree[0] and tree[0][0] is last[2]:
            run.store[("before", self.leave)] = last
        if self.keeps:
            run.store[("given", self.leave)] = changed(tree, torch.clone)
        tree = watched(tree, self.leave.how, self.leave.place.name, rule, "in")
        if rule.scaled and self.leave.how.convention == "relevance":
            tree = changed(tree, Scale(self.leave.how, seen=False))
        return tree


class _Leave:
    """The step at a ruled module's output."""

    def __init__(self, place: Place, rule: Rule, how: How, first: Any) -> None:
        self.place, self.rule, self.how = place, rule, how
        self.first = first[1] if first is not None and first[0](place.module) else None

    def chosen(self, run: Run) -> Rule:
        """The rule: another one for the first layer that is reached."""
        if self.first is not None and "first layer" not in run.store:
            run.store["first layer"] = self.place.name
            return self.first
        return self.rule

    def __call__(self, tree: Any, run: Run, given: Any) -> Any:
        try:  # while the rule works, modules that it calls are inside this one
            return tree if run.inside > 1 or not torch.is_grad_enabled() else self._carried(tree, run, given)
        finally:
            run.inside -= 1

    def _carried(self, tree: Any, run: Run, given: Any) -> Any:
        rule = run.store.pop(("rule", self), None)
        if rule is None:
            return tree
        args, kwargs = run.store.pop(("given", self), given)
        call = Call(self.place.name, self.place.module, args, kwargs, tree, self.how)
        call.before = run.store.pop(("before", self), None)
        rule, call = joined(rule, call)
        output = watched(carried(rule, call), self.how, self.place.name, rule, "out")
        run.store["last call"] = (rule, call, output) if self.how.remembers else None
        return output


def _whole(module: nn.Module) -> Place:
    return Place(Site("."), ".", module, "output", None, None, None, None)
