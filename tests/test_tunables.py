"""Tunables: ranges and choices, and every value of the grids that methods declare."""

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdconcepts
from tdconcepts.errors import BadValue
from tdconcepts.tunables import Tunable


def test_ranges_keep_their_type():
    assert Tunable("n", 10, 100, 10).values() == list(range(10, 101, 10))
    assert all(type(v) is int for v in Tunable("n", 1, 5, 2).values())
    assert Tunable("level", 0.0, 0.95, 0.05).values() == [round(0.05 * i, 12) for i in range(20)]
    assert all(type(v) is float for v in Tunable("level", 0, 1, 0.5).values())
    assert Tunable("one", 3, 3, 1).values() == [3]


def test_choices():
    assert Tunable("method", choices=("a", None, 3)).values() == ["a", None, 3]


@given(st.integers(-50, 50), st.integers(1, 9), st.integers(0, 40))
def test_a_range_has_both_ends(low, step, count):
    values = Tunable("n", low, low + step * count, step).values()
    assert values == list(range(low, low + step * count + 1, step))


@given(st.floats(-10, 10), st.floats(0.01, 2), st.integers(0, 40))
def test_a_range_of_floats_has_both_ends(low, step, count):
    values = Tunable("x", low, low + step * count, step).values()
    assert len(values) == count + 1
    assert values[0] == pytest.approx(low, abs=1e-11)
    assert values[-1] == pytest.approx(low + step * count, abs=1e-11)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "low <= high, or choices"),
        ({"low": 1}, "low <= high, or choices"),
        ({"low": 2, "high": 1, "step": 1}, "low <= high"),
        ({"low": 0, "high": 1, "choices": (1,)}, "low <= high, or choices"),
        ({"low": 0.0, "high": float("nan")}, "low <= high"),
    ],
)
def test_what_is_no_tunable(options, text):
    with pytest.raises(BadValue, match=text):
        Tunable("x", **options)


def test_without_a_step_there_is_no_grid():
    with pytest.raises(BadValue, match="step="):
        Tunable("x", 1e-6, 1.0, log=True).values()


def test_it_is_data():
    tunable = Tunable("n", 1, 3, 1)
    assert pickle.loads(pickle.dumps(tunable)) == tunable
    assert len({tunable, Tunable("n", 1, 3, 1)}) == 1


PUBLIC = [getattr(tdconcepts, name) for name in tdconcepts.__all__]
TUNED = [cls for cls in PUBLIC if hasattr(cls, "tunables")]


@pytest.mark.parametrize("cls", TUNED, ids=lambda cls: cls.__name__)
def test_methods_declare_settings_that_exist(cls):
    parameters = inspect.signature(cls).parameters
    assert cls.tunables
    for tunable in cls.tunables:
        assert tunable.name in parameters
        default = parameters[tunable.name].default
        values = tunable.values()
        assert default in values or (tunable.low is not None and tunable.low <= default <= tunable.high)


def test_there_are_some():
    assert len(TUNED) >= 3
