"""The key vocabulary: one canonical form, joins that undo themselves, and clashes found before anything is written."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts import keys
from tdconcepts.errors import BadKey
from tdconcepts.keys import as_key, as_keys, check_present, check_writable, join, key_text

names = st.text(alphabet="abc.()'\" ", min_size=1, max_size=3)
raw_keys = st.recursive(names, lambda inner: st.lists(inner, min_size=1, max_size=3).map(tuple), max_leaves=6)
canonical = raw_keys.map(as_key)

NO_KEYS = [None, 0, 1.5, b"x", "", (), ("a", ""), ("a", 1), ("a", ()), {"a"}, {"a": 1}, torch.zeros(2)]


@given(raw_keys)
def test_canonical_form_is_a_string_or_a_flat_tuple(key):
    out = as_key(key)
    assert (isinstance(out, str) and out) or (len(out) >= 2 and all(isinstance(name, str) for name in out))
    assert as_key(out) == out


@given(raw_keys)
def test_canonical_form_names_the_entry_that_tensordict_names(key):
    entry = TensorDict({}, []).set(as_key(key), torch.ones(()))
    assert entry.get(key) is entry.get(as_key(key))
    assert [as_key(k) for k in entry.keys(include_nested=True, leaves_only=True)] == [as_key(key)]


@given(canonical, canonical)
def test_two_canonical_keys_are_equal_only_when_they_are_the_same_entry(first, second):
    assert (first == second) == (join(first) == join(second))


@pytest.mark.parametrize("key", NO_KEYS, ids=repr)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(BadKey, match="string or a tuple of strings"):
        as_key(key)


def test_a_list_is_not_a_key_but_several():
    with pytest.raises(BadKey, match=re.escape("['a', ('b', 'c')]")):
        as_key(["a", "b"])
    assert as_keys(["a", ("b", "c")]) == ["a", ("b", "c")]
    assert as_keys(("a", "b")) == [("a", "b")]
    assert as_keys("ab") == ["ab"]
    assert as_keys([]) == []


@given(st.lists(raw_keys, max_size=4))
def test_as_keys_is_as_key_of_each(raw):
    assert as_keys(raw) == [as_key(key) for key in raw]


@given(st.lists(raw_keys, min_size=1, max_size=4))
def test_join_is_associative_and_drops_nothing(parts):
    whole = join(*parts)
    assert whole == sum((join(part) for part in parts), ())
    assert join(whole) == whole
    assert join(join(*parts[:1]), *parts[1:]) == whole


@pytest.mark.parametrize("key", NO_KEYS, ids=repr)
def test_join_refuses_what_is_no_key(key):
    with pytest.raises(BadKey):
        join("attribution", key)


def test_key_text_can_be_pasted():
    assert key_text("it's") == '"it\'s"'
    assert key_text((("agents",), "state")) == "('agents', 'state')"


@given(raw_keys)
def test_key_text_reads_back(key):
    assert eval(key_text(key)) == as_key(key)


@pytest.mark.parametrize(
    ("out_keys", "in_keys"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a", "b"], ["c"]),
        ([("attribution", "x"), ("attribution", "y")], ["x", "y"]),
        ([("a", "b")], [("a", "c")]),
        (["b"], [("a", "b")]),
    ],
)
def test_writable(out_keys, in_keys):
    check_writable(out_keys, in_keys)


@pytest.mark.parametrize(
    ("out_keys", "in_keys", "named"),
    [
        (["a", "a"], [], ["'a'"]),
        ([("a", "b"), ("a", "b")], [], ["('a', 'b')"]),
        (["a", ("a", "b")], [], ["'a'", "('a', 'b')"]),
        ([("a", "b"), "a"], [], ["'a'", "('a', 'b')"]),
        ([("a", "b", "c")], ["a"], ["'a'", "('a', 'b', 'c')"]),
        (["a"], [("a", "b")], ["'a'", "('a', 'b')"]),  # would replace the sub-TensorDict that is read
    ],
)
def test_clashes_name_both_keys(out_keys, in_keys, named):
    with pytest.raises(BadKey) as caught:
        check_writable(out_keys, in_keys)
    assert all(name in str(caught.value) for name in named)
    assert "out_key" in str(caught.value)


@given(st.lists(canonical, max_size=4), st.lists(canonical, max_size=3))
def test_writable_keys_can_be_written_together(out_keys, in_keys):
    """The check agrees with TensorDict itself: written in this order, every entry is still there afterwards."""
    try:
        check_writable(out_keys, in_keys)
    except BadKey:
        return
    td = TensorDict({}, [])
    try:
        for i, key in enumerate(in_keys):
            td.set(key, torch.tensor(float(i)))
        stored = {join(key) for key in in_keys} == {join(k) for k in td.keys(True, True)}
    except (KeyError, RuntimeError, TypeError, AttributeError):
        return  # the inputs themselves can't live in one TensorDict
    if not stored:
        return
    for i, key in enumerate(out_keys):
        td.set(key, torch.tensor(100.0 + i))
    for i, key in enumerate(out_keys):
        assert td.get(key).item() == 100.0 + i
    assert {join(k) for k in td.keys(True, True)} == {join(k) for k in [*in_keys, *out_keys]}


def test_check_present():
    check_present("a", ["a", "b"], "the policy's out_keys")
    check_present(("a", "b"), iter([("a", "b")]), "the TensorDict")
    with pytest.raises(BadKey) as caught:
        check_present("lgits", ["logits", "action"], "the policy's out_keys")
    assert "the policy's out_keys" in str(caught.value)
    assert "'lgits'" in str(caught.value)
    assert "did you mean 'logits'?" in str(caught.value)


def test_the_vocabulary_is_made_of_different_words():
    words = [value for name, value in vars(keys).items() if name.isupper() and name != "TYPE_CHECKING"]
    assert len(words) == len(set(words)) >= 9
    assert all(as_key(word) == word for word in words)
