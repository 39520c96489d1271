"""The stages: what a policy or strategy is, and the replacement with its gradients."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.stages import CallableStage, ConceptStage, ReplaceStage
from tdconcepts.interventions.strategies import Do


def given(concepts, mask, value, **more):
    entries = {"mask": torch.as_tensor(mask), "value": torch.as_tensor(value)}
    return TensorDict({"concepts": concepts, "intervention": entries, **more}, concepts.shape[:-1])


class Weighted(ConceptStage):
    """A learned policy: reads a second entry, has parameters."""

    writes = "score"

    def __init__(self):
        self.columns = 3
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def reads(self, splice):
        return [("costs", "each")]

    def compute(self, concepts, tensordict):
        return concepts * self.weight / tensordict["costs", "each"]


def test_a_stage_of_ones_own():
    stage = Weighted()
    assert (stage.in_keys, stage.out_keys) == (["concepts", ("costs", "each")], [("intervention", "score")])
    bound = stage.bind(Splice(("agents", "c"), out_key="swap"))
    assert (bound.in_keys, bound.out_keys) == ([("agents", "c"), ("costs", "each")], [("swap", "score")])
    assert stage.in_keys[0] == "concepts"  # the one that was bound is as before
    td = TensorDict({"agents": {"c": torch.ones(2, 3)}, "costs": {"each": torch.full((2, 3), 2.0)}}, [2])
    assert bound(td)["swap", "score"].tolist() == [[0.5] * 3] * 2
    assert bound.weight is stage.weight  # shared, so that it can be learned
    assert len(list(bound.parameters())) == 1


def test_bound_copies_have_modules_of_their_own():
    stage = Weighted()
    bound = stage.bind(Splice("c"))
    bound.extra = nn.Linear(1, 1)
    assert not list(stage.children())


def test_stages_see_detached_concepts():
    seen = []
    stage = CallableStage(lambda c, td: seen.append(c.requires_grad) or c, "value")
    stage(TensorDict({"concepts": torch.ones(2, requires_grad=True)}))
    assert seen == [False]


@pytest.mark.parametrize(("function", "expected"), [(lambda c, td: 0.5, 0.5), (lambda c, td: torch.tensor(0.5), 0.5)])
def test_callables_may_give_a_number(function, expected):
    out = CallableStage(function, "value")(concepts=torch.zeros(2, 3, dtype=torch.float64))
    assert out.tolist() == [[expected] * 3] * 2


def test_callables_see_the_tensordict():
    td = TensorDict({"concepts": torch.zeros(2), "donor": torch.ones(2)})
    assert CallableStage(lambda c, td: td["donor"], "value")(td)["intervention", "value"].tolist() == [1, 1]


def test_callables_that_give_nothing():
    with pytest.raises(BadType, match="NoneType"):
        CallableStage(lambda c, td: None, "score")(concepts=torch.zeros(2))


@pytest.mark.parametrize("known", [False, True])
def test_callables_that_give_another_width(known):
    model = TensorDictSequential(TensorDictModule(nn.Linear(3, 4), ["x"], ["concepts"]))
    names = [*"abcd"] if known else None
    td = TensorDict({"x": torch.zeros(2, 3)}, [2])
    for options in ({"policy": lambda c, td: torch.zeros(9)}, {"strategy": lambda c, td: torch.zeros(9)}):
        with pytest.raises(BadValue, match=r"\[9\]|differ in shape"):
            intervene(model, concepts=names, **{"strategy": Do(0.0), "k": 1} | options)(td.copy())


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("straight_through", [False, True])
def test_replace_is_where(batch, dtype, straight_through):
    concepts, mask = torch.rand(*batch, 3, dtype=dtype), torch.rand(*batch, 3) > 0.5
    value = torch.rand(*batch, 3, dtype=torch.float64)
    td = given(concepts, mask, value)
    stage = ReplaceStage(Splice(), straight_through=straight_through)
    assert stage(td) is td
    assert torch.equal(td["concepts"], torch.where(mask, value.to(dtype), concepts))
    assert td["concepts"].dtype is dtype
    assert td["intervention", "before"] is concepts
    assert td["intervention", "value"] is value


def test_no_gradient_reaches_a_replaced_value():
    concepts = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    td = ReplaceStage(Splice())(given(concepts, [True, False, True], [1.0, 1.0, 0.0]))
    (td["concepts"] * torch.tensor([2.0, 3.0, 4.0])).sum().backward()
    assert concepts.grad.tolist() == [0.0, 3.0, 0.0]


def test_straight_through_gives_it_the_gradient_of_what_replaced_it():
    concepts = torch.tensor([0.1, 0.2, math.nan], requires_grad=True)
    value = torch.tensor([1.0, 1.0, 0.5], requires_grad=True)
    td = ReplaceStage(Splice(), straight_through=True)(given(concepts, [True, False, True], value))
    assert td["concepts"].tolist() == pytest.approx([1.0, 0.2, 0.5])
    (td["concepts"] ** 2).sum().backward()
    assert concepts.grad.tolist() == pytest.approx([2.0, 0.4, 0.0])  # what is not finite gets none
    assert value.grad.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("straight_through", [False, True])
def test_what_is_not_finite_stays_where_it_is(bad, straight_through):
    """A NaN label in an untouched column and a NaN prediction that is replaced: neither leaks."""
    concepts = torch.tensor([bad, 0.25, 0.5], requires_grad=True)
    value = torch.tensor([1.0, bad, bad], requires_grad=True)
    td = ReplaceStage(Splice(), straight_through=straight_through)(given(concepts, [True, False, False], value))
    assert td["concepts"].tolist() == [1.0, 0.25, 0.5]
    td["concepts"].square().sum().backward()
    assert concepts.grad[1:].tolist() == [0.5, 1.0]
    assert concepts.grad[0] == 0
    assert value.grad.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("td", "error", "text"),
    [
        (TensorDict({"concept": torch.zeros(2)}), BadKey, "did you mean 'concept'"),
        (given(torch.zeros(2), [True, False], [0.0, 0.0]).exclude(("intervention", "mask")), BadKey, "'mask'"),
        (given(torch.zeros(2), [1.0, 0.0], [0.0, 0.0]), BadType, "float32"),
        (given(torch.zeros(2), [True], [0.0, 0.0]), BadValue, r"mask \[1\], value \[2\]"),
        (given(torch.zeros(2), [True, False], [0.0]), BadValue, r"value \[1\]"),
        (TensorDict({"concepts": torch.zeros(2)}, [2]), BadValue, "no columns"),
        (given(torch.zeros(2), [True, False], [0.0, 0.0]).lock_(), BadValue, "locked"),
    ],
)
def test_bad_entries_leave_the_tensordict_alone(td, error, text):
    before = td.clone()
    with pytest.raises(error, match=text):
        ReplaceStage(Splice())(td)
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    assert (td == before).all()


def test_bound_copies_have_buffers_of_their_own():
    strategy = Do(0.1)
    bound = strategy.bind(Splice()).half()
    assert bound.constant.dtype is torch.float16
    assert strategy.constant.dtype is torch.float32


def test_a_prediction_that_is_not_finite_is_no_gradient_of_its_score():
    scorer = nn.Linear(3, 3, bias=False)
    concepts = torch.tensor([[math.nan, 0.2, math.inf]])
    score = scorer(torch.ones(1, 3))
    td = given(concepts, [[True, False, True]], [[1.0, 1.0, 1.0]]).set(("intervention", "score"), score)
    ReplaceStage(Splice(), temperature=1.0)(td)
    assert td["concepts"].tolist() == [[1.0, pytest.approx(0.2), 1.0]]
    td["concepts"].sum().backward()
    assert scorer.weight.grad.isfinite().all()
    assert scorer.weight.grad.any()


def test_a_choice_by_softmax_is_one_between_concepts_not_columns():
    """d/ds sum_j softmax(s / T)_j (value - c)_j, where the columns of a concept share its weight."""
    score = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5], requires_grad=True)
    concepts, value = torch.full((5,), 0.25), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    td = given(concepts, [True] * 5, value).set(("intervention", "score"), score)
    ReplaceStage(Splice(cardinalities=(1, 3, 1)), temperature=2.0)(td)
    (td["concepts"] * torch.arange(5.0)).sum().backward()
    units = score.detach()[[0, 1, 4]].requires_grad_()
    weights = (units / 2).softmax(-1)[[0, 1, 1, 1, 2]]
    (weights * (value - concepts) * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(score.grad[[0, 1, 4]], units.grad)


def test_a_function_that_takes_something_else():
    for function in (lambda concepts: concepts, lambda: 0.0, 3.0):
        with pytest.raises(BadType, match=r"(?s)not a score.*a function \(concepts, td\)"):
            CallableStage(function, "score")
    assert CallableStage(torch.maximum, "score").function is torch.maximum  # no signature is known


def test_a_stage_without_a_formula():
    class Nothing(ConceptStage):
        pass

    with pytest.raises(BadType, match=r"(?s)Nothing computes nothing.*compute"):
        Nothing()(concepts=torch.zeros(2))
