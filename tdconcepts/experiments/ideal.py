"""How close a plan comes to what the arithmetic asks for, counted in floating-point operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.experiments.plans import Case, Steps
from tdconcepts.experiments.table import Table, Where
from tdconcepts.hooks.plans import Run, Step
from tdconcepts.hooks.sites import Place

__all__ = ["SweepPlan", "ideal", "operations"]


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """How a sweep runs on a batch; it prints as one line.

    Args:
        name: ``"resume"``, ``"grow"``, ``"vmap"``, ``"batch"`` or ``"sequential"``.
        experiments: how many.
        chunks: in how many pieces.
        ideal: the floating-point operations that would do, one forward and what follows the first change of each
            experiment, divided by those that were counted. 1.0 is perfect; above it where branches that no experiment
            reaches run once, or the batch as it is need not run to the end.
        why_not: for each plan that was tried before, why it won't do.

    Examples:
        >>> print(SweepPlan("vmap", 12, 1, 0.5, {"resume": "the model is no sequence"}))
        12 experiments by vmap: 50% of the ideal
          not resume: the model is no sequence
    """

    name: str
    experiments: int
    chunks: int
    ideal: float
    why_not: dict[str, str]

    def __str__(self) -> str:
        tried = "".join(f"\n  not {name}: {why}" for name, why in self.why_not.items())
        pieces = "" if self.chunks == 1 else f" in {self.chunks} chunks"
        return f"{self.experiments} experiments by {self.name}{pieces}: {self.ideal:.0%} of the ideal{tried}"


def operations(run: Callable[[], object]) -> int:
    """How many floating-point operations ``run`` takes."""
    with _flop_counter() as counter:
        run()
    return counter.get_total_flops()


def ideal(td: TensorDictBase, table: Table, places: Mapping[Where, Place | None], case: Case) -> float:
    """Operations of one forward, and of what follows the first change of each experiment."""
    seen: dict[Where, int] = {}
    with _flop_counter() as counter:
        steps = [
            Step(place, _Count(where, counter, seen), every=True)
            for where, place in places.items()
            if place is not None
        ]
        case.hooked(Steps(steps))(td.copy())
    first = [counter.get_total_flops()] * table.n
    for move in table.moves:
        for member in move.members.tolist():
            first[member] = min(first[member], seen.get(move.where, 0))
    return counter.get_total_flops() + sum(counter.get_total_flops() - done for done in first)


def _flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode  # here, because importing it makes loggers

    return FlopCounterMode(display=False)


class _Count:
    def __init__(self, where: Where, counter: Any, seen: dict[Where, int]) -> None:
        self.where, self.counter, self.seen = where, counter, seen

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        self.seen.setdefault(self.where, self.counter.get_total_flops())
        return value
