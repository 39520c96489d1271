"""Heat maps of many experiments: sites x positions, layers x heads, senders x receivers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.report.figures import new_figure, numbers_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["effect_map", "heat_map"]

_MOST_NUMBERS = 150  # cells that still hold a number one can read
_MOST_LABELS = 40


def heat_map(
    maps: Tensor | Mapping[str, Tensor],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str = "",
    ylabel: str = "",
    label: str = "effect",
    title: str = "",
) -> Figure:
    """One map, or several side by side in the same colours; cells without a number (NaN) are grey.

    Args:
        maps: ``[R, C]``, or title -> ``[R, C]``.
        rows, columns: the names of the R rows (from the top) and C columns.
        xlabel, ylabel, label, title: texts; ``label`` is what the colours mean.

    Raises:
        BadValue: a map that isn't ``[R, C]``, or nothing to draw. MissingExtra: matplotlib is not installed.

    Examples:
        >>> patched = torch.tensor([[0.1, 0.9], [0.0, 0.2]])
        >>> maps = {"patched": patched, "estimated": 0.8 * patched}
        >>> figure = heat_map(maps, ["block 0", "block 1"], ["head 0", "head 1"], label="effect on the logit")
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['patched', 'estimated']
    """
    several = dict(maps) if isinstance(maps, Mapping) else {"": maps}
    if not several or not rows or not columns:
        raise BadValue("nothing to draw", needed="one map or more, with rows and columns")
    values = {name: numbers_in(one, f"the map {name!r}").double() for name, one in several.items()}
    for name, one in values.items():
        if one.shape != (len(rows), len(columns)):
            raise BadValue(
                f"the map {name!r} does not fit its names",
                got=f"shape {list(one.shape)}",
                needed=f"[{len(rows)}, {len(columns)}]",
            )
    finite = torch.cat([one[one.isfinite()] for one in values.values()])
    most = float(finite.abs().max()) if len(finite) and finite.abs().max() > 0 else 1.0
    signed = bool((finite < -0.02 * most).any())
    cell = max(0.22, min(0.62, 9.0 / (len(columns) * len(several))))
    width = len(several) * (len(columns) * cell + 0.6) + 0.1 * max(map(len, rows)) + 1.2
    figure, axes = new_figure(1, len(several), size=(max(4.0, width), max(2.6, 0.32 * len(rows) + 1.4)), sharey=True)
    for axis, (name, one) in zip(axes[0], values.items(), strict=True):
        axis.grid(False)
        axis.set_facecolor("#d9d9d9")
        image = axis.pcolormesh(
            one.masked_fill(~one.isfinite(), float("nan")).numpy(),
            cmap="RdBu_r" if signed else "Blues",
            vmin=-most if signed else 0.0,
            vmax=most,
            edgecolors="white",
            linewidth=0.4,
        )
        _name(axis.set_xticks, columns, 90 if max(map(len, columns)) > 3 else 0)
        _name(axis.set_yticks, rows, 0)
        axis.set(xlabel=xlabel, title=name or title)
        if one.numel() * len(several) <= _MOST_NUMBERS and cell > 0.45:
            _numbers(axis, one, most, signed)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel(ylabel)
    if several.keys() != {""} and title:
        figure.suptitle(title)
    figure.colorbar(image, ax=list(axes[0]), label=label, pad=0.02)
    return figure


def effect_map(
    effect: Tensor,
    names: Sequence[str],
    *,
    xlabel: str = "",
    ylabel: str = "site",
    label: str = "effect",
    title: str = "",
) -> Figure:
    """The effects of experiments as a map: a row for each site, a column for each unit, head or position.

    The names of experiments, ``"blocks.3[5, :]"``, say the row and the column; those of whole sites, ``"blocks.3"``,
    make one column. A batch is averaged, over the rows whose effect is finite.

    Args:
        effect: ``[*B, N]``: ``td["patching", "effect"]``, ``td["ablation", "effect"]``.
        names: of the N experiments, as ``.names(td)`` gives them.
        xlabel, ylabel, label, title: texts.

    Raises:
        BadValue: another number of names, or two experiments in one cell. MissingExtra: matplotlib is not installed.

    Examples:
        >>> names = ["blocks.0[0]", "blocks.0[1]", "blocks.1[0]"]  # effects.names(td)
        >>> figure = effect_map(torch.tensor([[0.1, 0.9, 0.4], [0.3, 0.9, 0.2]]), names, xlabel="head")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['blocks.0', 'blocks.1']
    """
    effect = numbers_in(effect, "the effect")
    if effect.ndim < 1 or effect.shape[-1] != len(names):
        raise BadValue("the names do not fit the effects", got=f"{len(names)} names", needed=f"{list(effect.shape)}")
    flat = effect.double().reshape(-1, len(names))
    mean = flat.masked_fill(~flat.isfinite(), float("nan")).nanmean(0)
    cells = [_cell(name) for name in names]
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted(dict.fromkeys(column for _, column in cells), key=_order)
    values = torch.full((len(rows), len(columns)), float("nan"), dtype=torch.float64)
    for (row, column), value in zip(cells, mean.tolist(), strict=True):
        at = rows.index(row), columns.index(column)
        if cells.count((row, column)) > 1:
            raise BadValue("two experiments are in one cell", got=f"{row} {column}".strip(), needed="names that differ")
        values[at] = value
    return heat_map(values, rows, columns, xlabel=xlabel, ylabel=ylabel, label=label, title=title)


def _cell(name: str) -> tuple[str, str]:
    """The site and the unit of an experiment's name; that of several changes is one row."""
    found = re.fullmatch(r"(.*?)\[([^\[\]]*)\]", name) if " & " not in name else None
    if found is None:
        return name, ""
    return found[1], ", ".join(part for part in found[2].split(", ") if part != ":")


def _order(column: str) -> tuple[int, int, str]:
    return (0, int(column), "") if re.fullmatch(r"-?\d+", column) else (1, 0, column)


def _name(set_ticks: object, names: Sequence[str], rotation: float) -> None:
    step = -(-len(names) // _MOST_LABELS)
    set_ticks([i + 0.5 for i in range(0, len(names), step)], list(names)[::step], rotation=rotation)  # type: ignore[operator]


def _numbers(axis: object, values: Tensor, most: float, signed: bool) -> None:
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            if value == value:
                dark = abs(value) > (0.65 if signed else 0.6) * most
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
                axis.text(j + 0.5, i + 0.5, f"{value:.2f}".replace("-0.00", "0.00"), **style)  # type: ignore[attr-defined]
