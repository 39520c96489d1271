"""Batch norms folded into the layer that ran in front: as data, and under rules; the model untouched."""

import pytest
import torch
from hooks.nets import snapshot
from lrp.cases import case, close, convolution
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import Composite, EpsilonPlus, EpsilonRule, FoldedBatchNorm, FoldRule, PassRule, ZPlusRule, fold


def norm(channels, kind=nn.BatchNorm2d, **options):
    bn = kind(channels, **options).double().eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    for p in bn.parameters():
        nn.init.normal_(p)
    return bn


def test_reference():
    c = case("bnmerge_conv2d")
    layer, bn = convolution(c, nn.Conv2d), nn.BatchNorm2d(4, eps=float(c["bn_eps"])).double().eval()
    bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var = c["bn_w"], c["bn_b"], c["bn_m"], c["bn_v"]
    weight, bias = fold(layer, bn)
    close(weight, c["w_merged"], 1e-9)
    close(bias, c["b_merged"], 1e-9)


PAIRS = {
    "conv": (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: norm(4), (2, 2, 5, 5)),
    "without bias": (lambda: nn.Conv2d(2, 4, 3, bias=False), lambda: norm(4), (2, 2, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: norm(6), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 2, stride=2), lambda: norm(4), (2, 2, 3, 3)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), lambda: norm(6), (2, 4, 3, 3)),
    "plain norm": (lambda: nn.Conv2d(2, 4, 3), lambda: norm(4, affine=False), (2, 2, 5, 5)),
    "linear": (lambda: nn.Linear(5, 4), lambda: norm(4, nn.BatchNorm1d), (3, 5)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("rule", [EpsilonRule(0.01), ZPlusRule()])
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_pair_is_one_layer(name, rule, convention):
    make, make_norm, shape = PAIRS[name]
    layer, bn = make().double(), make_norm()
    weight, bias = fold(layer, bn)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    merged = make().double()
    merged.weight = nn.Parameter(weight.detach())
    merged.bias = nn.Parameter(bias.detach())
    assert merged(x).allclose(bn(layer(x)))
    net = nn.Sequential(layer, bn)
    before = snapshot(net)
    rules = Composite({(nn.Conv2d, nn.ConvTranspose2d, nn.Linear): rule}) | FoldedBatchNorm()
    r = torch.randn_like(merged(x)).detach()
    with rule.on(merged, convention=convention) as m:
        (wanted,) = torch.autograd.grad(m(x), x, r)
    with rules.on(net, convention=convention) as m:
        out = m(x)
    assert out.equal(net(x))
    close(torch.autograd.grad(out, x, r)[0], wanted)
    assert snapshot(net) == before


def test_order_of_execution_not_of_declaration():
    class Crossed(nn.Module):
        def __init__(self, functional):
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(2, 2, 1), norm(2), nn.Conv2d(2, 2, 1)
            self.functional = functional
            self.double()

        def forward(self, x):
            h = self.b(x)
            return self.a(self.bn(torch.relu(h) if self.functional else h))

    for functional in (False, True):
        net, x = Crossed(functional), torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        rules = Composite({nn.Conv2d: ZPlusRule()}, {"relu": PassRule()})
        with (rules | FoldedBatchNorm()).on(net, convention="relevance") as m:
            (found,) = torch.autograd.grad(m(x).sum(), x)
        with (rules | {nn.BatchNorm2d: PassRule()}).on(net, convention="relevance") as m:
            (passed,) = torch.autograd.grad(m(x).sum(), x)
        assert found.allclose(passed) is functional  # an activation in between: not folded


def test_bad_input():
    with pytest.raises(BadType, match="no pair"):
        fold(nn.ReLU(), nn.BatchNorm1d(2))
    with pytest.raises(BadValue, match="training=True"):
        fold(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert isinstance((EpsilonPlus() | FoldedBatchNorm()).rules[0][1], FoldRule)
