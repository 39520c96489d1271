"""Sums of gradients over copies of a batch: those of the plain gradients, wherever they were taken."""

import pytest
import torch
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks import sums
from tdconcepts.hooks.sums import PathSum, traced

WEIGHTS = torch.tensor([0.1, 0.5, -0.2, 0.3, 0.7], dtype=torch.float64)
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sums, "_WORTH", 1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.layer(x) + x


class Masked(nn.Module):
    """A layer whose weights are others in each call."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.randn(4, 2, 3, 3)), 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.conv2d(x, self.weight * (1 + self.calls // 2))


class Parametrized(nn.Module):
    """A layer whose weights are made anew in each call, and are the same."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight.tanh())


class Hooked(nn.Conv2d):
    """A hook on its output, which counts the copies that it sees."""

    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g * torch.linspace(1, 2, g.shape[1], dtype=g.dtype).view(-1, 1, 1))
        return y


class HookedBefore(nn.Conv2d):
    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda g: 3 * g)
        return super().forward(x)


def legacy():
    layer = nn.Conv2d(2, 3, 3)
    layer.register_backward_hook(lambda module, before, after: (2 * before[0], *before[1:]))
    return layer


def full():
    layer = nn.Conv2d(2, 3, 3)
    layer.register_full_backward_hook(lambda module, before, after: (2 * before[0],))
    return layer


def full_pre():
    layer = nn.Conv2d(2, 3, 3)
    layer.register_full_backward_pre_hook(lambda module, after: (2 * after[0],))
    return layer


IMAGE, VECTOR = (2, 6, 6), (4,)
CASES = {  # the layers that read the entry, the shape of a row, and whether the sum is taken behind the first of them
    "conv": (lambda: nn.Conv2d(2, 3, 3), IMAGE, True),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), IMAGE, True),
    "grouped": (lambda: nn.Conv2d(2, 4, (3, 2), padding=(2, 1), dilation=(1, 2), groups=2), IMAGE, True),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), IMAGE, True),
    "one dim": (lambda: nn.Conv1d(2, 3, 3), (2, 7), True),
    "in place": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Tanh()), IMAGE, True),
    "linear": (lambda: nn.Linear(4, 3), VECTOR, True),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), VECTOR, True),
    "frozen": (lambda: nn.Linear(4, 3).requires_grad_(False), VECTOR, True),
    "tokens": (lambda: nn.Linear(4, 3), (5, 4), False),
    "not linear": (nn.Tanh, VECTOR, False),
    "scaled": (lambda: nn.Sequential(nn.Hardtanh(), nn.Linear(4, 3)), VECTOR, False),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE, False),
    "two readers": (Residual, IMAGE, False),
    "other weights": (Masked, IMAGE, True),
    "new weights": (Parametrized, IMAGE, True),
    "hook behind": (lambda: Hooked(2, 3, 3), IMAGE, True),
    "hook before": (lambda: HookedBefore(2, 3, 3), IMAGE, False),
    "backward hook of old": (legacy, IMAGE, False),
    "backward hook": (full, IMAGE, False),
    "backward hook before": (full_pre, IMAGE, False),
}


def net(first, row):
    torch.manual_seed(0)
    front = first().double()
    size = front(torch.zeros(1, *row, dtype=torch.float64)).numel()
    if isinstance(front, Masked):
        front.calls = 0
    return nn.Sequential(front, nn.Softplus(), nn.Flatten(), nn.Linear(size, 3).double(), nn.Tanh())


def pulled(module, x, chunks, several, width=None):
    """The sum, with so many copies at a time; copy k of ``x`` is ``x * (1 + k / 10)``."""
    total, start, expected = PathSum(module, [x.shape], rows=2), 0, 0
    for n in chunks:
        weights = WEIGHTS[start : start + n]
        many = torch.cat([x * (1 + k / 10) for k in range(start, start + n)]).requires_grad_()
        values = module(many) if several else module(many)[:, 1]
        if several:
            parts = [torch.autograd.grad(v, many, torch.ones_like(v), retain_graph=True)[0] for v in values.unbind(1)]
            gradients = torch.stack(parts, 1)
        else:
            gradients = torch.autograd.grad(values.sum(), many, retain_graph=True)[0]
        expected = expected + torch.tensordot(weights, gradients.unflatten(0, (n, len(x))), 1)
        total.of(lambda dtype, device, weights=weights: weights.to(dtype))
        assert total.pull(values, [many], several, False, width, "y") == []
        start += n
    return total, expected


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook", "ignore:.*forward outputs is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_of_the_gradients(name):
    first, row, behind = CASES[name]
    for several, width in [(False, None), (True, None), (True, 1), (True, 2)]:
        module, x = net(first, row), torch.randn(3, *row, dtype=torch.float64)
        total, expected = pulled(module, x, [2, 2, 1], several, width)
        assert (total._sums[0].layer is not None) == behind
        found = total.result(1)[0]
        assert found.is_contiguous()
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in module.parameters())


def test_a_layer_that_changes_is_finished_first():
    row = CASES["other weights"][1]
    for name, finished in [("other weights", True), ("new weights", False), ("conv", False)]:
        total, _ = pulled(net(CASES[name][0], row), torch.randn(3, *row, dtype=torch.float64), [2, 2, 1], False)
        assert (total._sums[0].done is not None) == finished, name


def test_a_weight_that_is_overwritten_in_place():
    module, x = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    total, leaf = PathSum(module, [x.shape], rows=2), x.requires_grad_()
    total.of(lambda dtype, device: torch.ones(1, dtype=dtype))
    total.pull(module(leaf)[:, 1], [leaf], False, False, None, "y")
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(BadValue, match="was overwritten while copies of the batch went through it"):
        total.result(1)


def test_several_entries_and_one_that_does_not_matter():
    layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    given = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    values = (layers[0](given[0]).tanh() * layers[1](given[1].sin())).sum(-1)
    expected = torch.autograd.grad(values.sum(), given[:2], retain_graph=True)
    total = PathSum(layers, [one.shape for one in given], rows=2)
    total.of(lambda dtype, device: torch.ones(1, dtype=dtype))
    total.pull(values, given, False, False, None, "y")
    assert [one.layer is None for one in total._sums] == [False, True, True]
    found = total.result(1)
    torch.testing.assert_close(found[:2], list(expected))
    assert not found[2].any()


def test_many_targets_wait_only_where_there_is_room(monkeypatch):
    monkeypatch.setattr(sums, "_MOST", 0)
    module, x = nn.Linear(4, 9).double(), torch.randn(2, 4, dtype=torch.float64)
    for copies, behind in [(2, False), (3, True)]:
        total, expected = pulled(module, x, [copies], True)
        assert (total._sums[0].layer is not None) == behind
        torch.testing.assert_close(total.result(1)[0], expected)


def test_half_precision_is_summed_in_float32():
    module = nn.Linear(8, 3).bfloat16()
    x = torch.randn(64, 8).bfloat16().requires_grad_()
    total = PathSum(module, [torch.Size([1, 8])], rows=2)
    total.of(lambda dtype, device: torch.full((64,), 1 / 64))
    total.pull(module(x)[:, 1], [x], False, False, None, "y")
    (found,) = total.result(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], module.weight[1].float())


def test_where_no_graph_can_be_looked_at():
    assert not traced()
    seen = []
    torch.vmap(lambda x: seen.append(traced()) or x)(torch.zeros(2))
    assert seen == [True]
