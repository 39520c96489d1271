"""Accuracy of concepts and of tasks, one by one."""

import math

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts import ConceptSpec
from tdconcepts.errors import BadKey, BadValue
from tdconcepts.metrics.accuracy import ConceptAccuracy, concept_hits, task_hits

SPEC = ConceptSpec(["a", "b", "c", "d"], [1, 3, 1, 1], ["binary", "categorical", "continuous", "binary"])
nan = math.nan


def slow(probs, labels):
    """Hits and counts of one row."""
    hits, known = [], []
    for name, kind, y in zip(SPEC.names, SPEC.kinds, labels.tolist(), strict=True):
        p = probs[SPEC.slice(name)].tolist()
        counts = kind != "continuous" and not math.isnan(y)
        right = (p[0] > 0.5) == (y > 0.5) if kind == "binary" else p.index(max(p)) == y
        known.append(counts)
        hits.append(counts and right)
    return hits, known


def test_hits_one_row_one_concept_at_a_time():
    torch.manual_seed(0)
    probs = SPEC.probs(torch.randn(40, 6))
    labels = torch.cat([torch.randint(0, 2, (40, 1)), torch.randint(0, 3, (40, 1)), torch.randint(0, 2, (40, 2))], 1)
    labels = labels.float().masked_fill(torch.rand(40, 4) < 0.3, nan)
    hits, known = concept_hits(SPEC, probs, labels)
    accuracy = ConceptAccuracy(SPEC)(probs, labels)
    for b in range(40):
        expected = slow(probs[b], labels[b])
        assert (hits[b].tolist(), known[b].tolist()) == expected
        if any(expected[1]):
            assert accuracy[b] == pytest.approx(sum(expected[0]) / sum(expected[1]))
        else:
            assert accuracy[b].isnan()


def test_as_a_stage():
    td = TensorDict({"agents": {"c": torch.rand(2, 3, 6, requires_grad=True), "y": torch.zeros(2, 3, 4)}}, [2, 3])
    td = ConceptAccuracy(SPEC, ("agents", "c"), ("agents", "y"), "right")(td)
    assert td["metric", "right"].shape == (2, 3)
    assert not td["metric", "right"].requires_grad


def test_task_hits():
    logits = torch.randn(20, 4)
    task = torch.randint(0, 4, (20,))
    assert task_hits(logits, task).tolist() == [
        row.tolist().index(row.max()) == y for row, y in zip(logits, task, strict=True)
    ]
    one, yes = torch.randn(20, 1), torch.randint(0, 2, (20,))
    for shaped in (task_hits(one, yes), task_hits(one[:, 0], yes), task_hits(one, yes.unsqueeze(-1)).squeeze(-1)):
        assert shaped.tolist() == [(x > 0).item() == bool(y) for x, y in zip(one[:, 0], yes, strict=True)]


def test_a_task_that_is_missing_is_neither_right_nor_wrong():
    logits, task = torch.tensor([[1.0, 0], [0, 1], [3, 2]]), torch.tensor([0.0, 0.0, nan])
    hits = task_hits(logits, task)
    assert hits[:2].tolist() == [1, 0]
    assert hits[2].isnan()
    assert hits.nanmean() == 0.5
    for one in (logits[:, :1] - 0.5, logits[:, 0] - 0.5):
        assert task_hits(one, task).isnan().tolist() == [False, False, True]
    assert task_hits(logits - 0.5, logits.masked_fill(logits == 3, nan)).isnan().sum() == 1


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: task_hits(torch.zeros(3, 4), torch.zeros(4)), BadValue, r"\[3, 4\] and \[4\]"),
        (lambda: ConceptAccuracy(SPEC)(torch.zeros(2, 6), torch.zeros(2, 3)), BadValue, r"\[2, 4\]"),
        (lambda: ConceptAccuracy(SPEC)(torch.zeros(2, 5), torch.zeros(2, 4)), BadValue, r"\[\*B, 6\]"),
        (lambda: ConceptAccuracy(SPEC)(TensorDict({"concept": torch.zeros(6)})), BadKey, "did you mean 'concept'"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_soft_labels_of_a_task_and_a_concept_of_which_a_column_is_missing():
    assert task_hits(torch.tensor([-1.0, 1.0]), torch.tensor([0.3, 0.3])).tolist() == [True, False]
    labels = torch.tensor([[1.0, torch.nan, 0.0, 1.0]])
    hits, known = concept_hits(ConceptSpec(["a", "b"], [3, 1]), torch.tensor([[0.9, 0.1, 0.0, 0.9]]), labels)
    assert known.tolist() == [[False, True]]
    assert hits.tolist() == [[False, True]]
