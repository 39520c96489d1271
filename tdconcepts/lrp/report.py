"""The conservation report: what flows into and out of each rule."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from tdconcepts.hooks.rules import Rule

__all__ = ["Conservation", "Line"]


@dataclasses.dataclass
class Line:
    """One module or operation: relevance that came (``r_out``) and that went on (``r_in``), summed over the batch."""

    rule: Rule
    r_out: float = 0.0
    r_in: float = 0.0

    @property
    def kept(self) -> float:
        """The part that went on; 1 where relevance is conserved."""
        return self.r_in / self.r_out if self.r_out else float("nan")


class Conservation:
    """What each rule of a propagation did with its relevance; it prints as a table.

    The difference is what biases and stabilisers absorbed, or what a rule adds or drops by definition.

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
        self.unruled: set[str] = set()

    def __call__(self, name: str, rule: Rule, side: str, relevance: Tensor) -> None:
        line = self.lines.setdefault(name, Line(rule))
        total = float(relevance.detach().sum())
        if side == "in":
            line.r_in += total
        else:
            line.r_out += total

    def clear(self) -> None:
        """Forget the propagation before."""
        self.lines.clear()

    def __repr__(self) -> str:
        width = max([5, *(len(name) for name in self.lines)])
        rules = max([11, *(len(type(line.rule).__name__) for line in self.lines.values())])
        rows = [f"{'where':{width}}  {'rule':{rules}}   {'R out':>6} {'R in':>6} {'kept':>5}"]
        rows += [
            f"{name:{width}}  {type(line.rule).__name__:{rules}}   {line.r_out:6.4g} {line.r_in:6.4g} {line.kept:5.3g}"
            for name, line in reversed(self.lines.items())
        ]
        return "\n".join(rows + ([f"without a rule: {', '.join(sorted(self.unruled))}"] if self.unruled else []))
