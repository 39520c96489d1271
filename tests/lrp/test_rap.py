"""RAP of a hidden layer: the reference, the formula by its terms, and how much is handed on."""

import pytest
import torch
from lrp.cases import LAYERS, case, close, dense, layer_and_inputs, linear, relevance

from tdconcepts.lrp import RAPRule


def test_reference():
    c = case("rap_linear")
    close(relevance(RAPRule(), linear(c["w"]), [c["x"]], c["r_out"])[0], c["r_in"], 1e-6)


def over(a, b):
    return torch.where(b == 0, 0.0, a / b)


@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "transposed 1d"])
def test_formula(name):
    layer, x, r = layer_and_inputs(name)
    m, _ = dense(layer, x)
    rows, flow, total = x.flatten(1), r.flatten(1), 0
    for half, sign in ((rows.clamp(min=0), 1), (rows.clamp(max=0), -1)):
        p, n = sign * m.clamp(min=0), -sign * m.clamp(max=0)
        zp, zn = half @ p.T, half @ n.T
        up, down, share = flow.clamp(min=0), flow.clamp(max=0), over(zn, zp + zn)
        got = half * (over(up, zp) @ p + (over(up * share, zn) + over(down, zn) + over(down * share, zn)) @ n)
        there = got != 0
        total = total + got - there * (got.sum(1) - flow.sum(1)).unsqueeze(1) / there.sum(1, keepdim=True)
    close(relevance(RAPRule(), layer, [x], r)[0].flatten(1), total)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_handed_on(name):
    layer, x, r = layer_and_inputs(name)
    wanted = r.flatten(1).sum(1)
    signs = (x.flatten(1) > 0).any(1).double() + (x.flatten(1) < 0).any(1)
    assert relevance(RAPRule(), layer, [x], r)[0].flatten(1).sum(1).allclose(signs * wanted)
    assert relevance(RAPRule(single=True), layer, [x], r)[0].flatten(1).sum(1).allclose(wanted)
