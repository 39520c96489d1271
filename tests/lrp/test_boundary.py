"""Flat, w-square and z-box: reference cases, the formulas on dense matrices, and where they may stand."""

import pytest
import torch
from lrp.cases import LAYERS, case, close, dense, layer_and_inputs, linear, relevance, stab
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import EpsilonRule, FlatRule, WSquareRule, ZBoxRule
from tdconcepts.lrp.boundary import nonzero


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("zbox_linear_tensor", lambda c: ZBoxRule(c["low"], c["high"])),
        ("wsquare_linear", lambda c: WSquareRule()),
        ("flat_linear", lambda c: FlatRule()),
    ],
)
def test_reference(name, make):
    c = case(name)
    close(relevance(make(c), linear(c["w"], c["b"]), [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


def flat(m, b, x, r):
    seen = (m != 0).to(m.dtype)
    return (r / stab(seen.sum(1))) @ seen


def wsquare(m, b, x, r):
    return (r / stab(m.square().sum(1) + b.square())) @ m.square()


def zbox(m, b, x, r):
    p, n, low, high = m.clamp(min=0), m.clamp(max=0), -torch.ones_like(x), 2 * torch.ones_like(x)
    s = r / stab(x @ m.T - low @ p.T - high @ n.T)
    return x * (s @ m) - low * (s @ p) - high * (s @ n)


FORMULAS = {FlatRule(): flat, WSquareRule(): wsquare, ZBoxRule(-1.0, 2.0): zbox}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", FORMULAS, ids=lambda rule: type(rule).__name__)
def test_formula(rule, name):
    layer, x, r = layer_and_inputs(name)
    expected = FORMULAS[rule](*dense(layer, x), x.flatten(1), r.flatten(1))
    close(relevance(rule, layer, [x], r)[0].flatten(1), expected)
    close(relevance(rule, layer, [x], r / layer(x).detach(), "gradient")[0].flatten(1), expected)


def test_flat_of_pooling():
    x, r = torch.randn(1, 1, 4, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64)
    (found,) = relevance(FlatRule(), nn.AvgPool1d(2), [x], r)
    close(found, r.repeat_interleave(2, -1) / 2, 1e-5)


def test_channel_bounds():
    layer, x, r = layer_and_inputs("conv2d")
    low, high = torch.tensor([-1.0, -2.0]).reshape(1, 2, 1, 1), torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    (found,) = relevance(ZBoxRule(low, high), layer, [x], r)
    (wide,) = relevance(ZBoxRule(low.expand(5, 2, 4, 4), high.expand(2, 2, 4, 4)), layer, [x], r)
    assert torch.equal(found, wide)


def test_bounds_of_other_rows_are_refused():
    layer, x, r = layer_and_inputs("linear")
    low = -torch.arange(1.0, 5.0).unsqueeze(1).expand(4, 5)
    with pytest.raises(BadValue, match="bounds of 4 rows for 3"):
        relevance(ZBoxRule(low, 1.0), layer, [x], r)
    own = relevance(ZBoxRule(low[:3], 1.0), layer, [x], r)[0]
    close(own[1:2], relevance(ZBoxRule(-2.0, 1.0), layer, [x[1:2]], r[1:2])[0])


def test_in_the_middle():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(2, 3, requires_grad=True)
    with EpsilonRule().on(net[0]), FlatRule().on(net[1]), pytest.raises(BadValue, match="middle of the model"):
        net(x)
    with EpsilonRule().on(net[0], convention="relevance"), FlatRule().on(net[1], convention="relevance"):
        assert torch.autograd.grad(net(x).sum(), x)[0].shape == x.shape


def test_bad_bounds():
    for low, high in ((torch.tensor([0.0, 2.0]), 1.0), (torch.zeros(3, 1), torch.tensor([1.0, -1.0]))):
        with pytest.raises(BadValue, match="box is empty"):
            ZBoxRule(low, high)
    for wrong in (None, "low", [], float("nan"), torch.tensor([0.0, torch.nan]), True, 1j):
        with pytest.raises((BadValue, BadType), match="low is no bound"):
            ZBoxRule(wrong, 1.0)
    with pytest.raises(BadValue, match="box is empty"):
        ZBoxRule(1.0, 0.0)
    with (
        pytest.raises(BadValue, match="bound of shape"),
        ZBoxRule(torch.zeros(7), torch.ones(7)).on(nn.Linear(3, 1)) as m,
    ):
        m(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(BadValue, match="FlatRule can't serve"), FlatRule().on(nn.LayerNorm(3)) as m:
        m(torch.randn(2, 3, requires_grad=True))


def test_nonzero():
    x = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 3.0])
    assert (nonzero(x) != 0).all()
    assert nonzero(x)[3] < 0 < nonzero(x)[2]
    assert nonzero(x.half()).isfinite().all()
