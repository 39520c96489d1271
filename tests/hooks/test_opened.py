"""Composite operations written out: each equals torch's own, and shows its parts."""

import pytest
import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import operation_name
from tdconcepts.hooks.opened import OPENED, _Inside, open_up
from tdconcepts.hooks.plans import Plan, Run


class Names:
    def __init__(self):
        self.seen = []

    def operate(self, run, func, args, kwargs):
        name = operation_name(func)
        self.seen.append(name)
        return open_up(name, self, run, args, kwargs) if name in OPENED else func(*args, **kwargs)


RUN = Run(Plan(TensorDictModule(nn.Identity(), ["x"], ["y"]), ()))


def opened(name, *args, **kwargs):
    names = Names()
    found = open_up(name, names, RUN, args, kwargs)
    return found, names.seen


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("layer_norm", (rand(2, 3, 4), (3, 4)), {"weight": rand(3, 4), "bias": rand(3, 4), "eps": 0.1}),
        ("rms_norm", (rand(2, 4), (4,)), {"weight": rand(4)}),
        ("group_norm", (rand(2, 4, 3), 2), {"weight": rand(4), "bias": rand(4)}),
        ("glu", (rand(2, 4),), {}),
        ("normalize", (rand(2, 4),), {"dim": -1}),
        ("norm", (rand(2, 4),), {"dim": -1}),
        ("scaled_dot_product_attention", (rand(2, 3, 4), rand(2, 5, 4), rand(2, 5, 6)), {}),
        ("scaled_dot_product_attention", (rand(2, 3, 4), rand(2, 3, 4), rand(2, 3, 4)), {"is_causal": True}),
        (
            "scaled_dot_product_attention",
            (rand(2, 4, 3, 4), rand(2, 2, 5, 4), rand(2, 2, 5, 4)),
            {"attn_mask": rand(3, 5) > 0, "scale": 0.3, "enable_gqa": True},
        ),
    ],
)
def test_it_equals_torchs_own(name, args, kwargs):
    found, seen = opened(name, *args, **kwargs)
    torch.testing.assert_close(found, getattr(F, name, getattr(torch, name, None))(*args, **kwargs))
    assert len(seen) > 1


def test_sums_of_matrix_products():
    a, b, c = rand(2, 3), rand(3, 4), rand(4)
    torch.testing.assert_close(opened("addmm", c, a, b, alpha=2, beta=3)[0], torch.addmm(c, a, b, alpha=2, beta=3))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}])
@pytest.mark.parametrize("masks", [{}, {"attn_mask": True}, {"key_padding_mask": True}])
def test_multi_head_attention(first, own, masks):
    layer = nn.MultiheadAttention(8, 2, batch_first=first, **own).double().eval()
    q, k, v = rand(2, 4, 8), rand(2, 6, own.get("kdim", 8)), rand(2, 6, own.get("vdim", 8))
    if not first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    given = {"attn_mask": torch.ones(4, 6, dtype=torch.bool).triu(3)} if "attn_mask" in masks else {}
    given |= {"key_padding_mask": torch.arange(6) > torch.tensor([[3], [4]])} if "key_padding_mask" in masks else {}
    expected = layer(q, k, v, average_attn_weights=False, **given)
    names = Names()

    with _Inside(names, RUN):
        found = layer(q, k, v, average_attn_weights=False, **given)
    torch.testing.assert_close(found, expected)
    assert "softmax" in names.seen
    assert names.seen.count("matmul") == 2


def test_a_single_sequence():
    layer, x = nn.MultiheadAttention(8, 2).double().eval(), rand(4, 8)
    names = Names()

    with _Inside(names, RUN):
        found = layer(x, x, x)
    torch.testing.assert_close(found, layer(x, x, x))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.MultiheadAttention(4, 2, add_bias_kv=True).eval(), "keys of its own"),
        (nn.MultiheadAttention(4, 2, dropout=0.5), "drops at random"),
    ],
)
def test_what_cannot_be_opened(layer, reason):
    x = torch.randn(3, 1, 4)
    with pytest.raises(BadValue, match=reason), _Inside(Names(), RUN):
        layer(x, x, x)
