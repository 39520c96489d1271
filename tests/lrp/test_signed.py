"""z-plus, alpha-beta and gamma: reference cases, and the four-way formula on dense matrices."""

import pytest
import torch
from lrp.cases import LAYERS, case, close, convolution, dense, layer_and_inputs, linear, relevance, stab
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.lrp import AlphaBetaRule, EpsilonRule, GammaRule, ZPlusRule


@pytest.mark.parametrize(
    ("name", "rule", "make"),
    [
        ("gamma_linear_pos", GammaRule(1.0), lambda c: linear(c["w"], c["b"])),
        ("gamma_conv2d_dil2", GammaRule(0.25), lambda c: convolution(c, nn.Conv2d)),
        ("zplus_linear", ZPlusRule(), lambda c: linear(c["w"], c["b"])),
        ("zplus_convT2d", ZPlusRule(), lambda c: convolution(c, nn.ConvTranspose2d)),
        ("alphabeta21_linear", AlphaBetaRule(2.0, 1.0), lambda c: linear(c["w"], c["b"])),
        ("alphabeta21_conv1d", AlphaBetaRule(), lambda c: convolution(c, nn.Conv1d)),
    ],
)
def test_reference(name, rule, make):
    c = case(name)
    close(relevance(rule, make(c), [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


def parts(layer, x):
    m, b = dense(layer, x)
    return m, m.clamp(min=0), m.clamp(max=0), b, x.flatten(1).clamp(min=0), x.flatten(1).clamp(max=0)


def alpha_beta(layer, x, r, alpha, beta):
    _, p, n, b, up, down = parts(layer, x)
    s = r / stab(up @ p.T + down @ n.T + b.clamp(min=0))
    t = r / stab(up @ n.T + down @ p.T + b.clamp(max=0))
    return alpha * (up * (s @ p) + down * (s @ n)) - beta * (up * (t @ n) + down * (t @ p))


def gamma(layer, x, r, g):
    m, p, n, b, up, down = parts(layer, x)
    z, big, small = x.flatten(1) @ m.T + b, m + g * p, m + g * n
    s = (z > 0) * r / stab(up @ big.T + down @ small.T + b + g * b.clamp(min=0))
    t = (z < 0) * r / stab(up @ small.T + down @ big.T + b + g * b.clamp(max=0))
    return up * (s @ big) + down * (s @ small) + up * (t @ small) + down * (t @ big)


RULES = {
    "z-plus": (ZPlusRule(), lambda *a: alpha_beta(*a, 1.0, 0.0)),
    "alpha 1": (AlphaBetaRule(1.0, 0.0), lambda *a: alpha_beta(*a, 1.0, 0.0)),
    "alpha 2": (AlphaBetaRule(), lambda *a: alpha_beta(*a, 2.0, 1.0)),
    "alpha 3": (AlphaBetaRule(3.0, 2.0), lambda *a: alpha_beta(*a, 3.0, 2.0)),
    "gamma": (GammaRule(), lambda *a: gamma(*a, 0.25)),
    "large gamma": (GammaRule(50.0), lambda *a: gamma(*a, 50.0)),
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_formula(rule, name, positive):
    layer, x, r = layer_and_inputs(name, positive)
    rule, formula = RULES[rule]
    expected = formula(layer, x, r.flatten(1))
    close(relevance(rule, layer, [x], r)[0].flatten(1), expected)
    (ratio,) = relevance(rule, layer, [x], r / layer(x).detach(), "gradient")
    close((x * ratio).flatten(1), expected)


@pytest.mark.parametrize("rule", ["z-plus", "alpha 2", "gamma"])
def test_zeroed_bias(rule):
    layer, x, r = layer_and_inputs("conv2d")
    rule, formula = RULES[rule]
    bare = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    bare.weight.data = layer.weight.data
    zeroed = type(rule)(**{**vars(rule), "zero_params": ("bias",)})
    close(relevance(zeroed, layer, [x], r)[0].flatten(1), formula(bare, x, r.flatten(1)))


def test_gamma_zero_is_epsilon():
    layer, x, r = layer_and_inputs("linear")
    close(relevance(GammaRule(0.0), layer, [x], r)[0], relevance(EpsilonRule(), layer, [x], r)[0])


def test_one_side_empty():
    layer = linear(torch.rand(3, 4, dtype=torch.float64))
    x, r = torch.rand(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    (found,) = relevance(AlphaBetaRule(), layer, [x], r)
    close(found.sum(), 2 * r.sum(), 1e-5)
    layer, x, r = layer.float(), x.float(), r.float()
    (found,) = relevance(AlphaBetaRule(), layer, [x], r)
    close(found.sum(), 2 * r.sum(), 1e-5)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode):
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    x, r = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    plain = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    plain.weight, plain.bias = layer.weight, layer.bias
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode=mode).requires_grad_()
    (wanted,) = relevance(ZPlusRule(), plain, [padded.detach()], r)
    leaf = x.clone().requires_grad_()
    pulled = torch.autograd.grad(torch.nn.functional.pad(leaf, (1, 1, 1, 1), mode=mode), leaf, wanted)[0]
    close(relevance(ZPlusRule(), layer, [x], r)[0], pulled)


def test_parametrized_weights():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4, dtype=torch.float64))
    plain = linear(layer.weight.detach(), layer.bias.detach())
    x, r = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    close(relevance(ZPlusRule(), layer, [x], r)[0], relevance(ZPlusRule(), plain, [x], r)[0])


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (1.0, 1.0), (0.5, -0.5), (0.0, -1.0)])
def test_bad_alpha_beta(alpha, beta):
    with pytest.raises(BadValue, match="alpha - beta == 1"):
        AlphaBetaRule(alpha, beta)


def test_bad_gamma_and_modules():
    with pytest.raises(BadValue, match="gamma"):
        GammaRule(-0.1)
    with pytest.raises(BadValue, match="GammaRule can't serve"), GammaRule().on(nn.GELU()) as m:
        m(torch.randn(2, requires_grad=True))


@pytest.mark.parametrize("rule", ["z-plus", "alpha 2", "gamma"])
@pytest.mark.parametrize("positive", [False, True])
def test_several_passes_through_one_graph(rule, positive):
    layer, x, r = layer_and_inputs("conv2d", positive)
    expected = relevance(RULES[rule][0], layer, [x], r)[0]
    leaf = x.clone().requires_grad_()
    with RULES[rule][0].on(layer, convention="relevance") as m:
        out = m(leaf)
    for _ in range(4):
        close(torch.autograd.grad(out, leaf, r, retain_graph=True)[0], expected)
    close(torch.autograd.grad(out, leaf, 2 * r)[0], 2 * expected)
