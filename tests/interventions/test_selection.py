"""The selection: exactly k, high first, ties by index, whole concepts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.interventions.selection import SelectStage, top_mask
from tdconcepts.interventions.stages import Splice

NAMED = Splice(names=("wing", "colour", "beak"), cardinalities=(1, 3, 1))
SCORES = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 0.5, 3.0, math.inf, math.nan])


def slow(row, k):
    """The definition: sort by score, then by index; NaN is below everything."""
    values = [-math.inf if math.isnan(v) else v for v in map(float, row)]
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return [i in chosen for i in range(len(values))]


@given(
    st.integers(1, 7).flatmap(
        lambda n: st.tuples(st.lists(st.lists(SCORES, min_size=n, max_size=n), max_size=4), st.integers(0, n))
    )
)
def test_top_mask_is_the_definition(case):
    rows, k = case
    if not rows:
        return
    score = torch.tensor(rows)
    expected = torch.tensor([slow(row, k) for row in rows])
    assert torch.equal(top_mask(score, k), expected)
    assert torch.equal(torch.vmap(lambda row: top_mask(row, k))(score), expected)  # the path without numpy
    assert torch.equal(top_mask(score.to(torch.bfloat16), k), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool]
)
def test_any_dtype(dtype):
    score = torch.randint(0, 2, (40, 9)).to(dtype)
    for k in (0, 1, 4, 9):
        assert torch.equal(top_mask(score, k), torch.tensor([slow(row, k) for row in score]))


def test_the_score_is_not_changed():
    score = torch.tensor([[1.0, math.nan, math.inf]])
    before = score.clone()
    top_mask(score, 2)
    assert torch.equal(score.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 112])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
@pytest.mark.parametrize("ties", [True, False])
def test_a_fraction_is_a_fraction(n, fraction, ties):
    """Not 1 + floor(fraction (n - 1)), as torch_concepts' quantile has it, and no more where scores tie."""
    score = torch.zeros(5, n) if ties else torch.rand(5, n)
    mask = SelectStage(Splice(), fraction=fraction).mask(score)
    assert mask.sum(-1).tolist() == [round(fraction * n)] * 5


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 0, 4), (2, 3, 4), (3, 0)])
def test_any_batch(shape):
    td = TensorDict({("intervention", "score"): torch.rand(shape)}, shape[:-1])
    stage = SelectStage(Splice(), fraction=0.5)
    assert stage(td) is td
    mask = td["intervention", "mask"]
    assert mask.shape == shape
    assert mask.dtype is torch.bool
    assert (mask.sum(-1) == shape[-1] // 2).all()


@pytest.mark.parametrize(("among", "expected"), [([3, 1], [0, 1, 0, 0, 0]), ([0, 2, 4], [0, 0, 1, 0, 0])])
def test_candidates_by_index(among, expected):
    score = torch.tensor([[9.0, 5.0, 9.5, 4.0, 1.0]])
    stage = SelectStage(Splice(), k=1, among=among)
    assert stage.mask(score).int().tolist() == [expected]
    assert SelectStage(Splice(), fraction=0.5, among=range(4)).mask(score).int().tolist() == [[1, 0, 1, 0, 0]]


def test_a_categorical_concepts_columns_are_chosen_together():
    """Its score is the largest of its columns; no single state of a one-hot block is replaced."""
    score = torch.tensor([[0.3, 0.0, 0.9, 0.1, 0.2], [0.3, 0.0, 0.1, 0.1, 0.2]])
    assert SelectStage(NAMED, k=1).mask(score).int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert SelectStage(NAMED, k=2).mask(score).int().tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 1]]
    assert SelectStage(NAMED, among=["colour"]).mask(score).int().tolist() == [[0, 1, 1, 1, 0]] * 2
    assert SelectStage(NAMED, k=1, among=["beak", "wing"]).mask(score).int().tolist() == [[1, 0, 0, 0, 0]] * 2


def test_ties_between_candidates_go_by_the_index_of_the_concept_not_by_the_order_in_among():
    splice = Splice(names=("a", "b", "c"), cardinalities=(1, 1, 1))
    assert SelectStage(splice, k=1, among=["c", "a"]).mask(torch.zeros(3)).tolist() == [True, False, False]


def test_it_compiles_in_one_graph_and_maps():
    score = torch.randint(0, 4, (6, 5)).float()
    for stage in (
        SelectStage(Splice(), k=2),
        SelectStage(NAMED, fraction=0.5),
        SelectStage(Splice(), k=1, among=[2, 4]),
    ):
        expected = stage.mask(score)
        compiled = torch.compile(stage.mask, fullgraph=True, backend="eager")
        assert torch.equal(compiled(score), expected)
        assert torch.equal(torch.vmap(stage.mask)(score), expected)


def test_candidates_are_no_state_and_follow_the_scores():
    stage = SelectStage(NAMED, among=["wing", "colour"])
    assert not stage.state_dict()
    assert stage.mask(torch.zeros(2, 5, device="meta")).device.type == "meta"  # built here, used where the model is


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"fraction": 1.5}, BadValue, "1.5"),
        ({"fraction": -0.1}, BadValue, "-0.1"),
        ({"fraction": math.nan}, BadValue, "nan"),
        ({"fraction": True}, BadValue, "True"),
        ({"fraction": "half"}, BadValue, "half"),
        ({"k": -1}, BadValue, "-1"),
        ({"k": 2.0}, BadValue, "2.0"),
        ({"k": True}, BadValue, "True"),
        ({"k": 4}, BadValue, "0 to 3"),
        ({"k": 2, "among": ["wing"]}, BadValue, "0 to 1"),
        ({"k": 1, "fraction": 0.5}, BadValue, "twice"),
        ({"among": []}, BadValue, r"\[\]"),
        ({"among": "wing"}, BadValue, "'wing'"),
        ({"among": [True, False, True]}, BadValue, "True"),
        ({"among": [0, 3]}, BadValue, "0 to 3 - 1"),
        ({"among": [-1]}, BadValue, "-1"),
        ({"among": ["wing", 0]}, BadValue, "twice"),
        ({"among": ["color"]}, BadKey, "did you mean 'colour'"),
    ],
)
def test_bad_builds(arguments, error, text):
    with pytest.raises(error, match=text):
        SelectStage(NAMED, **arguments)


def test_names_where_none_are_known():
    with pytest.raises(BadKey, match="ConceptSpec"):
        SelectStage(Splice(), among=["wing"])


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (SelectStage(Splice(), k=4), "k=4"),
        (SelectStage(Splice(), among=[0, 3]), "index 3"),
        (SelectStage(NAMED), r"\[\*B, 5\]"),
    ],
)
def test_scores_of_another_width(stage, text):
    with pytest.raises(BadValue, match=text):
        stage.mask(torch.zeros(2, 3))
