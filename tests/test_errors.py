"""The error family: its kinds, its text, and that it survives being sent between processes."""

import copy
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts.errors import BadKey, BadType, BadValue, MissingExtra, TdConceptsError, import_extra, nearest

KINDS = {BadKey: KeyError, BadValue: ValueError, BadType: TypeError, MissingExtra: ImportError}
FULL = {"got": "[2, 3]", "needed": "[2, 4]", "fix": "pass observation [*B, 4]"}
TEXT = "wrong shape\n  got:     [2, 3]\n  needed:  [2, 4]\n  way out: pass observation [*B, 4]"


@pytest.mark.parametrize(("error", "builtin"), KINDS.items())
def test_caught_by_family_and_by_kind(error, builtin):
    with pytest.raises(TdConceptsError):
        raise error("x")
    with pytest.raises(builtin):
        raise error("x")
    others = set(KINDS.values()) - {builtin}
    assert not any(issubclass(error, other) for other in others)


@pytest.mark.parametrize("error", [TdConceptsError, *KINDS])
def test_text_has_every_part_on_a_line_of_its_own(error):
    assert str(error("wrong shape", **FULL)) == TEXT


@pytest.mark.parametrize("part", FULL)
def test_every_part_is_optional(part):
    lines = str(BadValue("wrong shape", **{part: FULL[part]})).splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(FULL[part])
    assert str(BadValue("wrong shape")) == "wrong shape"


def test_a_falsy_part_is_still_shown():
    assert str(BadValue("x", got=0)).endswith("got:     0")
    assert "got:" in str(BadValue("x", got=""))


def test_key_error_prints_without_escapes():
    """``str(KeyError("a\\nb"))`` is a repr: one line with the break escaped."""
    error = BadKey("no entry 'a'", got="'a'", needed="one of 'b'")
    assert "\\n" not in str(error)
    shown = "".join(traceback.format_exception_only(error))
    assert shown == "tdconcepts.errors.BadKey: no entry 'a'\n  got:     'a'\n  needed:  one of 'b'\n"


@pytest.mark.parametrize("error", [TdConceptsError, *KINDS])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_copies(error, protocol):
    original = error("wrong shape", **FULL)
    for twin in (pickle.loads(pickle.dumps(original, protocol)), copy.copy(original), copy.deepcopy(original)):
        assert type(twin) is error
        assert str(twin) == TEXT


def test_notes_and_cause_are_python_s_own():
    cause = RuntimeError("inside")
    error = BadValue("x")
    error.add_note("in stage 3")
    with pytest.raises(BadValue) as caught:
        raise error from cause
    assert caught.value.__cause__ is cause
    assert caught.value.__notes__ == ["in stage 3"]


def test_import_extra_returns_the_module_itself():
    import collections.abc

    assert import_extra("collections.abc", "rl") is collections.abc


def test_import_extra_names_the_package_and_the_extra():
    with pytest.raises(MissingExtra, match="tdconcepts_has_no_such_package") as caught:
        import_extra("tdconcepts_has_no_such_package.inside", "rl")
    assert "[rl]" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_import_extra_lets_other_failures_through(tmp_path, monkeypatch):
    """A package that is there but breaks while it is imported is not a missing one."""
    (tmp_path / "tdc_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        import_extra("tdc_broken", "rl")


def test_nearest_names_close_matches_first():
    assert nearest("observatoin", ["action", "observation", "obs"]) == "did you mean 'observation'?"


def test_nearest_says_when_there_is_nothing():
    assert nearest("x", []) == "there are none here"


def test_nearest_shortens_long_lists():
    text = nearest("zzzz", [f"k{i:02}" for i in range(20)], limit=3)
    assert text == "one of 'k00', 'k01', 'k02', 'k03', 'k04', 'k05' and 14 more"


def test_nearest_takes_nested_keys_and_a_generator():
    keys = [("agents", "state"), "reward"]
    assert nearest(("agents", "stat"), (k for k in keys)) == "did you mean ('agents', 'state')?"
    assert nearest("zzz", iter(keys)) == "one of ('agents', 'state'), 'reward'"


@given(st.text(max_size=8), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30))
def test_nearest_only_names_what_exists(name, names):
    text = nearest(name, names)
    assert any(repr(n) in text for n in names)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1))
def test_nearest_finds_an_existing_name(names):
    assert repr(names[0]) in nearest(names[0], names)
