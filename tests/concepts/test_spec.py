"""ConceptSpec: plain data about columns."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_slices_tile_the_block_in_order(cardinalities):
    spec = ConceptSpec([f"c{i}" for i in range(len(cardinalities))], cardinalities)
    columns = [c for name in spec.names for c in range(spec.size)[spec.slice(name)]]
    assert columns == list(range(sum(cardinalities))) == spec.columns(spec.names)
    assert spec.binary == (set(cardinalities) == {1})
    assert [spec.index(name) for name in spec.names] == list(range(len(spec)))


def test_it_is_frozen_hashable_picklable_data():
    spec = ConceptSpec(["wing", "colour"], [1, 3])
    assert spec == ConceptSpec(("wing", "colour"), (1, 3))
    assert hash(spec) == hash(copy.deepcopy(spec))
    assert pickle.loads(pickle.dumps(spec)) == spec != ConceptSpec(["wing", "colour"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.names = ("beak",)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 3))
def test_probs_are_a_sigmoid_or_a_softmax_for_each_concept_alone(cardinalities, rows):
    spec = ConceptSpec(len(cardinalities), cardinalities)
    logits = torch.randn(rows, 2, spec.size, generator=torch.Generator().manual_seed(0))
    probs = spec.probs(logits)
    assert probs.shape == logits.shape
    for name, n in zip(spec.names, cardinalities, strict=True):
        one = logits[..., spec.slice(name)]
        expected = 1 / (1 + (-one).exp()) if n == 1 else one.exp() / one.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(probs[..., spec.slice(name)], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([],), BadValue, "no concepts"),
        ((0,), BadValue, "no concepts"),
        ((["a", "a"],), BadValue, "'a'"),
        ((["a"], [1, 2]), BadValue, "1 names, 2 cardinalities"),
        ((["a"], [0]), BadValue, "'a': 0"),
        ((["a"], [True]), BadValue, "'a': True"),
        (("wing",), BadType, "'wing'"),
        (([1, 2],), BadType, r"\[1, 2\]"),
        ((True,), BadType, "True"),
    ],
)
def test_bad_specs(arguments, error, text):
    with pytest.raises(error, match=text):
        ConceptSpec(*arguments)


def test_unknown_names_show_the_nearest():
    with pytest.raises(BadKey, match="did you mean 'colour'"):
        ConceptSpec(["wing", "colour"]).slice("color")


def test_probs_of_another_width():
    with pytest.raises(BadValue, match=r"\[2, 3\]"):
        ConceptSpec(["wing", "beak"]).probs(torch.zeros(2, 3))
