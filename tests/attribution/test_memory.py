"""Peak memory by torch's own count: bounded by the rows in flight, and so by default."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Conductance, Gradient, IntegratedGradients, Site, Target, VarGrad
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


def test_it_grows_with_the_rows_in_flight_and_not_with_the_steps(network):
    def of(n_steps, chunk_size):
        return peak(IntegratedGradients(network, Target("y", 1), n_steps=n_steps, chunk_size=chunk_size), images(2))

    assert of(40, 80) > 6 * of(40, 8)
    assert of(200, 8) < 1.2 * of(40, 8)


def test_a_large_batch_goes_in_pieces(network):
    td = images(256)
    assert peak(Gradient(network, Target("y", 1)), td) < 0.25 * peak(once(network), td)
