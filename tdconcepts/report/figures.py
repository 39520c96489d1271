"""Figures as values: each function draws one and returns it; colours that a colour-blind reader can tell apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tdconcepts.errors import BadType, BadValue, import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Series", "interval_plot", "intervention_curve", "new_figure", "over_time", "to_png", "to_svg"]

Series: TypeAlias = Sequence[float] | Tensor

# Okabe and Ito's palette without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "tdconcepts",
}


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (7.0, 4.0), **kwargs: Any) -> Any:
    """An empty figure of this room's style and its axes ``[rows, columns]`` (always a 2-d array); never a window.

    Args:
        rows, columns: of axes.
        size: width and height in inches.
        kwargs: of ``Figure.subplots``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    with matplotlib.rc_context(STYLE):
        figure = import_extra("matplotlib.figure", "report").Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def intervention_curve(
    curves: Mapping[str, tuple[Series, Series] | tuple[Series, Series, Series, Series]],
    *,
    xlabel: str = "concepts corrected",
    ylabel: str = "task accuracy",
    title: str = "",
) -> Figure:
    """One line for each policy over the number of interventions, with its interval as a band where there is one.

    Args:
        curves: name -> ``(x, mean)`` or ``(x, mean, low, high)``.
        xlabel, ylabel, title: texts.

    Raises:
        BadValue: no curves, or one whose sequences differ in length. MissingExtra: matplotlib is not installed.

    Examples:
        >>> curves = {"random": ([0, 1, 2], [0.80, 0.85, 0.90]), "gradient": ([0, 1, 2], [0.80, 0.91, 0.97])}
        >>> figure = intervention_curve(curves, title="digits")  # figure.savefig("curve.png") keeps it
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['random', 'gradient']
    """
    _need_some(curves, "curves")
    figure, ((axes,),) = new_figure(size=(8.4, 4.4))
    for number, (name, curve) in enumerate(curves.items()):
        parts = [_values(part, f"the curve {name!r}") for part in curve]
        if len(parts) not in (2, 4) or len(set(map(len, parts))) > 1:
            needed = "(x, mean) or (x, mean, low, high), equally many points each"
            raise BadValue(f"the curve {name!r} is none", got=f"{[len(part) for part in parts]} points", needed=needed)
        x, mean, *band = parts
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, mean, color=colour, marker=MARKERS[number % 7], markersize=5, ls=DASHES[number % 7], label=name)
        if band:
            axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _whole_numbers(axes, [_values(curve[0], name) for name, curve in curves.items()])
    axes.legend(frameon=False)
    return figure


def over_time(
    rows: Sequence[str],
    columns: Mapping[str, Tensor | Mapping[str, Tensor]],
    *,
    groups: Mapping[str, Tensor] | None = None,
    xlabel: str = "step",
    title: str = "",
    start: int = 0,
) -> Figure:
    """A grid of time series, states beside what explains them: a row for each feature, a column for each quantity.

    Args:
        rows: the features' names, with their units after a comma; F of them.
        columns: title -> ``[T, F]``, or {series name -> ``[T, F]``}.
        groups: name -> ``[T]``, True where a step belongs to the group (an action, say). Steps are then drawn as marks,
            a colour and shape for each group, so that what changes sign with the action stays legible.
        xlabel, title: texts.
        start: the number of the first step.

    Raises:
        BadValue: nothing to draw, a series that isn't ``[T, F]``, a group that isn't ``[T]``. BadType: no numbers.
        MissingExtra: matplotlib is not installed.

    Examples:
        >>> time, action = torch.arange(50) / 5, torch.arange(50) % 2
        >>> state = torch.stack([time.sin(), time.cos()], -1)
        >>> columns = {"state": state, "attribution": state * torch.tensor([0.1, 2.0])}
        >>> groups = {"left": action == 0, "right": action == 1}
        >>> figure = over_time(["angle, rad", "velocity, rad/s"], columns, groups=groups)
        >>> [axes.get_title() for axes in figure.axes]  # row by row
        ['state', 'attribution', '', '']
    """
    _need_some(rows, "rows")
    _need_some(columns, "columns")
    size = (2.9 * len(columns) + 0.9, 1.55 * len(rows) + 1.2)
    figure, grid = new_figure(len(rows), len(columns), size=size, sharex=True)
    if title:
        figure.suptitle(title)
    for column, (heading, given) in enumerate(columns.items()):
        series = given if isinstance(given, Mapping) else {"": given}
        grid[0, column].set_title(heading)
        grid[-1, column].set_xlabel(xlabel)
        for number, (name, values) in enumerate(series.items()):
            value = numbers_in(values, name or heading)
            if value.ndim != 2 or value.shape[1] != len(rows):
                raise BadValue(f"{name or heading!r} does not fit", got=_shape(value), needed=f"[T, {len(rows)}]")
            for row, axes in enumerate(grid[:, column]):
                _draw_series(axes, value[:, row], number, name, groups, start)
        if any(series) and not groups:
            grid[-1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.42), frameon=False)
    if groups:
        handles, _ = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, list(groups), loc="outside lower center", ncols=4, frameon=False, markerscale=2.5)
    for row, name in enumerate(rows):
        grid[row, 0].set_ylabel(name.replace(", ", "\n"))
        for axes in grid[row]:
            axes.axhline(0.0, color="#888888", linewidth=0.8, zorder=0)
    figure.align_ylabels(list(grid[:, 0]))
    return figure


def interval_plot(
    means: Mapping[str, tuple[float, float, float]],
    points: Mapping[str, Series] | None = None,
    *,
    xlabel: str,
    title: str = "",
    reference: float | None = None,
) -> Figure:
    """Means as dots with their confidence intervals, one line of the plot for each; single values as faint marks.

    Args:
        means: name -> (mean, low, high); from top to bottom.
        points: name -> single values (one for each seed), drawn behind.
        xlabel, title: texts.
        reference: where a dashed line marks the baseline.

    Raises:
        BadValue: no means, or one that isn't three numbers. MissingExtra: matplotlib is not installed.

    Examples:
        >>> means = {"unpatched": (500.0, 500.0, 500.0), "without angle": (389.5, 370.0, 409.0)}
        >>> figure = interval_plot(means, {"without angle": [371.0, 408.0]}, xlabel="return", reference=500.0)
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['unpatched', 'without angle']
    """
    _need_some(means, "means")
    figure, ((axes,),) = new_figure(size=(8.4, 0.38 * len(means) + 1.3))
    if reference is not None:
        axes.axvline(reference, color="#555555", linewidth=1.0, linestyle="--", zorder=0)
    for number, (name, interval) in enumerate(means.items()):
        given = _values(interval, f"the interval {name!r}")
        if len(given) != 3:
            raise BadValue(f"the interval {name!r} is none", got=f"{given}", needed="(mean, low, high)")
        (mean, low, high), single = given, _values((points or {}).get(name, ()), f"the points of {name!r}")
        if single:
            spread = (torch.arange(len(single)) * 0.618034) % 1.0 * 0.44 - 0.22  # a fixed scatter, not a random one
            axes.scatter(single, number + spread.numpy(), s=9, color="#999999", alpha=0.5, linewidth=0, zorder=1)
        bar = {
            "xerr": [[mean - low], [high - mean]],
            "ecolor": COLOURS[0],
            "elinewidth": 2.2,
            "capsize": 6,
            "capthick": 2.2,
        }
        axes.errorbar([mean], [number], **bar, marker="o", markersize=6.5, color=COLOURS[1], zorder=3)
    axes.set_yticks(range(len(means)), list(means))
    axes.set_ylim(len(means) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=xlabel, title=title)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as the text of an SVG file, the same for the same figure (no date inside)."""
    matplotlib, buffer = import_extra("matplotlib", "report"), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure, dpi: float = 110.0) -> bytes:
    """The figure as a PNG file; ``dpi`` in dots per inch."""
    matplotlib, buffer = import_extra("matplotlib", "report"), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def numbers_in(value: object, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """What is to be drawn as a tensor on the CPU, without its graph.

    Raises:
        BadType: it holds no numbers.
    """
    try:
        return torch.as_tensor(value, dtype=dtype).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(f"{what} holds no numbers", got=type(value).__name__, needed="a tensor, or numbers") from error


def _values(part: Series, what: str) -> list[float]:
    return numbers_in(part, what, torch.float64).reshape(-1).tolist()


def _draw_series(
    axes: Axes, value: Tensor, number: int, name: str, groups: Mapping[str, Tensor] | None, start: int
) -> None:
    steps = start + torch.arange(len(value))
    if groups is None:
        axes.plot(steps, value, color=COLOURS[number % 7], ls=DASHES[number % 7], lw=1.3, label=name or None)
        return
    for place, (group, members) in enumerate(groups.items()):
        member = numbers_in(members, f"the group {group!r}")
        if member.shape != value.shape:
            raise BadValue(f"the group {group!r} does not fit", got=_shape(member), needed=f"[{len(value)}]")
        member = member.bool()
        colour, marker, label = COLOURS[place % 7], MARKERS[place % 7], f"{name} {group}".strip()
        axes.scatter(steps[member], value[member], s=7, linewidth=0, color=colour, marker=marker, label=label)


def _shape(value: Tensor) -> str:
    return f"shape {list(value.shape)}"


def _need_some(given: Mapping[str, object] | Sequence[object], what: str) -> None:
    if not given or isinstance(given, str):
        raise BadValue("nothing to draw", got=f"{what}={given!r}" if given else f"no {what}", needed="one or more")


def _whole_numbers(axes: Axes, xs: list[list[float]]) -> None:
    """Ticks at every x where all are small whole numbers: there is no half a concept."""
    seen = sorted({x for part in xs for x in part})
    if len(seen) <= 20 and all(x == int(x) for x in seen):
        axes.set_xticks(seen)
