"""The selection: exactly k, high first, ties by index, whole concepts."""

import math

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions.selection import SelectStage
from tdconcepts.interventions.splice import Splice

NAMED = Splice(names=("wing", "colour", "beak"), cardinalities=(1, 3, 1))


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


BIRD = Splice(
    names=("wing", "colour", "beak", "eye"),
    cardinalities=(1, 3, 1, 1),
    groups=(("head", ("beak", "eye")), ("body", ("wing",))),
)


def test_candidates_by_group():
    score = torch.tensor([0.1, 0.0, 0.9, 0.1, 0.8, 0.2])
    assert SelectStage(BIRD, among=["head"]).mask(score).int().tolist() == [0, 0, 0, 0, 1, 1]
    assert SelectStage(BIRD, k=1, among=["head", "wing"]).mask(score).int().tolist() == [0, 0, 0, 0, 1, 0]
    with pytest.raises(BadKey, match="'head'"):
        SelectStage(BIRD, among=["heads"])
    with pytest.raises(BadValue, match="twice"):
        SelectStage(BIRD, among=["head", "eye"])


def test_groups_are_chosen_whole():
    """Units: body (wing), colour, head (beak and eye); the score is the largest in it."""
    score = torch.tensor([0.5, 0.0, 0.3, 0.1, 0.2, 0.4])
    for select, expected in (
        ({"k": 1}, [1, 0, 0, 0, 0, 0]),
        ({"k": 2}, [1, 0, 0, 0, 1, 1]),
        ({"fraction": 1 / 3, "among": ["colour", "head"]}, [0, 0, 0, 0, 1, 1]),
        ({"budget": 3, "cost": {"body": 2, "colour": 1, "head": 5}}, [1, 1, 1, 1, 0, 0]),
    ):
        assert SelectStage(BIRD, by="group", **select).mask(score).int().tolist() == expected
    with pytest.raises(BadValue, match="no groups"):
        SelectStage(NAMED, by="group")
    with pytest.raises(BadValue, match="two groups"):
        SelectStage(
            Splice(names=("a", "b"), cardinalities=(1, 1), groups=(("g", ("a", "b")), ("h", ("b",)))), by="group"
        )
    with pytest.raises(BadKey, match="'head'"):
        SelectStage(BIRD, by="group", among=["beak"])


def test_candidates_of_each_row():
    """k of the row's own candidates, a fraction of their number; fewer candidates than k are all taken."""
    may = torch.tensor([[True, True, True, False], [False, False, True, True], [False] * 4, [True] * 4])
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(4, 4)

    def mask(**select):
        td = TensorDict({("intervention", "score"): score, ("who", "may"): may}, [4])
        stage = SelectStage(Splice(), candidates=("who", "may"), **select)
        assert stage.in_keys == [("intervention", "score"), ("who", "may")]
        return stage(td)["intervention", "mask"].int().tolist()

    assert mask() == may.int().tolist()
    assert mask(k=1) == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert mask(k=3) == [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert mask(fraction=0.5) == [[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]  # round(1.5) = 2
    assert mask(k=1, among=[0, 1]) == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert mask(budget=1.5) == mask(k=1)


def test_candidates_of_each_row_for_concepts_of_several_columns():
    score = torch.tensor([[0.1, 0.0, 0.9, 0.1, 0.2]] * 2)
    by_concept = torch.tensor([[True, False, True], [True, True, True]])
    by_column = by_concept[:, [0, 1, 1, 1, 2]]
    for may in (by_concept, by_column):
        mask = SelectStage(NAMED, k=1, candidates="may").mask(score, may)
        assert mask.int().tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 0]]
    with pytest.raises(BadValue, match=r"\[2, 4\]"):
        SelectStage(NAMED, candidates="may").mask(score, torch.ones(2, 4, dtype=torch.bool))
    td = TensorDict({("intervention", "score"): score, "may": by_concept.float()}, [2])
    with pytest.raises(BadType, match="float32"):
        SelectStage(NAMED, candidates="may")(td)
    with pytest.raises(BadKey, match="'may'"):
        SelectStage(NAMED, candidates="may")(td.exclude("may"))


def test_a_budget_by_names_and_by_order():
    score = torch.tensor([0.9, 0.0, 0.8, 0.1, 0.7])
    for cost in ([1.0, 5.0, 2.0], {"beak": 2.0, "wing": 1.0, "colour": 5.0}, torch.tensor([1.0, 5.0, 2.0])):
        assert SelectStage(NAMED, budget=3, cost=cost).mask(score).int().tolist() == [1, 0, 0, 0, 1]
    assert SelectStage(NAMED, budget=0).mask(score).sum() == 0
    assert SelectStage(NAMED, budget=2).mask(score).int().tolist() == [1, 1, 1, 1, 0]  # 1 each
    free = SelectStage(Splice(), budget=0, cost=[0, 1, 0, 1, 0]).mask(score)
    assert free.int().tolist() == [1, 0, 1, 0, 1]


def test_a_probability_for_each_concept_draws_whole_concepts():
    stage = SelectStage(NAMED, probability=[0.0, 0.5, 1.0], generator=torch.Generator().manual_seed(0))
    mask = stage.mask(torch.zeros(2000, 5))
    assert not mask[:, 0].any()
    assert mask[:, 4].all()
    assert torch.equal(mask[:, 1], mask[:, 3])
    assert abs(mask[:, 1].float().mean() - 0.5) < 0.034  # 3 standard errors
    some = SelectStage(NAMED, probability=1.0, among=["beak"]).mask(torch.zeros(5))
    assert some.int().tolist() == [0, 0, 0, 0, 1]


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
        ({"budget": -1}, BadValue, "-1"),
        ({"budget": True}, BadValue, "True"),
        ({"cost": [1, 2, 3]}, BadValue, "budget="),
        ({"budget": 1, "cost": [1, 2]}, BadValue, "2 costs"),
        ({"budget": 1, "cost": [1, 2, -3]}, BadValue, "-3"),
        ({"budget": 1, "cost": {"wing": 1}}, BadKey, "'colour'"),
        ({"budget": 1, "cost": {"wings": 1}}, BadKey, "did you mean 'wing'"),
        ({"budget": 1, "k": 1}, BadValue, "twice"),
        ({"probability": 1.5}, BadValue, "1.5"),
        ({"probability": [0.5, 0.5]}, BadValue, "2 probabilities"),
        ({"probability": "half"}, BadValue, "half"),
        ({"generator": torch.Generator()}, BadValue, "probability="),
        ({"probability": 0.5, "generator": 3}, BadType, "manual_seed"),
        ({"by": "row"}, BadValue, "'row'"),
        ({"amongst": [0]}, BadType, "did you mean 'among'"),
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


def test_halves_of_the_candidates_go_to_the_even_number_as_halves_of_all_do():
    may = torch.arange(8) < torch.tensor([[1], [3], [5], [7]])
    stage = SelectStage(Splice(), fraction=0.5, candidates="may")
    td = TensorDict({"may": may, "intervention": {"score": torch.zeros(4, 8)}}, [4])
    assert stage(td)["intervention", "mask"].sum(-1).tolist() == [round(n / 2) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]


@pytest.mark.parametrize("select", [{"k": 2}, {}, {"fraction": 0.5, "among": [0, 1]}])
def test_only_in_training_is_never_at_evaluation(select):
    stage = SelectStage(Splice(), only_training=True, **select)
    td = TensorDict({"intervention": {"score": torch.rand(3, 4)}}, [3])
    assert stage(td.copy())["intervention", "mask"].any()
    assert not stage.eval()(td.copy())["intervention", "mask"].any()
    assert not stage.is_everything(4)
