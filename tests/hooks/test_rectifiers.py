"""The changed backward passes of a ReLU, by their formulas, for every spelling of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.rectifiers import DeconvNetRule, GuidedBackpropRule
from tdconcepts.hooks.rules import Rules

FORMULAS = [
    (GuidedBackpropRule(), lambda x, r: r * (x > 0) * (r > 0)),
    (DeconvNetRule(), lambda x, r: r.clamp(min=0)),
]


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(1 * x)


@pytest.mark.parametrize(("rule", "formula"), FORMULAS)
@pytest.mark.parametrize(
    "relu", [F.relu, torch.relu, lambda x: x.relu_(), lambda x: F.relu(x, inplace=True), nn.ReLU(), nn.ReLU(True)]
)
def test_every_relu(rule, formula, relu):
    x, r = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    with Rules((), {"relu": rule}, "relevance").on(Net(relu)) as m:
        out = m(x)
    assert torch.equal(out, x.relu())
    assert torch.equal(torch.autograd.grad(out, x, r)[0], formula(x, r))


def test_only_activations():
    with pytest.raises(BadValue, match="no activation"), GuidedBackpropRule().on(nn.Linear(3, 2)) as m:
        m(torch.randn(1, 3, requires_grad=True))
