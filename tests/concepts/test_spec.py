"""ConceptSpec: plain data about columns."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

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


MIXED = ConceptSpec(
    ["wing", "colour", "shape", "age", "beak"],
    [1, 3, 3, 2, 1],
    ["binary", "categorical", "categorical", "continuous", "binary"],
    {"look": ["colour", "shape"], "head": ["beak"]},
)


def test_two_categorical_concepts_of_one_cardinality_have_a_softmax_each():
    """W3: in torch_concepts 1.0.0a7 they share one softmax, and the masses of a row are .22 and .78 instead of 1."""
    probs = MIXED.probs(torch.randn(7, 10, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(probs[:, 1:4].sum(-1), torch.ones(7))
    torch.testing.assert_close(probs[:, 4:7].sum(-1), torch.ones(7))


def test_runs_cut_the_block_by_kind_and_cardinality():
    assert [tuple(run) for run in MIXED.runs] == [
        ("binary", 1, 0, 1, 0, 1),
        ("categorical", 3, 1, 7, 1, 3),
        ("continuous", 2, 7, 9, 3, 4),
        ("binary", 1, 9, 10, 4, 5),
    ]
    assert len(ConceptSpec(1000).runs) == 1


def test_continuous_concepts_stay_as_they_are_and_groups_have_columns():
    logits = torch.randn(2, 10)
    assert torch.equal(MIXED.probs(logits)[:, 7:9], logits[:, 7:9])
    assert torch.equal(MIXED.logits(logits)[:, 7:9], logits[:, 7:9])
    assert MIXED.columns(["head", "look"]) == [9, 1, 2, 3, 4, 5, 6]
    with pytest.raises(BadKey, match="did you mean 'look'"):
        MIXED.columns(["loook"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_what_probs_takes_back(dtype):
    """W4: a ground truth of 1 is not the logit 1. W8: in half precision nothing is NaN."""
    spec = ConceptSpec(["wing", "colour"], [1, 3])
    columns = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]], dtype=dtype)
    logits = spec.logits(columns)
    assert logits.dtype is dtype
    torch.testing.assert_close(spec.probs(logits), columns, atol=4e-4, rtol=0)


def test_targets_are_one_hot_by_the_definition():
    labels = torch.tensor([[1.0, 2, 0, 0, 0], [0, torch.nan, 1, 0, torch.nan]])[:, [0, 1, 2, 4]]
    spec = ConceptSpec(["wing", "colour", "shape", "beak"], [1, 3, 3, 1])
    nan = torch.nan
    expected = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0], [0, nan, nan, nan, 0, 1, 0, nan]])
    torch.testing.assert_close(spec.targets(labels), expected, equal_nan=True)
    torch.testing.assert_close(spec.targets(expected), expected, equal_nan=True)
    assert spec.targets(labels.nan_to_num().long()).dtype is torch.float32
    one = ConceptSpec(["digit"], [3])
    assert one.targets(torch.tensor([2, 0]), torch.zeros(2, 3)).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([[1, 3, 0, 0]]), "no such state"),
        (torch.tensor([[1, -1, 0, 0]]), "no such state"),
        (torch.tensor([[2, 0, 0, 0]]), r"outside \[0, 1\]"),
        (torch.tensor([[1.0, 1.5, 0, 0]]), "whole number"),
        (torch.tensor([[1.0, torch.inf, 0, 0]]), "no such state"),
        (torch.zeros(1, 5), r"\[\*B, 4\] numbers or \[\*B, 8\] columns"),
        (torch.full((1, 8), 2.0), r"outside \[0, 1\]"),
    ],
)
def test_labels_that_can_not_be(labels, text):
    with pytest.raises(BadValue, match=text):
        ConceptSpec(["wing", "colour", "shape", "beak"], [1, 3, 3, 1]).targets(labels)


@pytest.mark.parametrize("batch", [[], [3], [2, 3], [0]])
@pytest.mark.parametrize("key", ["concepts", ("agents", "concepts")])
def test_split_and_pack_are_inverse(batch, key):
    td = TensorDict({key: torch.randn(*batch, 10), "other": torch.zeros(*batch, 1)}, batch)
    split = MIXED.split(td, key)
    assert set(split[key].keys()) == set(MIXED.names)
    assert split[key]["colour"].shape == (*batch, 3)
    packed = MIXED.pack(split, key)
    assert torch.equal(packed[key], td[key])
    assert packed["other"] is td["other"]
    assert isinstance(td[key], torch.Tensor)  # what was given is as it was


def test_names_stay_with_their_columns_when_the_order_changes():
    """W10: torch_concepts' labels stay in place when columns move, and name another concept's."""
    td = TensorDict({"concepts": torch.arange(10.0).expand(2, 10)}, [2])
    other = ConceptSpec([*MIXED.names[::-1]], [*MIXED.cardinalities[::-1]], [*MIXED.kinds[::-1]])
    turned = other.pack(MIXED.split(td))
    for name in MIXED.names:
        assert torch.equal(turned["concepts"][:, other.slice(name)], td["concepts"][:, MIXED.slice(name)])


def test_what_split_and_pack_refuse():
    td = TensorDict({"concepts": torch.zeros(2, 10)}, [2])
    with pytest.raises(BadKey, match="did you mean 'concepts'"):
        MIXED.split(td, "concept")
    with pytest.raises(BadValue, match=r"\[2, 9\]"):
        MIXED.split(TensorDict({"concepts": torch.zeros(2, 9)}, [2]))
    split = MIXED.split(td)
    with pytest.raises(BadKey, match="no entry of the concept 'age'"):
        MIXED.pack(split.exclude(("concepts", "age")))
    with pytest.raises(BadValue, match="another cardinality of 'age'"):
        MIXED.pack(split.set(("concepts", "age"), torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kinds": ["binary"]}, BadValue, "2 names, 1 kinds"),
        ({"kinds": ["binary", "ordinal"]}, BadValue, "ordinal"),
        ({"kinds": ["binary", "binary"]}, BadValue, "'b' is binary"),
        ({"kinds": ["categorical", "categorical"]}, BadValue, "'a' is categorical"),
        ({"groups": {"g": ["c"]}}, BadKey, "group 'g'"),
        ({"groups": {"a": ["b"]}}, BadValue, "one name"),
        ({"groups": [("g", ["a"]), ("g", ["b"])]}, BadValue, "two groups have one name"),
        ({"groups": ["a", "b"]}, BadType, "not groups"),
        ({"groups": 3}, BadType, "not groups"),
        ({"groups": {1: ["a"]}}, BadType, "not groups"),
    ],
)
def test_bad_kinds_and_groups(arguments, error, text):
    with pytest.raises(error, match=text):
        ConceptSpec(["a", "b"], [1, 3], **arguments)


def test_replace_keeps_the_groups():
    spec = ConceptSpec(["a", "b"], [1, 3], groups={"g": ["a", "b"], "h": ["b"]})
    assert dataclasses.replace(spec) == spec == ConceptSpec(spec.names, spec.cardinalities, spec.kinds, spec.groups)
    assert dataclasses.replace(spec, groups={"g": ["a"]}).columns(["g"]) == [0]
    with pytest.raises(BadKey, match="'b'"):
        dataclasses.replace(spec, names=("a", "c"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_labels_are_finite_in_half_precision(dtype):
    """W8: 1 - 1e-4 is 1 there."""
    logits = ConceptSpec(["wing", "colour"], [1, 3]).logits(torch.tensor([1.0, 0, 1, 0], dtype=dtype))
    torch.testing.assert_close(logits, torch.tensor([9.21, -9.21, 0, -9.21], dtype=dtype), atol=0.05, rtol=0)


def test_what_is_no_list_and_no_tensordict():
    spec = ConceptSpec(["a", "b"])
    with pytest.raises(BadType, match=r"(?s)not cardinalities.*one int for each"):
        ConceptSpec(["a", "b"], 3)
    for way in (spec.split, spec.pack):
        with pytest.raises(BadType, match=r"(?s)entries of a TensorDict.*Tensor"):
            way(torch.zeros(4, 2))
