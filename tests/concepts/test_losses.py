"""Losses row by row, re-derived concept by concept."""

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from tdconcepts.concepts.losses import CompletenessLoss, ConceptLoss, LeakageLoss, TotalLoss
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue

KINDS = ["binary", "categorical", "categorical", "continuous", "binary"]
SPEC = ConceptSpec(["a", "b", "c", "d", "e"], [1, 3, 3, 1, 1], KINDS, {"bc": ["b", "c"]})
nan = math.nan
LABELS = torch.tensor([[1.0, 2, 0, 0.3, 0], [0, nan, 1, -2.0, 1], [nan, nan, nan, nan, nan], [nan, 0, nan, nan, nan]])


def slow(logits, labels, weights, reduction="mean", space="logits"):
    total = count = 0.0
    for k, (name, kind) in enumerate(zip(SPEC.names, SPEC.kinds, strict=True)):
        y, found = labels[k].item(), logits[SPEC.slice(name)].tolist()
        if math.isnan(y):
            continue
        if kind == "binary":
            p = 1 / (1 + math.exp(-found[0])) if space == "logits" else found[0]
            loss = -math.log(p if y == 1 else 1 - p)
        elif kind == "categorical":
            share = [math.exp(v) for v in found] if space == "logits" else found
            loss = -math.log(share[int(y)] / sum(share))
        else:
            loss = (found[0] - y) ** 2
        total += weights.get(name, 1.0) * loss
        count += weights.get(name, 1.0)
    return total if reduction == "sum" else total / count if count else 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_the_formula_and_that_missing_labels_take_no_part(reduction, space):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    block = logits if space == "logits" else SPEC.probs(logits)
    stage = ConceptLoss(SPEC, weights={"a": 2.0, "bc": 0.5}, space=space, reduction=reduction)
    found = stage(block, LABELS.double())
    weights = {"a": 2.0, "b": 0.5, "c": 0.5}
    expected = [slow(row, y, weights, reduction, space) for row, y in zip(block, LABELS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    assert found[2] == 0


def test_a_missing_label_gives_no_gradient_and_a_nan_does_not_spread():
    """W7: NaN leaks through 0 * x."""
    logits = torch.zeros(4, 9, requires_grad=True)
    ConceptLoss(SPEC)(logits, LABELS).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[2].abs().sum() == 0
    assert logits.grad[3, 1:4].abs().min() > 0


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_a_prediction_without_a_label_may_be_anything(space):
    block = torch.full((4, 9), 0.3)
    columns = SPEC.targets(LABELS)
    expected = ConceptLoss(SPEC, space=space)(block, LABELS)
    columns[1, 5:7] = nan  # one column of a concept is enough
    expected[1] = ConceptLoss(SPEC, space=space)(block, torch.where(torch.arange(4).unsqueeze(-1) == 1, nan, LABELS))[1]
    columns[1, [0, 7, 8]] = nan
    odd = block.masked_fill(columns.isnan(), nan).requires_grad_()
    found = ConceptLoss(SPEC, space=space)(odd, columns)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert odd.grad[columns.isnan()].abs().max() == 0
    assert odd.grad.isfinite().all()


def test_a_state_that_is_ruled_out_costs_nothing_where_the_label_is_another():
    logits = torch.tensor([[0.0, 1, -math.inf], [-math.inf, 2, 0]], requires_grad=True)
    label = torch.tensor([1, 1])
    found = ConceptLoss(ConceptSpec(["c"], [3]))(logits, label)
    expected = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert ConceptLoss(ConceptSpec(["c"], [3]))(logits[:1], torch.tensor([2])).item() == math.inf


def test_a_task_is_a_block_and_columns_are_labels_too():
    logits, digit = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    stage = ConceptLoss(ConceptSpec(["digit"], [3]), {"logits": "digit"}, "task")
    expected = torch.nn.functional.cross_entropy(logits, digit, reduction="none")
    torch.testing.assert_close(stage(logits, digit), expected)
    torch.testing.assert_close(stage(logits, torch.eye(3)[digit]), expected)
    assert stage.out_keys == [("loss", "task")]
    td = stage(TensorDict({"logits": logits, "digit": digit}, [5]))
    assert td["loss", "task"].shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [[], [2, 3], [0]])
def test_any_batch_and_dtype(batch, dtype):
    loss = ConceptLoss(SPEC)(torch.randn(*batch, 9).to(dtype), torch.ones(*batch, 5))
    assert loss.shape == torch.Size(batch)
    assert loss.dtype is dtype


def test_leakage_is_the_mean_squared_correlation_of_errors_and_task():
    torch.manual_seed(0)
    labels, task = torch.randint(0, 2, (50, 3)).double(), torch.randint(0, 4, (50,))
    concepts = (labels * 0.6 + 0.3 * torch.rand(50, 3) + 0.02 * task.unsqueeze(-1)).double()
    spec, goal = ConceptSpec(3), ConceptSpec(["y"], [4])
    found = LeakageLoss(spec, goal)(concepts, labels, task)
    both = torch.cat([concepts - labels, torch.eye(4)[task].double()], 1)
    expected = both.T.corrcoef()[:3, 3:].square().mean()
    torch.testing.assert_close(found, expected.expand(50))
    clean = LeakageLoss(spec, goal)(labels, labels, task)
    assert clean.abs().max() == 0
    assert LeakageLoss(spec, goal)(concepts[:0], labels[:0], task[:0]).shape == (0,)


def test_leakage_leaves_the_rows_out_in_which_a_label_is_missing():
    torch.manual_seed(0)
    concepts = torch.rand(40, 4, dtype=torch.float64).requires_grad_()
    labels, task = torch.randint(0, 2, (40, 2)).double(), torch.randint(0, 2, (40, 2)).double()
    spec, goal = ConceptSpec(["a", "b"], [1, 3]), ConceptSpec(2)
    columns = spec.targets(labels)
    columns[:5, 0] = columns[3:9, 2] = columns[39, 3] = nan
    task[4:14, 1] = nan
    odd = concepts.detach().masked_fill(columns.isnan(), nan).requires_grad_()
    found = LeakageLoss(spec, goal)(odd, columns, task)[0]
    columns[columns[:, 1:].isnan().any(-1), 1:] = nan
    expected = 0.0
    for c in range(4):
        for t in range(2):
            rows = ~(columns[:, c].isnan() | task[:, t].isnan())
            pair = torch.stack([concepts[rows, c] - columns[rows, c], task[rows, t]])
            expected = expected + pair.corrcoef()[0, 1] ** 2 / 8
    torch.testing.assert_close(found, expected)
    gradient, wanted = (torch.autograd.grad(*pair)[0] for pair in ((found, odd), (expected, concepts)))
    torch.testing.assert_close(gradient, wanted)
    nothing = LeakageLoss(spec, goal)(concepts, columns * nan, task)[0]
    assert nothing == 0
    assert torch.autograd.grad(nothing, concepts)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_leakage_of_many_rows_in_half_precision(dtype):
    torch.manual_seed(0)
    labels, task = torch.randint(0, 2, (8000, 2)).double(), torch.randint(0, 2, (8000, 1)).double()
    concepts = 0.8 * labels + 0.1 * task
    found, expected = (LeakageLoss(2, 1)(concepts.to(d), labels, task)[0] for d in (dtype, torch.float64))
    assert found.dtype is dtype
    assert found.item() == pytest.approx(expected.item(), rel=max(32 * torch.finfo(dtype).eps, 1e-4))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = LeakageLoss(2, 1)(concepts.to(dtype), labels, task)[0]
    assert torch.equal(mixed, found)


def test_leakage_falls_when_it_is_trained_down():
    torch.manual_seed(0)
    labels, task = torch.randint(0, 2, (200, 2)).float(), torch.randint(0, 2, (200,)).float()
    residual = torch.nn.Parameter(0.1 * task.unsqueeze(-1) + 0.1 * torch.randn(200, 2))
    stage, optimizer = LeakageLoss(2, 1), torch.optim.SGD([residual], lr=50.0)
    before = stage(labels + residual, labels, task)[0].item()
    for _ in range(50):
        optimizer.zero_grad()
        stage(labels + residual, labels, task).mean().backward()
        optimizer.step()
    assert stage(labels + residual, labels, task)[0].item() < 0.2 * before


def test_completeness_is_a_divergence_from_the_black_box():
    torch.manual_seed(0)
    goal = ConceptSpec(["y", "z"], [3, 1])
    logits, reference = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    stage = CompletenessLoss(goal)
    found = stage(logits, reference)
    for b in range(6):
        p, q = reference[b, :3].softmax(-1), logits[b, :3].softmax(-1)
        expected = sum(p[i] * (p[i] / q[i]).log() for i in range(3))
        p, q = reference[b, 3].sigmoid(), logits[b, 3].sigmoid()
        expected = expected + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(found[b], expected)
    assert stage(logits, logits).abs().max() == 0
    found.sum().backward()
    assert reference.grad is None


def test_a_reference_may_be_certain():
    inf, goal = math.inf, ConceptSpec(["y", "z"], [3, 1])
    logits = torch.tensor([[0.1, 0.2, -0.3, 0.4]]).repeat(4, 1).requires_grad_()
    reference = torch.tensor([[-inf, 1, 2, inf], [inf, 0, 0, -inf], [-inf, inf, 3, 0], [-inf, -inf, 0, 0]])
    probs = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0.5], [0, 0, 1, 0.5]])
    probs[0, :3] = torch.tensor([0.0, 1.0, 2.0]).softmax(0) * torch.tensor([0, 1, 1])
    probs[0, :3] /= probs[0, :3].sum()
    found = CompletenessLoss(goal)(logits, reference)
    p, q = (torch.cat([x, 1 - x[:, 3:]], 1) for x in (probs, goal.probs(logits)))
    torch.testing.assert_close(found, torch.special.xlogy(p, p / q).sum(1))
    found.sum().backward()
    pull = torch.cat([logits[:, :3].softmax(1), logits[:, 3:].sigmoid()], 1) - probs
    torch.testing.assert_close(logits.grad, pull)
    masked = torch.tensor([[-inf, 0.0, 1.0, 0.0]])
    assert CompletenessLoss(goal)(masked, masked).item() == 0


def test_the_total_is_a_weighted_sum_and_trains_in_a_pipeline():
    pipeline = TensorDictSequential(
        ConceptLoss(["a"]),
        ConceptLoss(["y"], {"logits": "task"}, "task"),
        TotalLoss({"concepts": 1.0, "task": 0.25}),
    )
    td = TensorDict({"concepts_logits": torch.zeros(2, 1), "logits": torch.zeros(2, 1, requires_grad=True)}, [2])
    td.update({"labels": torch.ones(2, 1), "task": torch.zeros(2)})
    total = pipeline(td)["loss", "total"]
    torch.testing.assert_close(total, torch.full((2,), 1.25 * math.log(2)))
    total.mean().backward()
    assert td["logits"].grad.abs().min() > 0


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: ConceptLoss(SPEC, {"a": "b", "c": "d"}), BadValue, "one pair"),
        (lambda: ConceptLoss(SPEC, space="onehot"), BadValue, "onehot"),
        (lambda: ConceptLoss(SPEC, weights={"bb": 1.0}), BadKey, "no concept or group 'bb'"),
        (lambda: ConceptLoss(SPEC, weights={"a": -1.0}), BadValue, "-1.0"),
        (lambda: ConceptLoss(SPEC, weights={"a": nan}), BadValue, "nan"),
        (lambda: ConceptLoss(SPEC)(torch.zeros(2, 9), torch.zeros(2, 4)), BadValue, r"\[2, 5\] numbers"),
        (lambda: ConceptLoss(SPEC)(torch.zeros(2, 9), torch.full((2, 5), 3.0)), BadValue, r"outside \[0, 1\]"),
        (lambda: ConceptLoss(SPEC)(torch.zeros(2, 8), torch.zeros(2, 5)), BadValue, r"\[\*B, 9\]"),
        (lambda: LeakageLoss(2, 1, ["a", "b"]), BadValue, "three"),
        (lambda: CompletenessLoss(SPEC), BadValue, "distributions"),
        (lambda: TotalLoss({}), BadValue, "add up"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_weights_and_keys_that_are_none():
    with pytest.raises(BadValue, match=r"(?s)one block with one entry.*'labels'"):
        ConceptLoss(["wing"], "labels")
    for weights in ({"wing": "2"}, {"wing": float("nan")}, {"wing": -1.0}):
        with pytest.raises(BadValue, match="not the weight of 'wing'"):
            ConceptLoss(["wing"], weights=weights)
    for weight in ("1", None, float("nan"), torch.ones(2)):
        with pytest.raises(BadValue, match="not the weight of 'concepts'"):
            TotalLoss({"concepts": weight})
    assert TotalLoss({"concepts": np.float32(2)})(loss_concepts=torch.ones(3)).tolist() == [2.0] * 3
    for loss in (lambda: ConceptLoss(["wing"], weights=[2.0]), lambda: TotalLoss(["concepts"])):
        with pytest.raises(BadType, match="not weights"):
            loss()


def test_the_columns_of_a_continuous_concept_are_averaged():
    stage = ConceptLoss(ConceptSpec(["place"], [2], ["continuous"]))
    assert stage(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).tolist() == [5.0]


def test_a_concept_of_which_a_column_is_missing_takes_no_part():
    stage = ConceptLoss(ConceptSpec(["colour", "wing"], [3, 1]))
    labels = torch.tensor([[1.0, nan, 0.0, 1.0]])
    assert stage(torch.zeros(1, 4), labels).tolist() == [pytest.approx(math.log(2))]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_nothing_where_its_label_is_missing(bad):
    """W7: 0 * NaN is NaN."""
    stage = ConceptLoss(ConceptSpec(["colour", "wing"], [3, 1]))
    loss = stage(torch.tensor([[bad, 0.0, 0.0, 0.0]]), torch.tensor([[nan, 1.0]]))
    assert loss.tolist() == [pytest.approx(math.log(2))]


def test_a_probability_of_zero_is_no_nan():
    stage = ConceptLoss(ConceptSpec(["colour"], [3]), space="probs")
    loss = stage(torch.tensor([[0.0, 1.0, 0.0]] * 2), torch.tensor([[1.0], [0.0]]))
    assert loss[0] == 0
    assert 80 < loss[1] < math.inf
