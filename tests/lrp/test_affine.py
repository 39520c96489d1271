"""Affine views: both passes of every layer equal the layer and its transposed, for modules and functions."""

import pytest
import torch
import torch.nn.functional as F
from lrp.cases import LAYERS, Fn, close, layer_and_inputs, relevance

from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import ZPlusRule
from tdconcepts.lrp.affine import magnitude, positive_part

FUNCTIONS = {
    "linear": lambda m: lambda x: F.linear(x, m.weight, bias=m.bias),
    "conv1d strided": lambda m: lambda x: F.conv1d(x, m.weight, m.bias, 2, 1),
    "conv1d same": lambda m: lambda x: F.conv1d(x, m.weight, m.bias, padding="same"),
    "conv2d grouped": lambda m: lambda x: F.conv2d(x, m.weight, m.bias, padding=(1, 0), groups=2),
    "transposed 1d": lambda m: lambda x: F.conv_transpose1d(x, m.weight, m.bias, 2, 1, 1),
    "transposed 2d grouped": lambda m: lambda x: F.conv_transpose2d(x, m.weight, m.bias, stride=2, groups=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functional_call_is_its_module(name):
    layer, x, r = layer_and_inputs(name)
    (wanted,) = relevance(ZPlusRule(), layer, [x], r)
    leaf = x.clone().requires_grad_()
    table = dict.fromkeys(["linear", *(f"conv{t}{n}d" for n in (1, 2, 3) for t in ("", "_transpose"))], ZPlusRule())
    with Rules((), table, convention="relevance").on(Fn(FUNCTIONS[name](layer))) as m:
        close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)


@pytest.mark.parametrize("name", [n for n in LAYERS if "conv" in n or "transposed" in n])
def test_rows_without_a_batch_dim(name):
    layer, x, r = layer_and_inputs(name)
    (wanted,) = relevance(ZPlusRule(), layer, [x], r)
    close(relevance(ZPlusRule(), layer, [x[0]], r[0])[0], wanted[0])


def test_output_size_of_a_transposed_convolution():
    layer = torch.nn.ConvTranspose1d(2, 3, 3, stride=2, dtype=torch.float64)
    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    with ZPlusRule().on(layer, convention="relevance") as m:
        out = m(x, output_size=[10])
    assert out.shape[-1] == 10
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_fleeting_weights():
    a, b = torch.randn(4, 3), torch.randn(2, 3, dtype=torch.float64)
    first = positive_part(a, True)
    assert first.equal(a.clamp(min=0))
    second = magnitude(b, True)
    assert second.equal(b.abs())
    assert positive_part(a, True).data_ptr() == first.data_ptr()
    assert positive_part(a, False).data_ptr() != first.data_ptr()
    assert magnitude(a.t(), True).equal(a.t().abs())
