"""Strategies: what is written, in the units of the entry."""

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.spaces import EPS
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.strategies import Do, GroundTruth

GROUPED = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))


def value(strategy, concepts, **entries):
    td = TensorDict({"concepts": concepts, **entries}, concepts.shape[:-1])
    assert strategy(td) is td
    return td["intervention", "value"]


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.5, 1, [0.0, 0.5, 1.0], torch.tensor([0.0, 0.5, 1.0])], ids=str)
def test_do_broadcasts_its_value(batch, dtype, constant):
    got = value(Do(constant), torch.rand(*batch, 3, dtype=dtype))
    assert got.dtype is dtype
    assert torch.equal(got, torch.as_tensor(constant).to(dtype).expand(*batch, 3))


def test_do_in_space_logits_writes_the_logit_of_a_probability():
    assert value(Do(1.0, space="logits"), torch.zeros(2)).tolist() == pytest.approx([9.21, 9.21], abs=0.01)
    got = value(Do([1.0, 0.0, 0.5, 0.5, 0.0], space="logits").bind(GROUPED), torch.zeros(5))
    assert got.tolist() == pytest.approx([9.21, math.log(EPS), math.log(0.5), math.log(0.5), -9.21], abs=0.01)


def test_do_is_a_setting_and_a_parameter_is_learned():
    strategy = Do([1.0, 2.0])
    assert not strategy.state_dict()
    for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy)), strategy.bind(Splice())):
        assert value(other, torch.zeros(2)).tolist() == [1.0, 2.0]
    source = torch.ones(2)
    strategy = Do(source)
    source.zero_()
    assert value(strategy, torch.zeros(2)).tolist() == [1.0, 1.0]
    learned = Do(nn.Parameter(torch.zeros(2)))
    value(learned, torch.zeros(2)).sum().backward()
    assert learned.constant.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("label", [torch.bool, torch.int64, torch.float32])
def test_labels_are_read_from_the_same_row(batch, dtype, label):
    concepts, labels = torch.rand(*batch, 3, dtype=dtype), torch.randint(0, 2, (*batch, 3)).to(label)
    got = value(GroundTruth("labels"), concepts, labels=labels)
    assert torch.equal(got, labels.to(dtype))
    logits = value(GroundTruth("labels", space="logits"), concepts, labels=labels)
    torch.testing.assert_close(logits.float(), (labels.float() * 2 - 1) * 9.21, atol=0.05, rtol=0)
    assert logits.dtype is dtype


def test_a_ground_truth_of_one_is_not_the_logit_one():
    """The sigmoid of the logit 1 is .731, that of the logit 0 is .5."""
    got = value(GroundTruth("y", space="logits"), torch.zeros(2), y=torch.tensor([1, 0])).sigmoid()
    assert got.tolist() == pytest.approx([1.0, 0.0], abs=2 * EPS)


def test_soft_labels():
    got = value(GroundTruth("y", space="logits"), torch.zeros(2), y=torch.tensor([0.25, 0.75]))
    assert got.sigmoid().tolist() == pytest.approx([0.25, 0.75])


def test_the_space_of_the_model_is_the_default():
    labels = {"y": torch.tensor([1.0])}
    assert value(GroundTruth("y").bind(Splice(space="logits")), torch.zeros(1), **labels).item() > 9
    assert value(GroundTruth("y").bind(Splice(space="probs")), torch.zeros(1), **labels).item() == 1
    assert value(GroundTruth("y"), torch.zeros(1), **labels).item() == 1
    with pytest.raises(BadValue, match="space='logits'"):
        GroundTruth("y", space="probs").bind(Splice(space="logits"))
    with pytest.raises(BadValue, match="space='probs'"):
        GroundTruth("y", space="logits").bind(Splice(space="probs"))


def test_states_become_one_hot_columns():
    states = torch.tensor([[1, 2, 0], [0, 0, 1]])
    expected = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    for space in (None, "probs", "onehot"):
        got = value(GroundTruth("y", space=space).bind(GROUPED), torch.zeros(2, 5), y=states)
        assert got.tolist() == expected
    columns = torch.tensor(expected)
    assert value(GroundTruth("y").bind(GROUPED), torch.zeros(2, 5), y=columns).tolist() == expected
    one = value(GroundTruth("y", space="onehot"), torch.zeros(2, 4), y=torch.tensor([3, 0]))  # one concept of 4 states
    assert one.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    logits = value(GroundTruth("y", space="logits").bind(GROUPED), torch.zeros(2, 5), y=states)
    torch.testing.assert_close(logits[:, 1:4].softmax(-1), columns[:, 1:4].float(), atol=3 * EPS, rtol=0)


def test_a_nan_label_is_written_as_it_is():
    got = value(GroundTruth("y"), torch.zeros(2), y=torch.tensor([math.nan, 1.0]))
    assert got[0].isnan()
    assert got[1] == 1


@pytest.mark.parametrize("space", ["probs", "logits", "onehot"])
def test_a_label_that_is_not_known_is_nan(space):
    splice = Splice(cardinalities=(1, 3, 1))
    truth = GroundTruth("y", space=space, missing=-1).bind(splice)
    got = value(truth, torch.zeros(2, 5), y=torch.tensor([[1, -1, 0], [-1, 2, 1]]))
    assert got.isnan().int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    floats = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 2.0, 1.0]])
    assert torch.equal(
        value(GroundTruth("y", space=space).bind(splice), torch.zeros(2, 5), y=floats).nan_to_num(7.0),
        got.nan_to_num(7.0),
    )


def test_continuous_concepts_are_written_as_they_are():
    splice = Splice(cardinalities=(1, 1, 3), kinds=("binary", "continuous", "categorical"), space="logits")
    got = value(GroundTruth("y").bind(splice), torch.zeros(5), y=torch.tensor([1.0, -37.5, 2.0]))
    assert got[:2].tolist() == pytest.approx([9.21, -37.5], abs=0.01)
    assert got[2:].argmax() == 2
    assert value(GroundTruth("y", "continuous"), torch.zeros(2), y=torch.tensor([-5.0, 9.0])).tolist() == [-5.0, 9.0]
    with pytest.raises(BadValue, match="2 to 2"):
        value(GroundTruth("y").bind(splice), torch.zeros(5), y=torch.tensor([2.0, 0.0, 0.0]))


def test_do_with_states():
    splice = Splice(cardinalities=(1, 3))
    assert value(Do([1, 2], space="onehot").bind(splice), torch.zeros(2, 4)).tolist() == [[1, 0, 0, 1]] * 2
    assert value(Do([1, 2], space="probs").bind(splice), torch.zeros(2, 4)).tolist() == [[1, 0, 0, 1]] * 2
    assert value(Do([math.nan, 0.25]), torch.zeros(2)).isnan().tolist() == [True, False]
    assert Do([math.nan]).misses
    assert not Do(1.0).misses


def test_it_compiles_and_maps():
    strategy = GroundTruth("y", space="logits")
    concepts, y = torch.rand(4, 3), torch.randint(0, 2, (4, 3))
    expected = value(strategy, concepts, y=y)
    compiled = torch.compile(strategy, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TensorDict({"concepts": concepts, "y": y}, [4]))["intervention", "value"], expected)
    assert torch.equal(torch.vmap(lambda c, t: value(strategy, c, y=t))(concepts, y), expected)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Do("one"), BadType, "'one'"),
        (lambda: Do([[1.0], [1.0, 2.0]]), BadType, "number"),
        (lambda: Do(None), BadType, "None"),
        (lambda: Do(1.0, space="prob"), BadValue, "'prob'"),
        (lambda: Do(-1.0, space="probs"), BadValue, "-1.0"),
        (lambda: GroundTruth("y", missing="no"), BadType, "no"),
        (lambda: Do(3.0, space="logits"), BadValue, "3.0"),
        (lambda: GroundTruth("y", space="prob"), BadValue, "'prob'"),
        (lambda: GroundTruth(None), BadKey, "None"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize(
    ("strategy", "entries", "error", "text"),
    [
        (Do([0.0, 1.0]), {}, BadValue, r"\[2\]"),
        (Do(torch.zeros(2, 2, 3)), {}, BadValue, r"\[2, 2, 3\]"),
        (GroundTruth("labels"), {"label": torch.zeros(2, 3)}, BadKey, "did you mean 'label'"),
        (GroundTruth("y"), {"y": torch.zeros(2, 4)}, BadValue, r"\[2, 4\]"),
        (GroundTruth("y"), {"y": torch.zeros(2, 1)}, BadValue, r"\[2, 1\]"),
        (GroundTruth("y"), {"y": torch.zeros(2)}, BadValue, r"\[2\]"),
        (GroundTruth("y"), {"y": torch.full((2, 3), -1)}, BadValue, "-1 to -1"),
        (GroundTruth("y", space="logits"), {"y": torch.full((2, 3), 2)}, BadValue, "2 to 2"),
        (GroundTruth("y", space="onehot"), {"y": torch.tensor([[3], [0]])}, BadValue, "0 to 2"),
        (GroundTruth("y", space="onehot"), {"y": torch.zeros(2, 2).long()}, BadValue, r"\[2, 1\] states or \[2, 3\]"),
    ],
)
def test_bad_calls(strategy, entries, error, text):
    with pytest.raises(error, match=text):
        value(strategy, torch.zeros(2, 3), **entries)


def test_where_no_label_is_known_all_keep_their_prediction():
    td = TensorDict({"concepts": torch.rand(2, 3), "y": torch.full((2, 3), math.nan)}, [2])
    expected = td["concepts"].clone()
    InterventionPipeline(UniformPolicy(), GroundTruth("y"))(td)
    assert torch.equal(td["concepts"], expected)
    assert not td["intervention", "mask"].any()


def test_the_truth_of_a_continuous_concept_is_any_number():
    splice = Splice(cardinalities=(1, 1), kinds=("binary", "continuous"))
    td = TensorDict({"concepts": torch.zeros(2, 2), "y": torch.tensor([[1.0, 5.0], [0.0, -3.0]])}, [2])
    expected = td["y"].clone()
    assert torch.equal(InterventionPipeline(UniformPolicy(), GroundTruth("y"), splice)(td)["concepts"], expected)


def test_labels_that_are_no_tensor():
    td = TensorDict({"concepts": torch.zeros(2, 2), "labels": ["yes", "no"]}, [2])
    with pytest.raises(BadType, match="the labels are no tensor"):
        GroundTruth("labels")(td)


def test_states_where_columns_are_needed_name_the_way_out():
    with pytest.raises(BadValue, match='space="onehot"'):
        Do([1.0, 2.0]).bind(Splice(cardinalities=(1, 3)))(concepts=torch.zeros(4))
