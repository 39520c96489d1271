"""Epsilon, norm and uniform epsilon: reference cases, the formula on dense matrices, several inputs, zeroed biases."""

import pytest
import torch
from lrp.cases import LAYERS, Fn, case, close, dense, layer_and_inputs, linear, relevance, stab
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import EpsilonRule, NormRule, Stabilizer, UniformEpsilonRule


@pytest.mark.parametrize(
    ("name", "rule", "make"),
    [
        ("epsilon_linear_eps025", EpsilonRule(0.25), lambda c: linear(c["w"], c["b"])),
        ("epsilon_linear_tokens", EpsilonRule(), lambda c: linear(c["w"], c["b"])),
        ("epsilon_add", EpsilonRule(), lambda c: Fn(torch.add)),
        ("uniform_epsilon_matmul", UniformEpsilonRule(), lambda c: Fn(torch.matmul)),
        ("norm_avgpool", NormRule(), lambda c: nn.AvgPool2d(2)),
    ],
)
def test_reference(name, rule, make):
    c = case(name)
    inputs = [c[k] for k in sorted(c) if k == "x" or k.startswith("x_")]
    expected = [c[k] for k in sorted(c) if k == "r_in" or k.startswith("r_in_")]
    for found, wanted in zip(relevance(rule, make(c), inputs, c["r_out"]), expected, strict=True):
        close(found, wanted, 1e-6)


def test_reference_of_batch_norm():
    c = case("epsilon_batchnorm")
    layer = nn.BatchNorm2d(3).double().eval()
    layer.weight.data, layer.bias.data = c["bn_w"], c["bn_b"]
    layer.running_mean, layer.running_var = c["bn_m"], c["bn_v"]
    close(relevance(EpsilonRule(), layer, [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.3])
def test_formula(name, epsilon):
    layer, x, r = layer_and_inputs(name)
    m, b = dense(layer, x)
    s = r.flatten(1) / stab(x.flatten(1) @ m.T + b, epsilon)
    close(relevance(EpsilonRule(epsilon), layer, [x], r)[0].flatten(1), x.flatten(1) * (s @ m))


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 1d"])
def test_zeroed_bias(name):
    layer, x, r = layer_and_inputs(name)
    m, _ = dense(layer, x)
    s = r.flatten(1) / stab(x.flatten(1) @ m.T)
    for given in (("bias",), "bias"):
        close(relevance(EpsilonRule(zero_params=given), layer, [x], r)[0].flatten(1), x.flatten(1) * (s @ m))


@pytest.mark.parametrize("rule", [EpsilonRule(0.1), UniformEpsilonRule(0.1), EpsilonRule(0.1, ("bias",))])
def test_conventions_agree(rule):
    layer, x, r = layer_and_inputs("linear")
    (ratio,) = relevance(rule, layer, [x], r / layer(x), "gradient")
    close(x * ratio, relevance(rule, layer, [x], r)[0])


@pytest.mark.parametrize("stabilizer", [Stabilizer(0.1, clip=True), Stabilizer(0.1, norm_scale=True), lambda z: z + 2])
def test_stabilizers(stabilizer):
    layer, x, r = layer_and_inputs("linear")
    m, b = dense(layer, x)
    for convention in ("relevance", "gradient"):
        given = r if convention == "relevance" else r / layer(x)
        (found,) = relevance(EpsilonRule(stabilizer), layer, [x], given, convention)
        close(found if convention == "relevance" else x * found, x * ((r / stabilizer(x @ m.T + b)) @ m))


def test_product():
    a, b, r = torch.randn(3, 4, dtype=torch.float64, requires_grad=False).chunk(3)
    each = relevance(UniformEpsilonRule(0.0), Fn(torch.mul), [a, b], r)
    assert all(part.allclose(r / 2) for part in each)
    each = relevance(EpsilonRule(0.0), Fn(torch.mul), [a, b], r)
    assert all(part.allclose(r) for part in each)


def test_uniform_epsilon_with_a_constant():
    a, b, r = torch.randn(3, 4, dtype=torch.float64).chunk(3)
    (found,) = relevance(UniformEpsilonRule(0.0), Fn(lambda x: x * b), [a], r)
    assert found.allclose(r)


def test_keywords_and_tuples():
    module = Fn(lambda first, pair, *, last: (first + pair[0] * 2, pair[1] - last))
    a, b, c, d = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    with EpsilonRule(0.0).on(module, convention="relevance") as m:
        y, z = m(a, (b, c), last=d)
    found = torch.autograd.grad([y, z], [a, b, c, d], [torch.ones(3), torch.full((3,), 2.0)])
    for part, wanted in zip(found, [a / y, 2 * b / y, 2 * c / z, -2 * d / z], strict=True):
        assert part.allclose(wanted)


@pytest.mark.parametrize("epsilon", [-1.0, "x", None])
def test_bad_stabilizers(epsilon):
    with pytest.raises((BadValue, BadType), match=r"epsilon|stabiliser"):
        EpsilonRule(epsilon)
