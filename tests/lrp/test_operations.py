"""Functional calls: the two conventions give one relevance, whatever the operation; and what has no rule says so."""

import pytest
import torch
import torch.nn.functional as F
from lrp.cases import Fn, close

from tdconcepts.errors import BadValue
from tdconcepts.lrp import AttnLRP, EpsilonPlus

C = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def assigned(x):
    y = torch.zeros_like(x)
    y[:, :2] = x[:, :2] * 2
    return y


def in_place(x):
    y = x * 1
    y += x.flip(-1)
    y *= 2
    return y


MOVES = {
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad with 2": lambda x: F.pad(x, (1, 1), value=2.0),
    "where": lambda x: torch.where(C > 0, x, 0.5),
    "two of where": lambda x: torch.where(C > 0, x, 2 * x),
    "masked_fill": lambda x: x.masked_fill(C > 0, 3.0),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort(-1).values,
    "gather": lambda x: x.gather(-1, torch.zeros(2, 4, 6, 2, dtype=torch.long)),
    "maximum": lambda x: torch.maximum(x, 2 * x.flip(-1)),
    "split and cat": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "index": lambda x: x[:, [0, 2]],
    "assign": assigned,
    "unfold": lambda x: F.unfold(x, 2),
    "max pool": lambda x: F.max_pool2d(x, 3, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "sign": lambda x: x * x.sign(),
}
SUMS = {
    "neg": lambda x: -x,
    "abs": torch.abs,
    "cumsum": lambda x: x.cumsum(-1),
    "diff": lambda x: x.diff(dim=-1),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "fold": lambda x: F.fold(F.unfold(x, 3), (6, 6), 3),
    "index_add": lambda x: C[:, :, :3].index_add(2, torch.tensor([0, 0, 1, 1, 2, 2]), x),
    "scatter_add": lambda x: C.scatter_add(-1, torch.zeros(2, 4, 6, 6, dtype=torch.long), x),
    "lerp": lambda x: torch.lerp(x, 2 * x.flip(-1), 0.3),
    "stack and sum": lambda x: torch.stack([x, 2 * x.flip(-1)]).sum(0),
    "mean": lambda x: x.mean((2, 3)),
    "a constant less x": lambda x: C - x,
    "alpha": lambda x: torch.add(x, x.flip(-1), alpha=3),
    "average": lambda x: F.adaptive_avg_pool2d(x, 4),
    "in place": in_place,
    "rotation": lambda x: x * C + torch.cat([-x[..., 3:], x[..., :3]], -1) * C.flip(0),
}
PRODUCTS = {
    "by a constant": lambda x: C * x / 3,
    "constant matrix": lambda x: x @ C,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "einsum": lambda x: torch.einsum("bcij,bcjk->bcik", x, C),
    "x * y": lambda x: x * x.flip(-1),
    "addmm": lambda x: torch.addmm(C[0, 0], x[0, 0], C[1, 1]),
    "baddbmm": lambda x: torch.baddbmm(C[0], x[0], C[1]),
    "linear": lambda x: F.linear(x, C[0, 0]),
    "conv2d": lambda x: F.conv2d(x, C[:, :, :2, :2]),
    "tensordot": lambda x: torch.tensordot(x, C[0, 0], 1),
    "by its norm": lambda x: x / x.square().sum(-1, keepdim=True).sqrt(),
    "batch_norm": lambda x: F.batch_norm(x, C[0, :, 0, 0], C[0, :, 0, 1].abs() + 0.1),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "gelu": F.gelu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "pow": lambda x: x.pow(3),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(-1), x + 1),
}


@pytest.mark.parametrize(
    "composite", [AttnLRP(1e-12, 1e-12), EpsilonPlus(1e-12, 1e-12)], ids=["AttnLRP", "EpsilonPlus"]
)
@pytest.mark.parametrize("name", [*MOVES, *SUMS, *PRODUCTS])
def test_the_conventions_agree(name, composite):
    function = {**MOVES, **SUMS, **PRODUCTS}[name]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).requires_grad_()
    found = {}
    for convention in ("gradient", "relevance"):
        with composite.on(Fn(function), convention) as m:
            y = m(x * 1)
        assert y.allclose(function(x))
        start = y.detach() if convention == "relevance" else torch.ones_like(y)
        (found[convention],) = torch.autograd.grad(y, x, start)
    close(found["relevance"], x * found["gradient"], 1e-6)


@pytest.mark.parametrize("name", ["var", "prod", "logsumexp"])
def test_what_has_no_rule_says_so(name):
    with (
        pytest.raises(BadValue, match=f"the operation '{name}' without a rule"),
        AttnLRP().on(Fn(getattr(torch, name))) as m,
    ):
        m(torch.randn(3, 4, requires_grad=True), -1)
