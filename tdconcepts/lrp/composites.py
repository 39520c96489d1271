"""Composites: which rule each module and each operation of a model gets."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.flows import operation_name
from tdconcepts.hooks.programs import Programs
from tdconcepts.hooks.rules import Convention, Rule, Rules, check_convention
from tdconcepts.hooks.sites import Site, module_paths, places
from tdconcepts.lrp.kinds import ELEMENTWISE, PLAIN, is_operation, operation_of
from tdconcepts.lrp.passing import IgnoreRule
from tdconcepts.tunables import Replaceable

__all__ = ["Composite", "Kind"]

Kind: TypeAlias = Any  # a type, a tuple of types, a path or glob, or a predicate of a module
OnMissing: TypeAlias = Literal["raise", "warn", "gradient"]


@dataclasses.dataclass(frozen=True, eq=False)
class Composite(Replaceable):
    """Rules by type, by path, by order and by operation; frozen data that prints as a table.

    A path beats a type; of several that match, the first counts. ``a | b`` is ``a`` with what ``b`` says on top.

    Args:
        rules: for each kind of module its rule. A kind is a type or a tuple of types, a path or glob
            (``"blocks.*.attn"``), or a predicate of a module. ``None`` for a rule says: none, also not by the entries
            below.
        operations: for each operation its rule: by name (``"gelu"``, ``"matmul"``) or by a function
            (``torch.matmul``), which stands for all its spellings.
        first: ``(kind, rule)``: another rule for the first layer of this kind, in the order of *execution*.
        convention: what flows by default.
        on_missing: what to do about a parametrised module or an operation without a rule: ``"raise"``, ``"warn"``, or
            take its ``"gradient"`` silently.
        plain: names of operations whose gradient is right: reshapes, sums, selections.

    Raises:
        BadKey: an operation that torch does not have; when bound, a path that matches nothing.
        BadValue: when bound, a parametrised module without a rule, rules of two conventions, or no match at all.

    Examples:
        >>> from tdconcepts.lrp import EpsilonRule, PassRule, ZPlusRule
        >>> base = Composite({nn.Linear: EpsilonRule(), nn.ReLU: PassRule()})
        >>> print(base | Composite({"0": ZPlusRule()}))
        kind    rule                                       convention
        '0'     ZPlusRule(epsilon=1e-06, zero_params=())   gradient
        Linear  EpsilonRule(epsilon=1e-06, zero_params=()) gradient
        ReLU    PassRule(epsilon=1e-06)                    gradient
    """

    rules: Any = dataclasses.field(default_factory=dict)
    operations: Mapping[Any, Rule] = dataclasses.field(default_factory=dict)
    first: tuple[Kind, Rule] | None = None
    convention: Convention = "gradient"
    on_missing: OnMissing = "raise"
    plain: frozenset[str] = PLAIN

    def __post_init__(self) -> None:
        check_convention(self.convention)
        if self.on_missing not in ("raise", "warn", "gradient"):
            raise BadValue(
                "no such choice", got=f"on_missing={self.on_missing!r}", needed='"raise", "warn", "gradient"'
            )
        pairs = self.rules.items() if isinstance(self.rules, Mapping) else self.rules
        pairs = tuple(pairs) if isinstance(pairs, Iterable) else (pairs,)
        if not all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in (*pairs, *([self.first] if self.first else []))
        ):
            raise BadType(
                "no rules for kinds of modules",
                got=repr(self.rules if self.first is None else (self.rules, self.first)),
                needed="{kind: rule}, or a Composite; first=(kind, rule)",
                fix="{nn.Linear: EpsilonRule()}",
            )
        object.__setattr__(self, "rules", pairs)
        for kind, rule in (*pairs, *self.operations.items(), *([self.first] if self.first else [])):
            if rule is not None and not isinstance(rule, Rule):
                raise BadType(f"no rule for {kind!r}", got=repr(rule), needed="a rule, such as EpsilonRule()")
        named = {k if isinstance(k, str) else operation_name(k): rule for k, rule in self.operations.items()}
        object.__setattr__(self, "operations", named)
        for name in named:
            if not is_operation(name):
                raise BadKey(
                    f"torch has no operation {name!r}", needed=nearest(name, ELEMENTWISE + tuple(sorted(PLAIN)))
                )

    def __or__(self, other: Composite | Mapping[Kind, Rule]) -> Composite:
        """This composite, with what ``other`` says on top; convention and ``on_missing`` stay."""
        other = other if isinstance(other, Composite) else Composite(other)
        return dataclasses.replace(
            self,
            rules=(*other.rules, *self.rules),
            operations={**self.operations, **other.operations},
            first=other.first or self.first,
            plain=self.plain | other.plain,
        )

    def __add__(self, other: Any) -> Programs:
        return Programs((self,)) + other if isinstance(other, Programs) else Programs((self, other))

    def on(self, module: nn.Module, convention: Convention | None = None, report: Any = None) -> Any:
        """Install the rules: a context, whose module is called as ``module`` is.

        Args:
            module: a TensorDictModule or any other; it is used, not copied.
            convention: ``"gradient"`` (relevance is the activation times what flows) or ``"relevance"``.
            report: a :class:`~tdconcepts.lrp.Conservation`, told what each rule did with its relevance.

        Examples:
            >>> import torch
            >>> from tdconcepts.lrp import EpsilonPlus
            >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
            >>> with EpsilonPlus().on(net, convention="gradient") as m:
            ...     relevance = x * torch.autograd.grad(m(x.requires_grad_())[:, 0].sum(), x)[0]
        """
        return self.rules_for(module, convention, report=report).on(module)

    def bind(self, module: TensorDictModuleBase) -> list[Any]:
        """The steps of the rules, for sums of programs."""
        return self.rules_for(module).bind(module)

    def rules_for(self, module: nn.Module, convention: Convention | None = None, **how: Any) -> Rules:
        """What the composite comes to on one model.

        Raises:
            BadKey: a path that matches nothing. BadValue: nothing matches, or a parametrised module has no rule.
        """
        if not isinstance(module, nn.Module):
            raise BadType("rules are installed on modules", got=type(module).__name__, needed="an nn.Module")
        chosen = self._choose(module)
        if not any(rule for _, _, rule in chosen) and not self.operations:
            raise BadValue(
                "the composite matches nothing in the model",
                got=f"{type(module).__name__} with {sorted({type(m).__name__ for _, m, _ in chosen})}",
                needed=f"a module of the kinds {[kind_text(kind) for kind, _ in self.rules]}",
                fix="Composite({nn.Linear: EpsilonRule()}), or a named one such as EpsilonPlus()",
            )
        report = how.pop("report", None)
        self._tell([path for path, m, rule in chosen if rule is None and _needs_a_rule(m)], module, report)
        first = None if self.first is None else (_predicate(self.first[0]), self.first[1])
        convention = convention or self.convention
        apart = report is not None or any(rule is not None and rule.reads_before for _, _, rule in chosen)
        taps = [
            (path, rule)
            for path, inner, rule in chosen
            if rule is not None and (apart or self.operations.get(operation_of(inner), None) is not rule)
        ]  # the others are seen when the module calls its one function, which has the same rule
        return Rules(
            tuple(taps),
            {name: rule for name, rule in self.operations.items() if convention == "relevance" or name not in SUMS},
            convention,
            first,
            None if self.on_missing == "gradient" and report is None else _Unknown(self, report),
            **how,
        )

    def table(self, module: nn.Module, convention: Convention | None = None) -> str:
        """Which module of a model gets which rule, as text."""
        rows = [(path, rule) for path, _, rule in self._choose(module) if rule is not None]
        return _table("path", [*rows, *self.operations.items()], convention or self.convention)

    def __repr__(self) -> str:
        rows = [(f"first {kind_text(self.first[0])}", self.first[1])] if self.first else []
        kinds = [(kind_text(kind), rule) for kind, rule in self.rules]
        return _table("kind", [*rows, *kinds, *self.operations.items()], self.convention)

    def _choose(self, module: nn.Module) -> list[tuple[str, nn.Module, Rule | None]]:
        """Every module, with its rule; below a module with a rule there are none."""
        paths = module_paths(module)
        by_path: dict[nn.Module, Any] = {}
        for kind, rule in self.rules:
            if isinstance(kind, str):
                for place in places(module, Site(kind), paths):
                    by_path.setdefault(place.module, rule)
        tests = [(_predicate(kind), rule) for kind, rule in self.rules if not isinstance(kind, str)]
        chosen: list[tuple[str, nn.Module, Rule | None]] = []
        seen: set[nn.Module] = set()
        for path, inner in paths.items():
            if inner in seen or isinstance(inner, TensorDictModuleBase):
                continue
            found = by_path[inner] if inner in by_path else next((rule for test, rule in tests if test(inner)), _UNSAID)
            rule = None if found is _UNSAID else IgnoreRule() if found is None else found
            seen.add(inner)
            if rule is not None:
                seen.update(inner.modules())
            elif isinstance(inner, torch.jit.ScriptModule):  # which Python does not look into
                seen.update(below for below in inner.modules() if below not in by_path)
            chosen.append((path, inner, rule))
        return chosen

    def _tell(self, paths: list[str], module: nn.Module, report: Any) -> None:
        if not paths or (self.on_missing == "gradient" and report is None):
            return
        known = module_paths(module)
        kinds = [f"{path} ({type(known[path]).__name__})" for path in paths]
        if report is not None:
            report.unruled.update(kinds)
        scripted = any(isinstance(known[path], torch.jit.ScriptModule) for path in paths)
        what = "modules that torch.jit has compiled" if scripted else "parametrised modules"
        types = [type(known[path]).__name__ for path in paths]
        kind = "torch.jit.ScriptModule" if scripted else repr(paths[0]) if types.count(types[0]) == 1 else types[0]
        self.missing(f"{what} without a rule: {', '.join(kinds)}", f"{{{kind}: EpsilonRule()}}")

    def missing(self, what: str, fix: str) -> None:
        """Raise or warn of something that has no rule, if that is wanted."""
        if self.on_missing == "gradient":
            return
        if self.on_missing == "raise":
            fix = f'composite | {fix}, IgnoreRule() where its gradient is right, or on_missing="gradient"'
            raise BadValue(f"the composite leaves {what}", needed="a rule for each", fix=fix)
        warnings.warn(f"the composite leaves {what}; their gradient is taken", stacklevel=3)


_UNSAID: Any = object()
_HOLDERS = (nn.Embedding, nn.EmbeddingBag, TensorDictParams, nn.ParameterList, nn.ParameterDict)
SUMS = frozenset(
    {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
    | {"add", "sub", "sum", "mean", "cumsum", "trace", "diff", "neg", "abs", "lerp", "fold", "interpolate", "upsample"}
    | {"index_add", "scatter_add"}
)  # what scales and adds values: the gradient is right as it is, what relevance flows needs shares


class _Unknown:
    """What becomes of an operation that the composite has no rule for."""

    def __init__(self, composite: Composite, report: Any = None) -> None:
        self.composite, self.report = composite, report

    def knows(self, name: str) -> bool:
        """Whether its gradient is right."""
        return name in self.composite.plain or name in self.composite.operations or name.startswith("_")

    def __call__(self, name: str) -> None:
        if self.report is not None:
            self.report.unruled.add(name)
        self.composite.missing(
            f"the operation {name!r} without a rule", f"Composite(operations={{{name!r}: EpsilonRule()}})"
        )


def kind_text(kind: Kind) -> str:
    """How a table names a kind."""
    if isinstance(kind, tuple):
        return ", ".join(map(kind_text, kind))
    return kind.__name__ if hasattr(kind, "__name__") else repr(kind)


def _predicate(kind: Kind) -> Callable[[Any], bool]:
    if isinstance(kind, (type, tuple)):
        return functools.partial(_is_a, kind)
    if not callable(kind):
        raise BadKey("not a kind of module", got=repr(kind), needed="a type, a path, or a predicate of a module")
    return kind


def _is_a(kind: Any, module: Any) -> bool:
    return isinstance(module, kind)


def _needs_a_rule(module: nn.Module) -> bool:
    """A layer with parameters through which gradients flow: those of a container, or held apart, serve operations.

    Or what torch.jit has compiled, whose operations nobody sees.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    has = next(module.parameters(recurse=False), None) is not None or "parametrizations" in module._modules
    leaf = all(name == "parametrizations" for name in module._modules)
    return has and leaf and not isinstance(module, _HOLDERS)


def _table(name: str, rows: Iterable[tuple[str, Rule | None]], convention: str) -> str:
    lines = [(name, "rule", "convention")]
    for what, rule in rows:
        forms = () if rule is None else rule.forms
        lines.append((what, repr(rule), convention if rule is None or convention in forms else forms[0]))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}} {c}".rstrip() for a, b, c in lines)
