"""Spaces: what a label is written as, and what is not known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts.errors import BadValue
from tdconcepts.interventions.spaces import EPS, as_space, check_range, known_places, spread, to_logits, written
from tdconcepts.interventions.splice import Splice

MIXED = Splice(cardinalities=(1, 3, 1), kinds=("binary", "categorical", "continuous"))


@given(st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_to_logits_is_what_the_sigmoid_takes_back(p, dtype):
    got = to_logits(torch.tensor([p], dtype=dtype)).sigmoid().item()
    assert got == pytest.approx(min(max(p, EPS), 1 - EPS), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_certain_probabilities_have_finite_logits_in_any_dtype(dtype):
    logits = to_logits(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
    assert logits.dtype is dtype
    assert logits.float().tolist() == pytest.approx([-9.21, 0.0, 9.21], abs=0.05)


def test_to_logits_of_categorical_concepts_is_what_the_softmax_takes_back():
    probs = torch.tensor([[0.7, 0.0, 1.0, 0.0, 0.2], [0.1, 0.2, 0.3, 0.5, 0.9]])
    logits = to_logits(probs, (1, 3, 1))
    torch.testing.assert_close(logits[:, [0, 4]].sigmoid(), probs[:, [0, 4]])
    torch.testing.assert_close(logits[:, 1:4].softmax(-1), probs[:, 1:4], atol=3 * EPS, rtol=0)


@pytest.mark.parametrize("space", [None, "probs", "logits", "onehot", "continuous"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_space_and_dtype(space, dtype):
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0, -2.5]])
    got = written(labels, torch.zeros(1, 5, dtype=dtype), MIXED, space)
    assert got.dtype is dtype
    assert got[0, 4] == -2.5  # a continuous concept's number, in every space
    if space == "logits":
        assert got[0, 0].float().sigmoid() == pytest.approx(1, abs=2 * EPS)
        assert got[0, 1:4].float().softmax(-1).tolist() == pytest.approx([0, 0, 1], abs=3 * EPS)
    else:
        assert torch.equal(got, labels.to(dtype))


def test_soft_columns_become_the_most_probable_state():
    soft = torch.tensor([[0.5, 0.2, 0.5, 0.3, 7.0], [0.49, 0.6, 0.4, 0.0, -1.0]])
    assert written(soft, torch.zeros(2, 5), MIXED, "onehot").tolist() == [[1, 0, 1, 0, 7], [0, 1, 0, 0, -1]]


def test_states_as_numbers_of_any_kind():
    for states in (torch.tensor([[1, 2, -3]]), torch.tensor([[1.0, 2.0, -3.0]])):
        assert written(states, torch.zeros(1, 5), MIXED, "probs").tolist() == [[1, 0, 0, 1, -3]]
    unknown = written(torch.tensor([[math.nan, math.nan, 1.0]]), torch.zeros(1, 5), MIXED, "logits")
    assert unknown.isnan().tolist() == [[True, True, True, True, False]]
    assert spread(torch.tensor(2), torch.zeros(3), (3,)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([[1.0, 3.0, 0.0]]), "the states of concept 1 do not exist"),
        (torch.tensor([[1.0, 0.5, 0.0]]), "no whole numbers"),
        (torch.tensor([[2.0, 0.0, 0.0]]), "concept 0"),
        (torch.tensor([[0.0, 0.0, 0.0, 1.5, 0.0]]), "0 to 1.5"),
        (torch.tensor([[math.nan, -1.0, 0.0, 0.0, 0.0]]), "-1 to 0"),
        (torch.zeros(1, 4), r"\[1, 3\] states or \[1, 5\] columns"),
    ],
)
def test_labels_that_are_none(labels, text):
    with pytest.raises(BadValue, match=text):
        written(labels, torch.zeros(1, 5), MIXED, "probs")


def test_mixed_kinds_are_one_graph():
    splice = Splice(cardinalities=(1, 3, 1), kinds=("binary", "categorical", "continuous"))
    labels = torch.tensor([[1.0, 2.0, 7.5], [math.nan, 0.0, -3.0]])

    def write(labels):
        return written(labels, torch.zeros(2, 5), splice, "logits")

    compiled = torch.compile(write, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(labels), write(labels), equal_nan=True)
    torch.testing.assert_close(
        torch.vmap(lambda x: written(x, torch.zeros(5), splice, "logits"))(labels), write(labels), equal_nan=True
    )
    with pytest.raises(BadValue, match="concept 0"):
        write(labels + 1)


def test_the_concept_is_named():
    named = Splice(names=("wing", "colour"), cardinalities=(1, 3))
    with pytest.raises(BadValue, match="the states of concept 'colour' do not exist"):
        written(torch.tensor([[1, 3]]), torch.zeros(1, 4), named, "probs")


def test_unknown_spaces():
    with pytest.raises(BadValue, match="'prob'"):
        as_space("prob")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_where_there_is_a_value(dtype):
    assert known_places(torch.tensor([1, 0])) is None
    assert known_places(torch.rand(3, 4).to(dtype)) is None
    assert known_places(torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype)).all()
    assert known_places(torch.tensor([math.inf, math.nan, 1.0], dtype=dtype)).tolist() == [True, False, True]
    assert known_places(torch.full((4, 40000), 60000.0).to(dtype)) is None  # a sum that overflows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_no_probability_is_seen_whatever_its_bits(dtype):
    small, above = torch.finfo(dtype).smallest_normal / 2, 1 + torch.finfo(dtype).eps
    fine = torch.tensor([[0.0, -0.0, small], [0.5, 1.0, 1 - torch.finfo(dtype).eps]], dtype=dtype)
    assert check_range(fine, 0, 1, "wrong")
    assert check_range(fine.T, 0, 1, "wrong")
    assert check_range(fine[:, 1:], 0, 1, "wrong")
    assert check_range(fine.clone().requires_grad_(), 0, 1, "wrong")
    for wrong in (above, 2.0, math.inf, -small, -1.0, -math.inf, 255.0):
        for place in range(6):
            labels = fine.clone().flatten().index_fill(0, torch.tensor(place), wrong)
            with pytest.raises(BadValue, match="wrong"):
                check_range(labels, 0, 1, "wrong")
    for unknown in (math.nan, -math.nan):
        assert not check_range(fine.clone().index_fill(1, torch.tensor(0), unknown), 0, 1, "wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_labels_none_is_known(dtype):
    assert not check_range(torch.full((2, 3), math.nan, dtype=dtype), 0, 1, "wrong")
