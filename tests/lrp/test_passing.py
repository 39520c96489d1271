"""Pass, ignore, uniform, stop and the pseudo-identity: reference cases, limits and refusals."""

import pytest
import torch
from lrp.cases import Fn, case, close, relevance
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.lrp import IgnoreRule, PassRule, PseudoIdentityRule, StopRule, UniformRule


@pytest.mark.parametrize(
    ("name", "rule", "module", "convention"),
    [
        ("maxpool_winner", IgnoreRule(), nn.MaxPool2d(2), "relevance"),
        ("pass_gelu", PassRule(), nn.GELU(), "relevance"),
        ("uniform_add", UniformRule(), Fn(torch.add), "relevance"),
        ("layernorm_identity", PassRule(), nn.LayerNorm(6).double(), "relevance"),
        ("pseudo_identity_silu", PseudoIdentityRule(), nn.SiLU(), "gradient"),
    ],
)
def test_reference(name, rule, module, convention):
    c = case(name)
    inputs = [c[k] for k in sorted(c) if k == "x" or k.startswith("x_")]
    expected = [c[k] for k in sorted(c) if k == "r_in" or k.startswith("r_in_")]
    for found, wanted in zip(relevance(rule, module, inputs, c["r_out"], convention), expected, strict=True):
        close(found, wanted, 1e-6)


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Hardswish()])
def test_the_activation_passes_its_relevance(module):
    x, r = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for rule in (PassRule(1e-12), PseudoIdentityRule(1e-12)):
        (ratio,) = relevance(rule, module, [x], r, "gradient")
        close(x * ratio, r * module(x), 1e-8)
        assert torch.equal(relevance(rule, module, [x], r)[0], r)


@pytest.mark.parametrize(
    ("module", "slope"), [(nn.GELU(), 0.5), (nn.SiLU(), 0.5), (nn.Tanh(), 1.0), (nn.Sigmoid(), 0.25)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_limit_at_zero(module, slope, dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7], dtype=dtype)
    (found,) = relevance(PseudoIdentityRule(), module, [x], torch.ones_like(x), "gradient")
    assert found.allclose(torch.full_like(x, slope), atol=1e-3)


def test_pass_where_inactive():
    x, r = torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 3.0])
    assert torch.equal(relevance(PassRule(), nn.ReLU(), [x], r)[0], r)


def test_uniform():
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    r = torch.randn(2, 3, dtype=torch.float64)
    found = relevance(UniformRule(), Fn(torch.add), [a, b], r)
    assert torch.equal(found[0], r / 2)
    close(found[1], r.sum(0) / 2)
    ratios = relevance(UniformRule(1e-12), Fn(torch.add), [a, b], r / (a + b), "gradient")
    close(a * ratios[0], r / 2, 1e-8)


def test_stop_gives_zeros_on_the_only_way():
    x = torch.randn(2, 3)
    for convention in ("gradient", "relevance"):
        (found,) = relevance(StopRule(), nn.Linear(3, 4), [x], torch.ones(2, 4), convention)
        assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("rule", "module", "shape"),
    [
        (PassRule(), nn.Linear(3, 2), (1, 3)),
        (PassRule(), nn.LSTM(3, 3), (1, 3)),
        (UniformRule(), nn.Linear(3, 2), (1, 3)),
        (PseudoIdentityRule(), nn.Linear(3, 2), (1, 3)),
    ],
)
def test_refusals(rule, module, shape):
    with pytest.raises(BadValue, match=f"{type(rule).__name__} can't serve"), rule.on(module, "relevance") as m:
        m(torch.randn(shape, requires_grad=True))
