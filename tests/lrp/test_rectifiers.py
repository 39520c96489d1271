"""Guided back-propagation, deconvolution and beta-smooth."""

import pytest
import torch
from lrp.cases import case, close, relevance
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.lrp import BetaSmoothRule, DeconvNetRule, GuidedBackpropRule


def test_reference():
    c = case("gradient_relu_guided")
    close(relevance(GuidedBackpropRule(), nn.ReLU(), [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_formulas(inplace):
    x, r = torch.randn(4, 5), torch.randn(4, 5)
    module = nn.Sequential(nn.Identity(), nn.ReLU(inplace))
    for rule, wanted in (
        (GuidedBackpropRule(), r * (x > 0) * (r > 0)),
        (DeconvNetRule(), r.clamp(min=0)),
        (BetaSmoothRule(3.0), torch.sigmoid(3 * x) * r),
    ):
        leaf = x.clone().requires_grad_()
        with rule.on(module[1]):
            out = module(leaf * 1)
        assert torch.equal(out, x.relu())
        assert torch.autograd.grad(out, leaf, r)[0].allclose(wanted)


def test_refusals():
    with pytest.raises(BadValue, match="mix two conventions"):
        GuidedBackpropRule().on(nn.ReLU(), convention="gradient")
    with pytest.raises(BadValue, match="no activation"), GuidedBackpropRule().on(nn.Linear(3, 2)) as m:
        m(torch.randn(1, 3, requires_grad=True))
    with pytest.raises(BadValue, match="beta"):
        BetaSmoothRule(0.0)
