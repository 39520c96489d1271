"""LSTM and GRU: the reference, a slow cell with detached gates, layers and directions, conservation."""

import pytest
import torch
from lrp.cases import case, close
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.lrp import GRURule, LSTMRule, RNNRule


def test_reference():
    c = case("lstm_cell_take_all")
    cell = nn.LSTMCell(3, 4, dtype=torch.float64)
    cell.weight_ih.data, cell.weight_hh.data = c["w_ih"], c["w_hh"]
    cell.bias_ih.data, cell.bias_hh.data = c["b"], torch.zeros_like(c["b"])
    x, h, s = (c[k].clone().requires_grad_() for k in ("x", "h0", "c0"))
    with LSTMRule().on(cell, convention="relevance") as m:
        out, _ = m(x, (h, s))
    for i, found in enumerate(torch.autograd.grad(out, [x, h, s], c["r_out"])):
        close(found, c[f"r_in_{i}"], 1e-6)


RNNS = {"lstm": (nn.LSTM, LSTMRule), "gru": (nn.GRU, GRURule), "rnn": (nn.RNN, RNNRule)}


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}]
)
def test_conservation_without_biases(kind, convention, options):
    module, rule = RNNS[kind]
    net = module(3, 4, bias=False, batch_first=True, **options).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    with rule(1e-12).on(net, convention=convention) as m:
        out, _ = m(x)
    assert out.equal(net(x)[0])
    r = out.detach() if convention == "relevance" else torch.ones_like(out)
    (found,) = torch.autograd.grad(out, x, r)
    found = found if convention == "relevance" else found * x
    assert found.sum().allclose(out.sum())


def test_a_gru_cell_with_detached_gates():
    cell = nn.GRUCell(3, 4).double()
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    with GRURule(1e-12).on(cell) as m:
        found = torch.autograd.grad(m(*leaves).sum(), leaves)
    wi, wh, bi, bh = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    a, b = (x @ wi.T + bi).chunk(3, -1), (h @ wh.T + bh).chunk(3, -1)
    r, z = (a[0] + b[0]).sigmoid().detach(), (a[1] + b[1]).sigmoid().detach()
    slow = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    signal = slow[0] @ wi.chunk(3)[2].T + bi.chunk(3)[2] + r * (slow[1] @ wh.chunk(3)[2].T + bh.chunk(3)[2])
    new = (1 - z) * signal * (signal.tanh() / signal).detach() + z * slow[1]
    for one, other in zip(found, torch.autograd.grad(new.sum(), slow), strict=True):
        close(one, other, 1e-8)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_plain_cell_is_its_linear_layers(nonlinearity, convention):
    cell = nn.RNNCell(3, 4, nonlinearity=nonlinearity).double()
    leaves = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
    r = torch.randn(2, 4, dtype=torch.float64)
    with RNNRule(0.01).on(cell, convention=convention) as m:
        out = m(*leaves)
    assert out.equal(cell(*leaves))
    start = r if convention == "relevance" else r / torch.where(out == 0, torch.inf, out.detach())
    found = torch.autograd.grad(out, leaves, start)
    joint = torch.cat([cell.weight_ih, cell.weight_hh], 1)
    x, flow = torch.cat(leaves, 1).detach(), r * (out != 0) if convention == "gradient" else r
    z = x @ joint.T + cell.bias_ih + cell.bias_hh
    wanted = x * ((flow / (z + 0.01 * z.sign())) @ joint)
    for one, part, leaf in zip(found, wanted.split([3, 4], 1), leaves, strict=True):
        close(one if convention == "relevance" else one * leaf, part, 1e-8)


def test_unbatched_and_given_states():
    net = nn.LSTM(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(1, 4, dtype=torch.float64) for _ in range(2))
    with LSTMRule().on(net) as m:
        out, last = m(x, state)
    assert out.equal(net(x, state)[0])
    assert last[1].equal(net(x, state)[1][1])
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_refusals():
    x = torch.randn(2, 3, 3, requires_grad=True)
    for module in (nn.GRU(3, 4), nn.LSTM(3, 4, 2, dropout=0.5)):
        with pytest.raises(BadValue, match="LSTMRule can't serve"), LSTMRule().on(module) as m:
            m(x)
