"""Peak memory by torch's own count: bounded by the rows in flight, and so by default."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Conductance, Gradient, IntegratedGradients, Site, Target, VarGrad
from tdconcepts.hooks import Pullback
from tdconcepts.perturbation import FeatureAblation, Grid


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()
    return TensorDictModule(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 4)), ["x"], ["y"])


def images(batch):
    return TensorDict(x=torch.randn(batch, 3, 32, 32), batch_size=[batch])


def peak(explain, td):
    """The most bytes that were held at once, besides what was there before."""
    explain(td.copy())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        explain(td.copy())
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return torch.tensor([0, *(size for _, size in changes)]).cumsum(0).max().item()


def module(*layers):
    return TensorDictModule(nn.Sequential(*layers), ["x"], ["y"]).requires_grad_(False)


def lenet():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return module(*layers, nn.Linear(32 * 64, 128), nn.ReLU(), nn.Linear(128, 10))


def strided():
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return module(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 256, 10))


def vgg():
    layers, width = [], 3
    for one in [8, None, 16, None, 32, 32, None, 64, 64, None, 64, 64, None]:
        layers += [nn.MaxPool2d(2)] if one is None else [nn.Conv2d(width, one, 3, padding=1), nn.ReLU()]
        width = one or width
    return module(*layers, nn.Flatten(), nn.Linear(64, 10))


def mlp():
    return module(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def once(network):
    """A single forward and backward, by hand."""

    def run(td):
        x = td["x"].requires_grad_()
        return torch.autograd.grad(network.module(x)[:, 1].sum(), x)

    return run


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (lambda net: Gradient(net, Target("y", 1)), 1.1),
        (lambda net: IntegratedGradients(net, Target("y", 1), n_steps=200), 4),
        (lambda net: VarGrad(Gradient(net, Target("y", 1)), n_iter=50), 4),
        (lambda net: Conductance(net, Target("y", 1), Site("0"), n_steps=50), 5),  # of values and gradients at a layer
        (lambda net: FeatureAblation(net, Target("y", 1), mask=Grid((4, 4))), 4),
    ],
    ids=["Gradient", "IntegratedGradients", "VarGrad", "Conductance", "FeatureAblation"],
)
def test_by_default_it_is_a_few_times_that_of_one_pass(network, make, times):
    td = images(8)
    assert peak(make(network), td) <= times * peak(once(network), td)


@pytest.mark.parametrize(("batch", "n_steps"), [(1, 200), (4, 50), (8, 25), (32, 12)])
@pytest.mark.parametrize("make", [lenet, strided, vgg])
def test_a_path_of_images_takes_no_more_than_four_passes(make, batch, n_steps):
    """Frozen networks, of which one pass takes the least."""
    torch.manual_seed(0)
    network, td = make(), images(batch)
    explain = IntegratedGradients(network, Target("y", 1), n_steps=n_steps)
    assert peak(explain, td) <= 4 * peak(once(network), td)


@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_a_path_of_small_rows_takes_two_megabytes_or_so(batch):
    network, td = mlp(), TensorDict(x=torch.randn(batch, 4), batch_size=[batch])
    explain = IntegratedGradients(network, Target("y", 1), n_steps=200)
    assert peak(explain, td) <= max(4 * peak(once(network), td), 2.5 * 2**20)


def test_it_grows_with_the_rows_in_flight_and_not_with_the_steps(network):
    def of(n_steps, chunk_size):
        return peak(IntegratedGradients(network, Target("y", 1), n_steps=n_steps, chunk_size=chunk_size), images(2))

    assert of(40, 80) > 6 * of(40, 8)
    assert of(200, 8) < 1.2 * of(40, 8)


def test_a_last_piece_with_fewer_rows_pulls_back_no_more_targets_at_once(monkeypatch):
    call, seen = Pullback.__call__, []

    def spy(self, many, *args, **kwargs):
        seen.append((many.batch_size[0], kwargs["width"]))
        return call(self, many, *args, **kwargs)

    monkeypatch.setattr(Pullback, "__call__", spy)
    IntegratedGradients(lenet(), Target("y", range(10)), n_steps=18)(images(1))
    assert seen == [(8, 1), (8, 1), (2, 1)]


def test_a_large_batch_goes_in_pieces(network):
    td = images(256)
    assert peak(Gradient(network, Target("y", 1)), td) < 0.25 * peak(once(network), td)
