"""Calls with other parameters: modules, functions, folded layers, names that are none."""

import pytest
import torch
import torch.nn.functional as F
from hooks.nets import snapshot
from lrp.cases import LAYERS, Fn, close, layer_and_inputs, relevance
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import (
    AlphaBetaRule,
    Composite,
    EpsilonRule,
    FoldedBatchNorm,
    GammaRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
    fold,
)

RULES = [EpsilonRule, ZPlusRule, AlphaBetaRule, GammaRule, WSquareRule]


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "transposed 1d"])
@pytest.mark.parametrize("make", RULES)
def test_without_a_bias_it_is_a_layer_that_has_none(make, name, convention):
    layer, x, r = layer_and_inputs(name)
    bare = LAYERS[name][0]().double()
    bare.weight.data, bare.bias = layer.weight.data, None
    before = snapshot(layer)
    start = r if convention == "relevance" else r / layer(x).detach()
    (found,) = relevance(make(zero_params=("bias",)), layer, [x], start, convention)
    assert snapshot(layer) == before
    (wanted,) = relevance(make(), bare, [x], r)
    close(found if convention == "relevance" or make is WSquareRule else found * x, wanted)


@pytest.mark.parametrize("rule", [EpsilonRule(zero_params="bias"), ZPlusRule(zero_params="bias")])
def test_of_a_function_too(rule):
    layer, x, r = layer_and_inputs("linear")
    (wanted,) = relevance(rule, layer, [x], r)
    leaf = x.clone().requires_grad_()
    table = {"linear": rule}
    for net in (Fn(lambda x: F.linear(x, layer.weight, bias=layer.bias)), nn.Sequential(layer)):
        with Composite({nn.Linear: rule}, table).on(net, convention="relevance") as m:
            close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)


@pytest.mark.parametrize("make", [EpsilonRule, ZPlusRule])
def test_of_a_folded_layer(make):
    layer, norm = nn.Conv2d(2, 3, 2).double(), nn.BatchNorm2d(3).double().eval()
    norm.running_mean.normal_()
    nn.init.normal_(norm.bias)
    weight, _ = fold(layer, norm)
    bare = nn.Conv2d(2, 3, 2, bias=False).double()
    bare.weight = nn.Parameter(weight.detach())
    x, r = (torch.randn(2, n, k, k, dtype=torch.float64) for n, k in ((2, 4), (3, 3)))
    (wanted,) = relevance(make(), bare, [x], r)
    leaf = x.clone().requires_grad_()
    rules = Composite({nn.Conv2d: make(zero_params=("bias",))}) | FoldedBatchNorm()
    with rules.on(nn.Sequential(layer, norm), convention="relevance") as m:
        close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)


@pytest.mark.parametrize("make", [*RULES, lambda **k: ZBoxRule(-9.0, 9.0, **k)])
def test_names_that_are_none(make):
    layer, x, r = layer_and_inputs("linear")
    with pytest.raises(BadValue, match=r"no parameter 'bais'[\s\S]*\['weight', 'bias'\]"):
        relevance(make(zero_params=("bais",)), layer, [x], r)


def test_numbers_that_are_none():
    for make in (lambda: AlphaBetaRule("2", 1), lambda: AlphaBetaRule(2, None), lambda: GammaRule("a")):
        with pytest.raises(BadType, match="is no number"):
            make()
    with pytest.raises(BadType, match="installed on modules"):
        Composite({nn.Linear: EpsilonRule()}).on(torch.relu)
