"""The conservation report."""

import pytest
import torch
from lrp.nets import as_td
from tensordict import TensorDict
from torch import nn

from tdconcepts import Target
from tdconcepts.lrp import (
    LRP,
    Composite,
    Conservation,
    EpsilonPlus,
    EpsilonPlusFlat,
    EpsilonRule,
    FlatRule,
    FoldedBatchNorm,
    ZPlusRule,
)


def test_lines():
    report = Conservation()
    report("a", EpsilonRule(), "out", torch.tensor([2.0, 2.0]))
    report("a", EpsilonRule(), "in", torch.tensor([1.0]))
    report("b", FlatRule(), "out", torch.tensor([0.0]))
    assert report.lines["a"].kept == 0.25
    assert report.lines["b"].kept != report.lines["b"].kept
    assert repr(report).splitlines()[-1].startswith("a ")
    report.began(4.0, 3.0)
    assert repr(report).splitlines()[-1].split() == ["all", "4", "3", "0.75"]
    report.clear()
    assert not report.lines
    assert report.start is None


class Twice(nn.Module):
    """A residual net with two additions and a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2, bias=False)
        self.gain = nn.PReLU()

    def forward(self, x):
        h = self.norm(self.conv(x))
        h = torch.relu(h + x)
        return self.head(self.gain((h + x).mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Twice().double().eval()
    net.norm.running_mean.normal_()
    return as_td(net)


def explain(net, composite, x=None, target=0, **options):
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64) if x is None else x
    explainer = LRP(net, composite, Target("logits", target), check=True, **options)
    return explainer(TensorDict(x=x, batch_size=[3]))["attribution", "x"], explainer.report


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_each_module_and_each_call_of_an_operation(net, convention):
    found, report = explain(net, EpsilonPlus(), convention=convention)
    expected = {"conv", "norm", "head", "gain", "relu"}
    assert set(report.lines) == expected | ({"add", "add#1", "mean"} if convention == "relevance" else set())
    assert report.lines["head"].kept == pytest.approx(1, abs=1e-4)
    assert report.end == pytest.approx(float(found.sum()))
    assert report.start == pytest.approx(report.lines["head"].r_out)
    assert not report.unruled


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_folded_pair_is_one_line(net, convention):
    _, report = explain(net, EpsilonPlus() | FoldedBatchNorm(), convention=convention)
    assert report.folded == {"norm": "conv"}
    assert "norm" not in report.lines
    assert "conv + norm" in repr(report)
    assert report.lines["conv"].rule == ZPlusRule()
    assert report.lines["conv"].r_in != 0 != report.lines["conv"].r_out


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_rule_for_the_first_layer_and_zero_inputs(net, convention):
    x = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    x[:, :, 1:3] = torch.rand(3, 1, 2, 4)
    layers = nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2, bias=False)
    plain = as_td(nn.Sequential(*layers).double())
    found, report = explain(plain, EpsilonPlusFlat(), x, convention=convention)
    assert report.lines["0"].kept == pytest.approx(1, abs=1e-5)
    assert report.lines["0"].r_in == pytest.approx(float(found.sum()))


def test_several_targets_are_added_up(net):
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    both, report = explain(net, EpsilonPlus(), x, [0, 1])
    each = [explain(net, EpsilonPlus(), x, target) for target in (0, 1)]
    assert both[:, 1].allclose(each[1][0])
    assert report.lines["conv"].r_in == pytest.approx(sum(one.lines["conv"].r_in for _, one in each))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.PReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.special.i0(self.gain(x)))


def test_what_has_no_rule():
    composite = Composite({nn.Linear: EpsilonRule()}, on_missing="gradient")
    explainer = LRP(as_td(Odd()), composite, Target("logits", 0), check=True)
    explainer(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
    assert explainer.report.unruled == {"gain (PReLU)", "special_i0"}
    assert "without a rule: gain (PReLU), special_i0" in repr(explainer.report)


def test_a_report_of_a_context(net):
    report = Conservation()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    with (EpsilonPlus() | FoldedBatchNorm()).on(net.module, convention="relevance", report=report) as m:
        (found,) = torch.autograd.grad(m(x)[:, 0].sum(), x)
    assert report.lines["conv"].r_in + report.lines["add"].r_in + report.lines["add#1"].r_in != 0
    assert report.folded == {"norm": "conv"}
    assert found.shape == x.shape
