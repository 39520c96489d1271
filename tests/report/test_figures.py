"""Figures: what is drawn is what was given; the same figure gives the same file; errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdconcepts import errors
from tdconcepts.errors import BadType, BadValue, MissingExtra

pytest.importorskip("matplotlib")
from tdconcepts.report.figures import (
    COLOURS,
    interval_plot,
    intervention_curve,
    new_figure,
    over_time,
    to_png,
    to_svg,
)


def lines(axes):
    return [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]


def test_intervention_curve_draws_each_policy():
    curves = {"random": ([0, 1, 2], [0.8, 0.85, 0.9]), "gradient": ([0, 1, 2], [0.8, 0.9, 1.0], [0.7] * 3, [1.0] * 3)}
    (axes,) = intervention_curve(curves, title="digits").axes
    assert [list(y) for _, y in lines(axes)] == [[0.8, 0.85, 0.9], [0.8, 0.9, 1.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["random", "gradient"]
    assert len(axes.collections) == 1  # one band
    assert list(axes.get_xticks()) == [0, 1, 2]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("concepts corrected", "task accuracy", "digits")
    assert (
        len({line.get_color() for line in axes.get_lines()})
        == len({line.get_marker() for line in axes.get_lines()})
        == 2
    )


def test_intervention_curve_takes_tensors():
    (axes,) = intervention_curve({"a": (torch.arange(3), torch.tensor([0.1, 0.2, 0.3]))}).axes
    assert lines(axes)[0][1] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("curve", [([0, 1], [0.5]), ([0, 1], [0.5, 0.6], [0.4, 0.5]), ([0], [0.5], [0.4], [0.6, 0.7])])
def test_a_ragged_curve_is_refused(curve):
    with pytest.raises(BadValue, match="the curve 'a' is none"):
        intervention_curve({"a": curve})


def test_over_time_is_a_grid_of_features_and_quantities():
    states = torch.randn(7, 2)
    series = {"first": torch.randn(7, 2), "second": torch.randn(7, 2)}
    figure = over_time(["position, m", "angle, rad"], {"state": states, "contribution": series}, title="one episode")
    assert len(figure.axes) == 4
    top, contribution, bottom, _ = figure.axes
    assert lines(top)[0][1] == pytest.approx(states[:, 0])
    assert lines(bottom)[0][1] == pytest.approx(states[:, 1])
    assert lines(contribution)[1][1] == pytest.approx(series["second"][:, 0])
    assert (top.get_title(), top.get_ylabel(), bottom.get_ylabel()) == ("state", "position\nm", "angle\nrad")
    assert [text.get_text() for text in figure.axes[3].get_legend().get_texts()] == ["first", "second"]


def test_over_time_marks_steps_by_group():
    value, left = torch.randn(6, 1), torch.tensor([True, False, True, False, False, True])
    figure = over_time(["angle"], {"state": value}, groups={"left": left, "right": ~left})
    (axes,) = figure.axes
    drawn = [torch.tensor(part.get_offsets()) for part in axes.collections]
    assert drawn[0][:, 0].tolist() == [0, 2, 5]
    assert torch.allclose(drawn[1][:, 1].float(), value[~left, 0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["left", "right"]


def test_over_time_leaves_gaps_where_values_are_missing():
    value = torch.ones(4, 1, requires_grad=True) * torch.tensor([1.0, float("nan"), 1.0, 1.0]).unsqueeze(-1)
    assert to_svg(over_time(["x"], {"v": value}))


@pytest.mark.parametrize(
    ("rows", "columns", "groups", "text"),
    [
        ([], {"a": torch.zeros(3, 0)}, None, "no rows"),
        ("xy", {"a": torch.zeros(3, 2)}, None, "rows='xy'"),
        (["x"], {}, None, "no columns"),
        (["x"], {"a": torch.zeros(3, 2)}, None, r"needed:  \[T, 1\]"),
        (["x"], {"a": {"b": torch.zeros(3)}}, None, "'b' does not fit"),
        (["x"], {"a": torch.zeros(3, 1)}, {"g": torch.ones(4)}, "the group 'g'"),
    ],
)
def test_over_time_bad_input(rows, columns, groups, text):
    with pytest.raises(BadValue, match=text):
        over_time(rows, columns, groups=groups)


def test_interval_plot():
    means = {"unpatched": (500.0, 499.0, 501.0), "without": (9.0, 8.0, 10.5)}
    (axes,) = interval_plot(means, {"without": [8.0, 9.0, 10.0]}, xlabel="return", reference=500.0).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(means)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # from top to bottom
    ends = [segment[:, 0].tolist() for part in axes.collections for segment in getattr(part, "get_segments", list)()]
    assert [499.0, 501.0] in ends
    assert [8.0, 10.5] in ends
    with pytest.raises(BadValue, match="no means"):
        interval_plot({}, xlabel="return")
    with pytest.raises(BadValue, match="the interval 'a' is none"):
        interval_plot({"a": 3.0}, xlabel="return")


def test_what_holds_no_numbers():
    with pytest.raises(BadType, match="the curve 'a' holds no numbers"):
        intervention_curve({"a": (None, None)})
    with pytest.raises(BadType, match="state holds no numbers"):
        over_time(["x"], {"state": "many"})
    assert over_time(["x"], {"state": [[1.0], [2.0]]}).axes


def test_files_repeat_and_open_no_window():
    def figure():
        return intervention_curve({"a": ([0, 1], [0.0, 1.0])})

    assert to_svg(figure()) == to_svg(figure())
    assert to_svg(figure()).startswith("<?xml")
    assert to_png(figure()) == to_png(figure())
    assert to_png(figure())[:4] == b"\x89PNG"
    assert len(to_png(figure(), dpi=200)) > len(to_png(figure(), dpi=50))


def test_the_style_is_local():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figure, axes = new_figure(2, 3)
    assert axes.shape == (2, 3)
    to_svg(figure)
    assert dict(mpl.rcParams) == before


def test_colours_differ_in_brightness_from_paper():
    """WCAG's contrast on white, at least 2 (lines are thick, and shapes and dashes differ as well)."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert all(1.05 / (luminance(colour) + 0.05) >= 2.0 for colour in COLOURS)
    assert len(set(COLOURS)) == 7


def test_matplotlib_is_imported_late_and_missed_politely(monkeypatch):
    root = Path(errors.__file__).parents[1]
    code = "import sys, tdconcepts.report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'tdconcepts\[report\]'"):
        new_figure()
