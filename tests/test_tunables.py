"""Tunables: ranges and choices, and every value of the grids that methods declare."""

import copy
import inspect
import pickle
import typing
from typing import TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdconcepts
from tdconcepts.errors import BadType, BadValue
from tdconcepts.tunables import Replaceable, Tunable, constructor


def test_ranges_keep_their_type():
    assert Tunable("n", 10, 100, 10).values() == list(range(10, 101, 10))
    assert all(type(v) is int for v in Tunable("n", 1, 5, 2).values())
    assert Tunable("level", 0.0, 0.95, 0.05).values() == [round(0.05 * i, 12) for i in range(20)]
    assert all(type(v) is float for v in Tunable("level", 0, 1, 0.5).values())
    assert Tunable("one", 3, 3, 1).values() == [3]


def test_logarithmic_ranges():
    assert Tunable("x", 1e-6, 1.0, 10, log=True).values() == [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0]
    assert Tunable("x", 1, 8, 2, log=True).values() == [1.0, 2.0, 4.0, 8.0]


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
        ({"low": 0.0, "high": 1.0, "log": True}, "low > 0"),
        ({"low": 0.1, "high": 1.0, "step": 0.1, "log": True}, "a factor"),
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
TUNED = [cls for cls in PUBLIC if isinstance(cls, type) and getattr(cls, "tunables", ())]


@pytest.mark.parametrize("cls", TUNED, ids=lambda cls: cls.__name__)
def test_methods_declare_settings_that_exist(cls):
    parameters = inspect.signature(cls).parameters
    options = typing.get_type_hints(cls.__init__).get("options")
    known = typing.get_args(options)[0].__annotations__ if options is not None else {}
    for tunable in cls.tunables:
        assert tunable.values()
        if tunable.name not in parameters:
            assert tunable.name in known
            continue
        default = parameters[tunable.name].default  # None where it depends on the data
        inside = tunable.low is not None and default is not None and tunable.low <= default <= tunable.high
        assert default is None or default in tunable.values() or inside


def test_there_are_some():
    assert len(TUNED) >= 3


# ---------------------------------------------------------------------------------------- replace


class Plain(Replaceable):
    tunables = (Tunable("size", 1, 3, 1),)

    def __init__(self, of, size=1, *, more=None, **options: "Unpack[Known]"):  # noqa: F821 (found by its name)
        if size < 1:
            raise BadValue("not a size", got=size)
        self.of, self.size, self.more, self.options = of, size, more, options


class Known(TypedDict, total=False):
    colour: str
    taste: str


class Wrapper(Replaceable):
    tunables = (Tunable("size", 10, 30, 10), Tunable("depth", 1, 2, 1))

    def __init__(self, explainer, size=10, depth=1):
        self.explainer, self.size, self.depth = explainer, size, depth


@constructor(Tunable("level", 0.0, 1.0, 0.5))
def Named(of, level=0.5, **options):  # noqa: N802
    return Plain(of, size=2, more=level, **options)


def test_a_copy_with_some_arguments_changed():
    of = object()
    one = Plain(of, 2, more=[1], taste="sweet")
    other = one.replace(size=3, colour="red")
    assert (other.of, other.size, other.more, other.options) == (of, 3, [1], {"taste": "sweet", "colour": "red"})
    assert (one.size, one.options) == (2, {"taste": "sweet"})
    assert type(other) is Plain
    again = other.replace(taste="sour", of=None)
    assert (again.of, again.size, again.options) == (None, 3, {"taste": "sour", "colour": "red"})


def test_what_it_was_made_from_is_not_changed_behind_its_back():
    more = [1]
    one = Plain(None, more=more)
    more.append(2)
    assert one.replace().more == [1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sise": 2}, "Plain has no argument 'sise'.*did you mean 'size'"),
        ({"tast": "sweet"}, "did you mean 'taste'"),
        ({"options": {}}, "no argument 'options'"),
        ({"self": None}, "no argument 'self'"),
        ({"explainer__size": 1}, "no argument 'explainer__size'"),
    ],
)
def test_a_name_that_is_no_argument(changes, text):
    with pytest.raises(BadType, match=f"(?s){text}"):
        Plain(None).replace(**changes)


def test_values_are_checked_by_the_constructor():
    with pytest.raises(BadValue, match="not a size"):
        Plain(None).replace(size=0)


def test_the_settings_of_what_is_wrapped():
    one = Wrapper(Wrapper(Plain(None, taste="sweet"), 20), depth=2)
    names = ["size", "depth", "explainer__size", "explainer__depth", "explainer__explainer__size"]
    assert [tunable.name for tunable in one.tunables] == names
    assert [tunable.low for tunable in one.tunables] == [10, 1, 10, 1, 1]
    assert [tunable.name for tunable in Wrapper.tunables] == ["size", "depth"]
    changed = one.replace(size=30, explainer__size=10, explainer__explainer__size=3, taste="sour")
    inner = changed.explainer
    assert (changed.size, changed.depth, inner.size, inner.explainer.size) == (30, 2, 10, 3)
    assert inner.explainer.options == {"taste": "sour"}
    assert one.explainer.explainer.options == {"taste": "sweet"}
    assert one.replace(size=30).explainer is one.explainer
    assert one.replace(explainer=None).explainer is None
    with pytest.raises(BadType, match="did you mean 'taste'"):
        one.replace(tast="sour")


def test_functions_that_construct():
    one = Named(None, taste="sweet")
    assert [tunable.name for tunable in one.tunables] == ["level"]
    assert one.replace(level=1.0, colour="red").more == 1.0
    assert one.replace(colour="red").replace(level=0.0).options == {"taste": "sweet", "colour": "red"}
    with pytest.raises(BadType, match="Named has no argument 'lewel'"):
        one.replace(lewel=1)
    with pytest.raises(BadType, match="multiple values for keyword argument 'size'"):
        one.replace(size=1)


def test_copies_can_be_changed_too():
    for one in (Wrapper(Plain(1)), Wrapper(Named(1))):
        for copied in (copy.deepcopy(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
            assert copied.replace(depth=2).depth == 2
            assert copied.tunables == one.tunables


def test_arguments_that_do_not_fit_get_pythons_error():
    with pytest.raises(TypeError, match=r"Plain.__init__\(\) missing"):
        Plain()
