"""Predictors: linear, of mixtures, and with predicted weights."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts.concepts.predictors import HyperLinearPredictor, LinearPredictor, MixturePredictor
from tdconcepts.errors import BadValue


def test_linear():
    model, c = LinearPredictor(3, 2), torch.rand(5, 3)
    torch.testing.assert_close(model(c), c @ model.linear.weight.T + model.linear.bias)
    assert LinearPredictor(3, 2, bias=False).linear.bias is None


def test_a_mixture_is_joined_or_added_up():
    mixture = torch.randn(5, 3, 2)
    joined, added = MixturePredictor(nn.Identity()), MixturePredictor(nn.Identity(), "sum")
    assert torch.equal(joined(mixture)[4], torch.cat(list(mixture[4])))
    torch.testing.assert_close(added(mixture), mixture[:, 0] + mixture[:, 1] + mixture[:, 2])


def test_hyper_linear_one_row_one_task_one_concept_at_a_time():
    """Deterministic, in training too: torch_concepts adds noise of its bias to every element, at evaluation as well."""
    torch.manual_seed(0)
    model = HyperLinearPredictor(3, 4, 2, hidden_size=5).double()
    torch.nn.init.normal_(model.bias)
    c, e = torch.rand(6, 3).double(), torch.randn(6, 2, 4).double()
    weights, logits = model(c, e)
    first, _, second = model.hyper
    for b in range(6):
        for t in range(2):
            w = second.weight @ (first.weight @ e[b, t] + first.bias).clamp(min=0) + second.bias
            torch.testing.assert_close(weights[b, t], w)
            torch.testing.assert_close(logits[b, t], sum(w[i] * c[b, i] for i in range(3)) + model.bias[t])
    assert torch.equal(model(c, e)[1], logits)


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_any_batch(batch):
    td = TensorDict({"concepts": torch.rand(*batch, 3), "exogenous": torch.randn(*batch, 2, 4)}, batch)
    td = HyperLinearPredictor(3, 4, 2)(td)
    assert td["logits"].shape == (*batch, 2)
    assert td["weights"].shape == (*batch, 2, 3)


def test_a_batch_of_one_is_not_spread_over_five_rows():
    """torch_concepts broadcasts a batch of 1 to one of 5 in silence."""
    td = TensorDict({"concepts": torch.rand(1, 3)}, [1])
    with pytest.raises(RuntimeError, match="batch"):
        td["exogenous"] = torch.zeros(5, 2, 4)
    with pytest.raises(BadValue, match=r"\[1, 3\] and \[5, 2, 4\]"):
        HyperLinearPredictor(3, 4, 2)(torch.rand(1, 3), torch.zeros(5, 2, 4))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: LinearPredictor(0, 2), "in_features"),
        (lambda: LinearPredictor(3, 2)(torch.zeros(4)), r"\[\*B, 3\]"),
        (lambda: MixturePredictor(nn.Identity(), "mean"), "mean"),
        (lambda: MixturePredictor(nn.Identity())(torch.zeros(4)), r"\[\*B, K, E\]"),
        (lambda: HyperLinearPredictor(3, 4, 0), "out_features"),
        (lambda: HyperLinearPredictor(3, 4, 2, keys={"concept": "c"}), "concept"),
        (lambda: HyperLinearPredictor(3, 4, 2)(torch.zeros(3), torch.zeros(4, 2)), r"\[\*B, 2, 4\]"),
    ],
)
def test_bad_input(build, text):
    with pytest.raises(BadValue, match=text):
        build()
