"""Greedy selection: one at a time, scored anew, as a slow loop does it."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target
from tdconcepts.interventions.influence import ExpectedInfluencePolicy, GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import UncertaintyPolicy
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do, GroundTruth

TARGET = Target("logits", 1)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    head[0].weight.data *= 6  # far from linear, so that a correction changes what matters next
    return TensorDictSequential(
        Mod(nn.Sequential(nn.Linear(6, 5), nn.Sigmoid()), ["x"], ["concepts"]), Mod(head, ["concepts"], ["logits"])
    ).to(dtype)


def data(*batch, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return TensorDict(
        {
            "x": torch.randn(*batch, 6, generator=g, dtype=dtype),
            "labels": torch.randint(0, 2, (*batch, 5), generator=g),
            "may": torch.rand(*batch, 5, generator=g) < 0.6,
        },
        batch,
    )


def slow(model, td, k, costs=None, budget=None):
    """Row by row: gradient at the corrected concepts, the largest one that is left (and can be paid for)."""
    orders, masks, scores = [], [], []
    for row in range(len(td)):
        concepts = model[0](td[row].clone())["concepts"].detach()
        left, order, score = budget, [-1] * 5, [0.0] * 5
        for step in range(k):
            point = concepts.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model[1].module(point)[1], point)
            score = [abs(gradient[i].item()) if order[i] < 0 else score[i] for i in range(5)]
            open_ = [i for i in range(5) if order[i] < 0 and (budget is None or costs[i] <= left + 1e-9)]
            if not open_:
                break
            best = max(open_, key=lambda i: (abs(gradient[i].item()), -i))
            order[best] = step
            left = None if budget is None else left - costs[best]
            concepts[best] = td["labels"][row, best].to(concepts)
        orders.append(order)
        masks.append([place >= 0 for place in order])
        scores.append(score)
    return orders, masks, scores


def greedy(**select):
    return intervene(
        network(torch.float64), policy=GradientPolicy(TARGET), strategy=GroundTruth("labels"), sequential=True, **select
    )


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_it_is_the_slow_loop(k):
    td = greedy(k=k)(data(7, dtype=torch.float64))
    orders, masks, scores = slow(network(torch.float64), data(7, dtype=torch.float64), k)
    assert td["intervention", "order"].tolist() == orders
    assert td["intervention", "mask"].tolist() == masks
    if k:
        torch.testing.assert_close(td["intervention", "score"], torch.tensor(scores, dtype=torch.float64))
    shaped = greedy(k=k)(data(7, dtype=torch.float64).reshape(7, 1))
    assert shaped["intervention", "order"].squeeze(1).tolist() == orders


def test_a_budget_is_spent_step_by_step():
    costs = [1.0, 2.0, 0.5, 1.0, 3.0]
    td = greedy(budget=2.5, cost=costs)(data(7, dtype=torch.float64))
    orders, masks, _ = slow(network(torch.float64), data(7, dtype=torch.float64), 5, costs, 2.5)
    assert td["intervention", "order"].tolist() == orders
    assert td["intervention", "mask"].tolist() == masks


def test_scoring_anew_matters_and_scoring_once_is_not_it():
    td = greedy(k=3)(data(40, dtype=torch.float64))
    once = intervene(network(torch.float64), policy=GradientPolicy(TARGET), strategy=GroundTruth("labels"), k=3)(
        data(40, dtype=torch.float64)
    )
    assert not torch.equal(td["intervention", "mask"], once["intervention", "mask"])
    first = greedy(k=1)(data(40, dtype=torch.float64))["intervention", "mask"]
    assert torch.equal(first, td["intervention", "order"] == 0)


def test_the_first_n_of_an_order_are_n_corrections():
    order = greedy(k=5)(data(7, dtype=torch.float64))["intervention", "order"]
    for n in range(6):
        mask = greedy(k=n)(data(7, dtype=torch.float64))["intervention", "mask"]
        assert torch.equal(mask, (order >= 0) & (order < n))


def test_a_score_that_never_changes_makes_the_one_shot_selection():
    for select in ({"k": 3}, {"fraction": 0.4}, {"k": 2, "among": [0, 2, 4]}, {"fraction": 0.5, "candidates": "may"}):
        td = TensorDict({"concepts": torch.rand(6, 5), "may": data(6)["may"]}, [6])
        fixed_scores = lambda c, t: t["may"] * 0.0 + torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])  # noqa: E731
        masks = [
            InterventionPipeline(fixed_scores, Do(1.0), sequential=flag, **select)(td.copy())["intervention", "mask"]
            for flag in (True, False)
        ]
        assert torch.equal(*masks)


def test_candidates_missing_labels_and_categorical_concepts():
    splice = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))
    td = TensorDict(
        {"concepts": torch.full((3, 5), 1 / 3), "y": torch.tensor([[1, 2, 0], [1, -1, 0], [-1, -1, -1]])}, [3]
    )
    pipeline = InterventionPipeline(UncertaintyPolicy(), GroundTruth("y", missing=-1), splice, k=2, sequential=True)
    order = pipeline(td)["intervention", "order"]
    assert order.tolist() == [[1, 0, 0, 0, -1], [0, -1, -1, -1, 1], [-1] * 5]
    assert torch.equal(td["intervention", "mask"], order >= 0)


def test_only_training():
    fixed = greedy(k=2, only_training=True)
    assert fixed(data(3, dtype=torch.float64))["intervention", "mask"].sum() == 6
    assert fixed.eval()(data(3, dtype=torch.float64))["intervention", "mask"].sum() == 0


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
def test_any_batch(batch):
    assert greedy(k=2)(data(*batch, dtype=torch.float64))["intervention", "order"].shape == (*batch, 5)


@pytest.mark.parametrize("policy", [ExpectedInfluencePolicy(TARGET, change="value")])
def test_copies_compile_and_map(policy):
    fixed = intervene(network(), policy=policy, strategy=GroundTruth("labels"), k=2, sequential=True)
    td = fixed(data(5))
    for other in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(other(data(5))["logits"], td["logits"])
    torch._dynamo.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")(data(5))
    assert torch.equal(compiled["intervention", "order"], td["intervention", "order"])
    row = torch.vmap(lambda x, y: fixed(TensorDict({"x": x, "labels": y}))["intervention", "mask"])
    assert torch.equal(row(data(5)["x"], data(5)["labels"]), td["intervention", "mask"])


def test_its_stages():
    pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=2, sequential=True)
    assert list(pipeline.module) == ["value", "greedy", "replace"]
    assert isinstance(pipeline["greedy"].score, UncertaintyPolicy)
    assert ("intervention", "order") in pipeline.out_keys
    assert pipeline.in_keys == ["concepts"]
    with pytest.raises(BadValue, match="order"):
        InterventionPipeline(UncertaintyPolicy(), Do(1.0), probability=0.5, sequential=True)


@pytest.mark.parametrize(
    ("cost", "budget", "order"),
    [
        ([3.0, 1.0, 1.0], 4.0, [-1, 0, 1]),
        ([0.1, 0.1, 0.1], 0.3, [2, 0, 1]),
        ([0.0, 1.0, 1.0], 1.0, [1, 0, -1]),
        ([1.0, 2.0, 2.0], 3.0, [1, 0, -1]),
    ],
)
def test_what_costs_what_is_left_is_paid_for_and_no_more(cost, budget, order):
    scores = torch.tensor([1.0, 3.0, 2.0]).double()
    pipeline = InterventionPipeline(lambda c, td: scores, Do(1.0), sequential=True, budget=budget, cost=cost)
    td = pipeline(TensorDict({"concepts": torch.zeros(2, 3).double()}, [2]))
    assert td["intervention", "order"].tolist() == [order] * 2


def test_what_the_entry_held_is_kept_as_it_was():
    td = data(4)
    expected = network()(td.copy())["concepts"]
    found = intervene(network(), policy=GradientPolicy(TARGET), strategy=GroundTruth("labels"), sequential=True, k=3)(
        td
    )
    assert torch.equal(found["intervention", "before"], expected)


def test_a_value_in_double_precision_changes_no_dtype():
    pipeline = InterventionPipeline(UncertaintyPolicy(), lambda c, td: c.double(), k=2, sequential=True)
    td = pipeline(TensorDict({"concepts": torch.rand(4, 3)}, [4]))
    assert {td[key].dtype for key in ("concepts", ("intervention", "score"))} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7, 2.5, 3.3, 257.0])
def test_a_budget_is_the_same_at_once_and_one_by_one(dtype, budget):
    costs = [0.1, 0.1, 0.1, 0.0, 0.7, 256.0, 1.0, 2.0]
    score = torch.arange(8, 0, -1).to(dtype)
    masks = []
    for sequential in (False, True):
        pipeline = InterventionPipeline(
            lambda concepts, td: score, Do(1.0), budget=budget, cost=costs, sequential=sequential
        )
        for cast in (lambda p: p, lambda p: p.bfloat16()):
            masks.append(cast(pipeline)(TensorDict({"concepts": torch.zeros(8)}))["intervention", "mask"].tolist())
    left, expected = budget, []
    for cost in costs:
        expected.append(cost <= left + 1e-9 * budget)
        left -= cost * expected[-1]
    assert masks == [expected] * 4


def test_a_score_of_another_shape():
    pipeline = InterventionPipeline(lambda concepts, td: concepts[..., :2], Do(1.0), k=1, sequential=True)
    with pytest.raises(BadValue, match=r"(?s)score and concepts differ in shape.*\[3, 2\]"):
        pipeline(TensorDict({"concepts": torch.rand(3, 4)}, [3]))
