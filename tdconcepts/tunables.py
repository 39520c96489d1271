"""What a method lets a search change: the name of a setting and the values worth trying."""

from __future__ import annotations

import dataclasses

from tdconcepts.errors import BadValue

__all__ = ["Tunable"]


@dataclasses.dataclass(frozen=True)
class Tunable:
    """One setting of a method that a search may change: a range with a step, or a list of choices.

    Args:
        name: the constructor's argument.
        low, high: the ends of the range, both included.
        step: the distance of neighbouring values; an int range has an int step.
        choices: the values, in place of a range.
        log: whether to search on a logarithmic scale.

    Raises:
        BadValue: for neither or both of a range and choices, or an empty range.

    Examples:
        >>> Tunable("n_iter", 10, 100, 10).values()[:3]
        [10, 20, 30]
        >>> Tunable("method", choices=("gausslegendre", "riemann_middle")).values()
        ['gausslegendre', 'riemann_middle']
    """

    name: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[object, ...] = ()
    log: bool = False

    def __post_init__(self) -> None:
        is_range = self.low is not None and self.high is not None
        if is_range == bool(self.choices) or (is_range and not self.low <= self.high):  # type: ignore[operator]
            raise BadValue("not a tunable", got=repr(self), needed="low <= high, or choices")

    def values(self) -> list[object]:
        """Every value of the grid.

        Raises:
            BadValue: for a range without a step.
        """
        if self.choices:
            return list(self.choices)
        if not self.step:
            raise BadValue(f"the tunable {self.name!r} has no grid", got="no step", needed="step=")
        count = round((self.high - self.low) / self.step)  # type: ignore[operator]
        whole = all(isinstance(v, int) for v in (self.low, self.high, self.step))
        return [v if whole else round(float(v), 12) for v in (self.low + i * self.step for i in range(count + 1))]  # type: ignore[operator]
