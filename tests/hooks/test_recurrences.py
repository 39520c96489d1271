"""Recurrent layers written out: each equals torch's own, forwards and backwards."""

import pytest
import torch
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import operation_name
from tdconcepts.hooks.opened import OPENED, _Inside, open_up


class Names:
    def __init__(self):
        self.seen = []

    def operate(self, run, func, args, kwargs):
        name = operation_name(func)
        self.seen.append(name)
        return open_up(name, self, run, args, kwargs) if name in OPENED else func(*args, **kwargs)


def opened(layer, *args):
    names = Names()
    with _Inside(names, None):
        return layer(*args), names.seen


def flat(tree):
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for part in tree for leaf in flat(part)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "how", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False, "num_layers": 2}]
)
def test_layers(kind, how):
    layer = kind(3, 4, **how).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found, seen = opened(layer, x)
    for one, other in zip(flat(found), flat(layer(x)), strict=True):
        torch.testing.assert_close(one, other)
    assert "sigmoid" in seen
    gradients = [torch.autograd.grad(out[0].square().sum(), x)[0] for out in (found, layer(x))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells(kind):
    cell, x = kind(3, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    found, seen = opened(cell, x)
    for one, other in zip(flat(found), flat(cell(x)), strict=True):
        torch.testing.assert_close(one, other)
    assert "tanh" in seen


def test_what_cannot_be_opened():
    x = torch.randn(5, 2, 3)
    with pytest.raises(BadValue, match="packed"):
        opened(nn.LSTM(3, 4), nn.utils.rnn.pack_padded_sequence(x, [5, 3]))
    with pytest.raises(BadValue, match="projection"):
        opened(nn.LSTM(3, 4, proj_size=2), x)
    with pytest.raises(BadValue, match="drops at random"):
        opened(nn.LSTM(3, 4, num_layers=2, dropout=0.5), x)
