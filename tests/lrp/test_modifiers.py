"""Rules on changed parameters, and handles: against a layer that really has them, the module untouched."""

import pytest
import torch
import torch.nn.functional as F
from hooks.nets import hook_count, snapshot
from lrp.cases import LAYERS, Fn, close, layer_and_inputs, relevance
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import (
    Composite,
    EpsilonRule,
    FlatRule,
    GammaRule,
    ModifiedRule,
    ParamModifier,
    RemovableRuleHandle,
    WSquareRule,
    ZPlusRule,
)


def positive(name, p):
    return p.clamp(min=0)


def is_weight(name, p):
    return name == "weight"


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", [EpsilonRule(0.1), ZPlusRule(), GammaRule(), WSquareRule()])
def test_as_if_the_layer_had_these_parameters(rule, name, convention):
    layer, x, r = layer_and_inputs(name)
    before = snapshot(layer)
    modified = ParamModifier(positive, is_weight).of(rule)
    start = r if convention == "relevance" else r / layer(x).detach()
    (found,) = relevance(modified, layer, [x], start, convention)
    assert snapshot(layer) == before
    with torch.no_grad():
        layer.weight.clamp_(min=0)
    (wanted,) = relevance(rule, layer, [x], r)
    close(found * x if convention == "gradient" and not rule.terminal else found, wanted)


def test_zeroed_biases_are_a_modifier():
    layer, x, r = layer_and_inputs("conv2d")
    modified = ModifiedRule(ZPlusRule(), lambda name, p: p * 0 if name == "bias" else p)
    close(relevance(modified, layer, [x], r)[0], relevance(ZPlusRule(zero_params=("bias",)), layer, [x], r)[0])


def test_functions_and_nested_modules():
    layer, x, r = layer_and_inputs("linear")
    modified = ParamModifier(positive, is_weight).of(EpsilonRule())
    (wanted,) = relevance(modified, layer, [x], r)
    leaf = x.clone().requires_grad_()
    for call in (lambda x: F.linear(x, layer.weight, layer.bias), lambda x: F.linear(x, layer.weight, bias=layer.bias)):
        with Composite(operations={"linear": modified}).on(Fn(call), convention="relevance") as m:
            close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)
    nested = ParamModifier(positive, lambda name, p: name == "0.weight").of(EpsilonRule())
    close(relevance(nested, nn.Sequential(layer), [x], r)[0], wanted)


def test_one_after_the_other():
    both = ParamModifier.from_modifiers(
        [
            ParamModifier(lambda name, p: p + 1, is_weight),
            ParamModifier(lambda name, p: p * 2, ParamModifier.select_all),
        ]
    )
    assert both("weight", torch.ones(2)).tolist() == [4.0, 4.0]
    assert both("bias", torch.ones(2)).tolist() == [2.0, 2.0]
    assert ParamModifier(positive)("weight", -torch.ones(1)).item() == -1  # nothing is selected
    assert ParamModifier(select_fn=is_weight)("weight", -torch.ones(1)).item() == -1


def test_a_rule_stays_until_it_is_removed():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    before, x = snapshot(net), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(net(x).sum(), x)[0]
    handle = RemovableRuleHandle(ZPlusRule(), net[0], "relevance")
    with RemovableRuleHandle(ZPlusRule(), net[1], "relevance"):
        ruled = torch.autograd.grad(net(x).sum(), x)[0]
    assert not ruled.allclose(plain)
    handle.remove()
    handle.remove()
    assert torch.autograd.grad(net(x).sum(), x)[0].equal(plain)
    assert snapshot(net) == before
    assert not hook_count(net)


def test_bad_input():
    with pytest.raises(BadType, match="modify_fn"):
        ParamModifier(3)
    with pytest.raises(BadType, match="no rule to modify"):
        ModifiedRule(ParamModifier(), EpsilonRule())
    layer, x, r = layer_and_inputs("linear")
    with pytest.raises(BadValue, match="another shape for 'weight'"):
        relevance(ParamModifier(lambda name, p: p[0], is_weight).of(EpsilonRule()), layer, [x], r)
    with (
        pytest.raises(BadValue, match="it has no weight"),
        Composite(operations={"tanh": ModifiedRule(EpsilonRule(), positive)}).on(Fn(torch.tanh)) as m,
    ):
        m(torch.randn(2, requires_grad=True))
    assert ModifiedRule(FlatRule(), positive).terminal
