"""Rules on changed parameters, functionally; and rules that stay on a module until they are removed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch  # noqa: F401 - the examples use it
from torch import Tensor, nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.flows import backward_by, depends
from tdconcepts.hooks.rules import Call, Convention, Rule
from tdconcepts.lrp.boundary import nonzero
from tdconcepts.lrp.parameters import substituted

__all__ = ["ModifiedRule", "ParamModifier", "RemovableRuleHandle"]


@dataclasses.dataclass(frozen=True)
class ParamModifier:
    r"""Which parameters of a layer a rule sees changed, and how: :math:`p' = \mathrm{modify}(\mathrm{name}, p)`.

    Nothing is written to the module: the rule works on a copy of it that has the other parameters.

    Args:
        modify_fn: ``(name, parameter) -> tensor`` of the same shape; default: as it is.
        select_fn: ``(name, parameter) -> bool``; default: none. Names are those of ``named_parameters()``; of a
            functional call ``"weight"`` and ``"bias"``.

    Raises:
        BadType: for what is not callable. BadValue: at the call, for another shape.

    Examples:
        >>> from tdconcepts.lrp import EpsilonRule
        >>> positive = ParamModifier(lambda name, p: p.clamp(min=0), ParamModifier.select_all)
        >>> layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> with positive.of(EpsilonRule()).on(layer, convention="relevance") as m:
        ...     bool(torch.autograd.grad(m(x), x, torch.ones(1, 1))[0][0, 1] == 0)
        True
    """

    modify_fn: Callable[[str, Tensor], Tensor] | None = None
    select_fn: Callable[[str, Tensor], bool] | None = None

    def __post_init__(self) -> None:
        for name, given in (("modify_fn", self.modify_fn), ("select_fn", self.select_fn)):
            if given is not None and not callable(given):
                raise BadType(f"{name} is no function", got=repr(given), needed="(name, parameter) -> ...")

    @staticmethod
    def select_all(name: str, parameter: Tensor) -> bool:
        """A ``select_fn`` for every parameter."""
        return True

    @classmethod
    def from_modifiers(cls, modifiers: Iterable[ParamModifier]) -> ParamModifier:
        """One modifier that does what several do, one after the other."""
        parts = tuple(modifiers)
        return cls(functools.partial(_modified, parts), functools.partial(_selected, parts))

    def of(self, rule: Rule) -> ModifiedRule:
        """``rule``, for a layer with these parameters."""
        return ModifiedRule(rule, self)

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter as the rule sees it."""
        if self.modify_fn is None or self.select_fn is None or not self.select_fn(name, parameter):
            return parameter
        found = self.modify_fn(name, parameter)
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            raise BadValue(
                f"the modifier gave another shape for {name!r}",
                got=f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}",
                needed=f"shape {list(parameter.shape)}",
            )
        return found


def _selected(parts: tuple[ParamModifier, ...], name: str, parameter: Tensor) -> bool:
    return any(part.select_fn is not None and part.select_fn(name, parameter) for part in parts)


def _modified(parts: tuple[ParamModifier, ...], name: str, parameter: Tensor) -> Tensor:
    for part in parts:
        parameter = part(name, parameter)
    return parameter


@dataclasses.dataclass(frozen=True)
class ModifiedRule(Rule):
    r"""A rule for a layer as if it had other parameters: its :math:`R_{in}` for :math:`M'` in the place of :math:`M`.

    What the layer writes stays as it is. In both conventions, for modules and for linear layers and convolutions that
    are called as functions.

    Args:
        rule: any rule.
        modifier: a :class:`ParamModifier`, or any ``(name, parameter) -> tensor``.

    Raises:
        BadType: for what is no rule. BadValue: at the call, for a function without a weight.

    Source: Anders et al., *Software for dataset-wide XAI*, 2021 (parameter modification).

    Examples:
        >>> from tdconcepts.lrp import EpsilonRule
        >>> half = ModifiedRule(EpsilonRule(1e-9), lambda name, p: p / 2)
        >>> layer, x = nn.Linear(2, 1), torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> with half.on(layer, convention="relevance") as m, torch.no_grad():
        ...     torch.equal(m(x), layer(x))
        True
    """

    rule: Rule
    modifier: Callable[[str, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule) or not callable(self.modifier):
            raise BadType("no rule to modify", got=repr((self.rule, self.modifier)), needed="a rule and a modifier")
        for name in ("forms", "scaled", "terminal", "reads_before"):
            object.__setattr__(self, name, getattr(self.rule, name))

    def prepare(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """As the rule has it."""
        return self.rule.prepare(name, args, kwargs)

    def carry(self, call: Call) -> Any:
        """A module with parameters, or a function with a weight."""
        function, args, kwargs = substituted(call, self, self.modifier)
        module = isinstance(function, nn.Module)
        output = function.forward(*args, **kwargs) if module else function(*args, **kwargs)
        if not isinstance(output, Tensor) or not isinstance(call.output, Tensor):
            raise call.cannot(self, f"it writes a {type(output).__name__}", "a module that writes one tensor")
        other = Call(call.name, function, args, kwargs, output, call)
        other.before, other.folded = call.before, call.folded
        found = self.rule.carry(other)
        if call.carries_relevance or not depends(found):
            return backward_by(_same, call.output, [found], keep=False)
        return backward_by(_in_proportion, call.output, [found], call.kept(call.output), output.detach(), keep=False)


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _in_proportion(flow: Tensor, z: Tensor, other: Tensor) -> tuple[Tensor]:
    return (flow * (z / nonzero(other)),)


class RemovableRuleHandle:
    """A rule that stays on a module until :meth:`remove`: calls of the module on this thread obey it.

    The same as ``with rule.on(module)``, for where a ``with`` does not fit.

    Args:
        rule: any rule.
        module: any module.
        convention: what flows; default: the gradient, where the rule has that form.

    Examples:
        >>> from tdconcepts.lrp import PassRule
        >>> relu, x = nn.ReLU(), torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> handle = RemovableRuleHandle(PassRule(), relu, "relevance")
        >>> torch.autograd.grad(relu(x).sum(), x)[0]
        tensor([1., 1.])
        >>> handle.remove()
        >>> torch.autograd.grad(relu(x).sum(), x)[0]
        tensor([0., 1.])
    """

    def __init__(self, rule: Rule, module: nn.Module, convention: Convention | None = None) -> None:
        self._context: Any = rule.on(module, convention)
        self._context.__enter__()

    def remove(self) -> None:
        """Take the rule away; once is enough."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)

    def __enter__(self) -> RemovableRuleHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
