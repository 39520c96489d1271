"""Layer norm and RMS norm: reference cases, any shape, the functional forms, the forward left alone."""

import pytest
import torch
import torch.nn.functional as F
from lrp.cases import Fn, case, close, relevance, stab
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import LayerNormRule, RMSNormRule


def test_reference():
    c = case("layernorm_gradient")
    layer = nn.LayerNorm(6, eps=float(c["ln_eps"]), dtype=torch.float64)
    layer.weight.data, layer.bias.data = c["w"], c["b"]
    close(relevance(LayerNormRule(), layer, [c["x"]], c["r_out"], "gradient")[0], c["r_in"], 1e-6)
    c = case("rmsnorm_relevance")
    layer = nn.RMSNorm(6, dtype=torch.float64)
    close(relevance(RMSNormRule(), layer, [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(5), (2, 3, 5), (-1,)),
    "two dims": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5), (-2, -1)),
    "all dims": (lambda: nn.LayerNorm((2, 3)), (2, 3), (-2, -1)),
    "plain": (lambda: nn.LayerNorm(5, elementwise_affine=False), (2, 5), (-1,)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4), (-2, -1)),
    "group norm 1": (lambda: nn.GroupNorm(1, 4), (2, 4, 3), (-2, -1)),
}


@pytest.mark.parametrize("name", NORMS)
def test_formula(name):
    make, shape, dims = NORMS[name]
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    scale = (x.var(dims, correction=0, keepdim=True) + layer.eps).rsqrt()
    y = (leaf - leaf.mean(dims, keepdim=True)) * scale
    if getattr(layer, "weight", None) is not None:
        per_channel = [-1, *[1] * (x.ndim - 2)] if "norm" in name and name != "layer norm" else layer.weight.shape
        y = y * layer.weight.reshape(per_channel) + layer.bias.reshape(per_channel)
    assert y.allclose(layer(x))
    wanted = torch.autograd.grad(y, leaf, r, retain_graph=True)[0]
    close(relevance(LayerNormRule(), layer, [x], r, "gradient")[0], wanted)
    wanted = torch.autograd.grad(y, leaf, r / stab(y.detach()))[0]
    close(relevance(LayerNormRule(), layer, [x], r)[0], x * wanted)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_row_of_an_instance_norm(convention):
    layer = nn.InstanceNorm2d(3, affine=True).double()
    nn.init.normal_(layer.weight)
    x, r = torch.randn(1, 3, 4, 2, dtype=torch.float64), torch.randn(1, 3, 4, 2, dtype=torch.float64)
    wanted = relevance(LayerNormRule(), layer, [x], r, convention)[0][0]
    close(relevance(LayerNormRule(), layer, [x[0]], r[0], convention)[0], wanted)


def test_group_norm():
    layer = nn.GroupNorm(2, 4).double()
    x, r = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    (found,) = relevance(LayerNormRule(), layer, [x], r, "gradient")
    each = [
        relevance(LayerNormRule(), nn.GroupNorm(1, 2).double(), [part], s, "gradient")[0]
        for part, s in zip(x.chunk(2, 1), r.chunk(2, 1), strict=True)
    ]
    close(found, torch.cat(each, 1))


def test_functional():
    layer = nn.LayerNorm(5, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x, r = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    (wanted,) = relevance(LayerNormRule(), layer, [x], r, "gradient")
    calls = (
        lambda x: F.layer_norm(x, (5,), layer.weight),
        lambda x: F.layer_norm(x, normalized_shape=[5], weight=layer.weight, eps=1e-5),
    )
    for call in calls:
        leaf = x.clone().requires_grad_()
        with Rules((), {"layer_norm": LayerNormRule()}).on(Fn(call)) as m:
            close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)


def test_rms_norm_in_both_conventions():
    layer = nn.RMSNorm(5, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x, r = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    (ratio,) = relevance(RMSNormRule(), layer, [x], r / layer(x).detach(), "gradient")
    close(x * ratio, r)
    for some in ((0, 0), (slice(None), 1), (1, slice(None))):
        x[some] = 0
        scale = layer.weight * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        close(relevance(RMSNormRule(), layer, [x], r, "gradient")[0], r * scale)
    several = torch.vmap(lambda r: pulled(r)[0])
    with RMSNormRule().on(layer) as m:
        _, pulled = torch.func.vjp(m, x)
        close(several(torch.stack([r, 2 * r]))[1], 2 * r * scale)


def test_refusals():
    for rule, module in ((LayerNormRule(), nn.Linear(3, 3)), (RMSNormRule(), nn.Linear(3, 2))):
        with pytest.raises(BadValue, match="can't serve"), rule.on(module) as m:
            m(torch.randn(1, 3, requires_grad=True))
