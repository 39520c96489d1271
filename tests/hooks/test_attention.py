"""Attention weights in the order of execution, and gradients there: written out, torch's own, fused, several heads."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.hooks import Pullback
from tdconcepts.hooks.attention import Attended

PROGRAM = Attended()


class Net(nn.Module):
    """Two layers of attention by ``attend(q, k, v)``."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + self.attend(*layer(x).chunk(3, -1))
        return x.mean((-1, -2))


def by_hand(q, k, v):
    return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v


def dropped(q, k, v):
    weights = F.dropout(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 2, dim=-1), 0.5, training=False)
    return torch.matmul(weights.to(v.dtype), v)


def by_einsum(q, k, v):
    return torch.einsum("...ts,...sd->...td", torch.softmax(torch.einsum("...td,...sd->...ts", q, k) / 2, -1), v)


def seen(attend, batch=(3,), target=None, **how):
    torch.manual_seed(0)
    net = Net(attend).double()
    td = TensorDict(x=torch.randn(*batch, 5, 4, dtype=torch.float64), batch_size=batch)
    pullback = Pullback(TensorDictModule(net, ["x"], ["y"]), target or Target("y"), rules=PROGRAM)
    return PROGRAM.seen(pullback, td, **how), net, td


def reference(net, x):
    """Weights and gradients of ``sum(y)``, with the weights as leaves of a graph by hand."""
    weights = []
    for layer in net.layers:
        q, k, v = layer(x).chunk(3, -1)
        w = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        weights.append(w)
        x = x + w @ v
    gradients = torch.autograd.grad(x.mean((-1, -2)).sum(), weights)
    return weights, gradients


@pytest.mark.parametrize("attend", [by_hand, dropped, by_einsum, F.scaled_dot_product_attention])
@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
def test_weights_and_gradients(attend, batch):
    found, net, td = seen(attend, batch)
    weights, gradients = reference(net, td["x"])
    assert [tuple(w.shape) for w in found.weights] == [(*batch, 1, 5, 5)] * 2
    for one, other in zip((*found.weights, *found.gradients), (*weights, *gradients), strict=True):
        torch.testing.assert_close(one.squeeze(-3), other.detach())
        assert not one.requires_grad


def test_by_torch_func():
    eager, _, td = seen(by_hand)
    net = eager
    torch.manual_seed(0)
    net = Net(by_hand).double()
    pullback = Pullback(TensorDictModule(net, ["x"], ["y"]), Target("y"), rules=PROGRAM)

    def one(x):
        return tuple(PROGRAM.seen(pullback, TensorDict(x=x, batch_size=[3])).gradients)

    for whole, mapped in zip(eager.gradients, torch.vmap(one)(td["x"].unsqueeze(0)), strict=True):
        torch.testing.assert_close(whole, mapped[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_torchs_encoder_without_its_fast_path(first, frozen):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval().requires_grad_(not frozen)
    td = TensorDict(x=torch.randn(3, 5, 8, dtype=torch.float64), batch_size=[3])
    pullback = Pullback(TensorDictModule(encoder, ["x"], ["y"]), Target("y", (0, 0)), rules=PROGRAM)
    with torch.no_grad():
        found = PROGRAM.seen(pullback, td)
    assert [tuple(w.shape) for w in found.weights] == [(3, 2, 5, 5)] * 2
    torch.testing.assert_close(found.outputs["y"], encoder(td["x"]))
    inner = encoder.layers[0].self_attn
    given = encoder.layers[0].norm1(td["x"]) if first else td["x"]
    _, weights = inner(given, given, given, average_attn_weights=False)
    torch.testing.assert_close(found.weights[0], weights)
    assert all(gradient.abs().sum() > 0 for gradient in found.gradients)


def test_without_gradients_and_with_several_targets():
    found, _, _ = seen(by_hand, gradients=False)
    assert found.gradients == []
    assert found.values is None
    two = Target("y", [lambda y, td: y, lambda y, td: 2 * y])
    found, _, _ = seen(by_hand, target=two)
    torch.testing.assert_close(found.gradients[0][:, 1], 2 * found.gradients[0][:, 0])


def test_a_model_that_does_not_attend():
    softmax_at_the_end = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), ["x"], ["y"])
    pullback = Pullback(softmax_at_the_end, Target("y", 0), rules=PROGRAM)
    with pytest.raises(BadValue, match="no attention weights"):
        PROGRAM.seen(pullback, TensorDict(x=torch.randn(2, 4), batch_size=[2]))
