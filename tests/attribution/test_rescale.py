"""The rescale rule: each formula by hand, completeness, ends far apart and together, masks, overlaps."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.attribution import DeepLift
from tdconcepts.attribution.rescale import ELEMENTWISE


class Op(nn.Module):
    """A function as a module, and the weighted sum of what it gives."""

    def __init__(self, function, weights=None):
        super().__init__()
        self.function, self.weights = function, weights

    def forward(self, x):
        y = self.function(x)
        y = y * (torch.linspace(1, 2, y[0].numel(), dtype=y.dtype).view(y.shape[1:]) if self.weights is None else 1)
        return y.flatten(1).sum(1)


def lifted(function, x, x0, weights=None):
    td = TensorDict(x=x, baseline=TensorDict(x=x0, batch_size=[len(x)]), batch_size=[len(x)])
    explain = DeepLift(TensorDictModule(Op(function, weights), ["x"], ["y"]), Target("y"), convergence_delta=True)
    return explain(td)["attribution", "x"], td["convergence_delta", "x"]


def rows(*shape):
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["relu", "elu", "hardtanh", "sigmoid", "tanh", "softplus", "gelu", "silu"])
def test_an_activation_by_hand(name):
    function = getattr(F, name)
    x, x0 = rows(4, 6)
    found, _ = lifted(function, x, x0)
    torch.testing.assert_close(found, torch.linspace(1, 2, 6, dtype=x.dtype) * (function(x) - function(x0)))


def test_the_names_are_those_of_torch():
    assert [name for name in ELEMENTWISE if not hasattr(torch, name) and not hasattr(F, name)] == []


@pytest.mark.parametrize("function", [F.relu, F.gelu, torch.sigmoid, lambda x: x.clamp(-1, 1), torch.abs])
def test_where_nothing_changes_it_is_the_gradient(function):
    x = torch.tensor([[0.5, -0.5, 2.0]], dtype=torch.float64)
    for step in (0.0, 1e-13):
        explain = DeepLift(TensorDictModule(Op(lambda x: function(3 * x), 1), ["x"], ["y"]), Target("y"))
        multipliers = explain._program
        (path,) = explain._paths
        td = TensorDict(x=x, batch_size=[1])
        pulled = multipliers.compared(path, td, {"x": x - step})
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(3 * leaf).sum(), leaf)
        torch.testing.assert_close(pulled.gradients[0], expected)


def test_float32_does_not_amplify_rounding():
    """A neuron whose input hardly changes though its parts do: the secant is noise there, the derivative is not."""
    x, x0 = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1e-7]])
    found, _ = lifted(lambda x: torch.sigmoid(x.sum(-1, keepdim=True) + 1.0), x, x0, 1)
    slope = torch.sigmoid(torch.tensor(1.0)) * (1 - torch.sigmoid(torch.tensor(1.0)))
    torch.testing.assert_close(found, slope * torch.tensor([[1.0, -1.0]]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_is_complete_near_and_far(scale, name):
    x, step = rows(5, 4)
    x0 = x + scale * step
    found, delta = lifted(lambda x: getattr(x, name)(-1), x, x0)
    assert found.isfinite().all()
    assert delta.abs().max() < 1e-9 * max(1.0, scale)


def test_softmax_by_hand():
    """exp(z) with z = x - log sum exp(x): secants of exp, log and exp, one after the other."""
    x, x0 = rows(1, 3)
    found, _ = lifted(lambda x: x.softmax(-1)[..., :1], x, x0, 1)
    e, e0, s, s0 = x.exp(), x0.exp(), x.exp().sum(), x0.exp().sum()
    share = (e - e0) / (x - x0) * (s.log() - s0.log()) / (s - s0)
    z, z0 = x - s.log(), x0 - s0.log()
    slope = ((z.exp() - z0.exp()) / (z - z0))[0, 0]
    expected = slope * (torch.tensor([[1.0, 0.0, 0.0]], dtype=x.dtype) - share) * (x - x0)
    torch.testing.assert_close(found, expected)


def test_what_shifts_all_logits_gets_nothing():
    x, x0 = rows(3, 1)
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    found, _ = lifted(lambda x: (x + logits).softmax(-1), x, x0)
    assert found.abs().max() < 1e-15


def test_masked_logits():
    x, x0 = rows(3, 4)
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0], dtype=torch.float64)
    found, delta = lifted(lambda x: (x + mask).softmax(-1), x, x0)
    assert found[:, 2].abs().max() == 0
    assert found.isfinite().all()
    assert delta.abs().max() < 1e-14


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.max_pool1d(x, 3, 1),
        lambda x: F.max_pool1d(x, 3, 2, 1),
        lambda x: F.adaptive_max_pool1d(x, 3),
        lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x.unflatten(-1, (2, 4)), 2, 1),
        lambda x: F.adaptive_max_pool2d(x.unflatten(-1, (2, 4)), (1, 2)),
        lambda x: F.max_pool3d(x.unflatten(-1, (2, 2, 2)), 2, 1),
        lambda x: x.max(-1).values,
        lambda x: x.amax(1, keepdim=True),
        lambda x: x.min(1).values,
        lambda x: torch.logsumexp(x, -1),
    ],
)
def test_maxima_are_complete(function):
    x, x0 = rows(4, 3, 8)
    found, delta = lifted(function, x, x0)
    assert delta.abs().max() < 1e-14
    assert found.abs().sum() > 0


def test_a_max_pool_by_hand():
    """The maximum rises by 2 at the input's place, or falls by 2 at the baseline's."""
    x, x0 = torch.tensor([[[1.0, 5.0, 2.0, 1.0]]]), torch.tensor([[[3.0, 1.0, 1.0, 4.0]]])
    found, _ = lifted(lambda x: F.max_pool1d(x, 2), x, x0, 1)
    assert found.tolist() == [[[0.0, 2.0, 0.0, -2.0]]]


def test_a_max_pool_in_any_order_of_the_batch():
    """Captum 0.9 takes the first row's gradient wherever a row does not change: (20, 0) in the place of (21, -1)."""
    x = torch.tensor([[[1.0, 2.0, 2.0, 0.0]], [[7.0, 7.0, 7.0, 7.0]]], dtype=torch.float64)
    x0 = torch.tensor([[[0.0, 2.0, 3.0, 0.0]], [[7.0, 7.0, 7.0, 7.0]]], dtype=torch.float64)
    pool = lambda x: F.max_pool1d(x, 2)  # noqa: E731
    one, other = lifted(pool, x, x0)[0], lifted(pool, x.flip(0), x0.flip(0))[0].flip(0)
    assert torch.equal(one, other)
