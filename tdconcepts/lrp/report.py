"""The conservation report: what flows into and out of each rule, what was folded, and what has no rule."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from tdconcepts.hooks.flows import under_vmap
from tdconcepts.hooks.rules import Rule
from tdconcepts.lrp.boundary import nonzero

__all__ = ["Conservation", "Line"]


@dataclasses.dataclass
class Line:
    """One module or operation: relevance that came and that went on, summed over the batch.

    Args:
        rule: the rule.
        r_out: what came, at its output.
        r_in: what went on, to its inputs.

    Examples:
        >>> Line(Rule(), 2.0, 1.5).kept
        0.75
    """

    rule: Rule
    r_out: float = 0.0
    r_in: float = 0.0

    @property
    def kept(self) -> float:
        """The part that went on; 1 where relevance is conserved."""
        return self.r_in / self.r_out if self.r_out else float("nan")


class Conservation:
    """What each rule of a propagation did with its relevance; it prints as a table, in the order of execution.

    The difference is what biases and stabilisers absorbed, or what a rule adds or drops by definition. ``lines`` has
    one :class:`Line` for each module, by its path, and for each call of an operation: ``"add"``, ``"add#1"``, ...
    ``start`` is the relevance that the propagation began with, ``end`` what arrived at the explained entries.
    ``folded`` are pairs of paths, a batch norm and the layer that it counts as part of; their line is the layer's.
    ``unruled`` names parametrised modules and operations that the composite has no rule for.

    Examples:
        >>> import torch
        >>> from tdconcepts.lrp import EpsilonRule
        >>> report = Conservation()
        >>> report("head", EpsilonRule(), "out", torch.tensor([2.0]))
        >>> report("head", EpsilonRule(), "in", torch.tensor([1.5, 0.5]))
        >>> report.lines["head"].kept
        1.0
        >>> print(report)
        where  rule           R out   R in  kept
        head   EpsilonRule        2      2     1
    """

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.folded: dict[str, str] = {}
        self.unruled: set[str] = set()
        self.start: float | None = None
        self.end: float | None = None

    def __call__(self, name: str, rule: Rule, side: str, flow: Tensor, value: Tensor | None = None) -> None:
        """Note a flow: relevance, or its ratio to ``value``."""
        if value is not None:
            flow = flow * (nonzero(value) if rule.terminal and side == "in" else value)
        line = self.lines.setdefault(self.folded.get(name, name), Line(rule))
        if name not in self.folded:
            line.rule = rule
        total = float(under_vmap(flow).detach().sum())
        if side == "in":
            line.r_in += total
        else:
            line.r_out += total

    def began(self, start: float, end: float | None) -> None:
        """Note what a propagation began with, and what arrived at the explained entries."""
        self.start = (self.start or 0.0) + start
        self.end = self.end if end is None else (self.end or 0.0) + end

    def fold(self, norm: str, layer: str) -> None:
        """Note that a batch norm counts as part of a layer."""
        self.folded[norm] = layer

    def clear(self) -> None:
        """Forget the propagation before."""
        self.lines.clear()
        self.folded.clear()
        self.start = self.end = None

    def __repr__(self) -> str:
        rows = [(name, type(line.rule).__name__, line) for name, line in reversed(self.lines.items())]
        for norm, layer in self.folded.items():
            rows = [(f"{layer} + {norm}" if name == layer else name, rule, line) for name, rule, line in rows]
        if self.start is not None and self.end is not None:
            rows.append(("all", "", Line(Rule(), self.start, self.end)))
        width = max([5, *(len(name) for name, _, _ in rows)])
        rules = max([11, *(len(rule) for _, rule, _ in rows)])
        text = [f"{'where':{width}}  {'rule':{rules}}   {'R out':>6} {'R in':>6} {'kept':>5}"]
        text += [
            f"{name:{width}}  {rule:{rules}}   {line.r_out:6.4g} {line.r_in:6.4g} {line.kept:5.3g}"
            for name, rule, line in rows
        ]
        return "\n".join(text + ([f"without a rule: {', '.join(sorted(self.unruled))}"] if self.unruled else []))
