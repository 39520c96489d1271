"""Explainers by gradients against hand-written autograd through the same TensorDictModule, Captum and PnPXAI."""

import itertools

import captum.attr
import numpy
import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import (
    ExpectedGradients,
    GradCAM,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    Site,
    SmoothGrad,
    Target,
    VarGrad,
)

X, Y = ("attribution", "x"), 1  # what is written, and the output that is explained

pytestmark = [
    pytest.mark.benchmark(group="attribution"),
    pytest.mark.filterwarnings("ignore::UserWarning:captum"),
]


def module(*layers):
    return TensorDictModule(nn.Sequential(*layers), ["x"], ["y"])


def mlp(*sizes, between=nn.Tanh):
    torch.manual_seed(0)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), between())]
    return module(*layers[:-1])


def cnn():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return module(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16 * 16, 10))


def rows(batch, *shape):
    return TensorDict(x=torch.randn(batch, *shape), batch_size=[batch])


def written(td, attribution):
    return td.set(X, attribution)


def raw_gradient(net, x, by=None):
    """The gradient of one output of each row; ``by``: which one."""
    x = x.detach().requires_grad_()
    y = net(TensorDict({"x": x}, batch_size=x.shape[:1])).get("y")
    value = y[..., Y] if by is None else y.gather(-1, by.unsqueeze(-1)).squeeze(-1)
    return torch.autograd.grad(value, x, torch.ones_like(value))[0]


def raw_integral(net, n=50):
    """All points of the path in one batch; the quadrature is made beforehand."""
    points, weights = (torch.tensor(each / 2, dtype=torch.float32) for each in numpy.polynomial.legendre.leggauss(n))
    points = points + 0.5

    def form(td):
        x = td.get("x")
        path = points.view(-1, *[1] * x.ndim) * x
        gradients = raw_gradient(net, path.flatten(0, 1)).view(path.shape)
        return written(td, torch.tensordot(weights, gradients, 1) * x)

    return form


def raw_cam(net):
    def form(td):
        layers, x = net.module, td.get("x")
        hidden = layers[:4](x).detach().requires_grad_()
        gradient = torch.autograd.grad(layers[4:](hidden)[:, Y].sum(), hidden)[0]
        return (gradient.mean((2, 3), keepdim=True) * hidden).sum(1, keepdim=True).relu().detach()

    return form


def raw_draws(net, combine, draws=20, scale=0.1):
    """A loop: one pass for each draw, which is the fastest form for a convolution on a CPU."""

    def form(td):
        x = td.get("x")
        size = scale * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        noise = torch.randn(draws, *x.shape) * size
        return combine(torch.stack([raw_gradient(net, x + one) for one in noise]))

    return form


def raw_expected(net, n=20):
    def form(td):
        x = td.get("x")
        torch.randint(1, (n,))  # as many numbers as ours draws
        at = torch.rand(n).view(-1, 1, 1, 1, 1)
        return sum(x * raw_gradient(net, one * x) for one in at) / n

    return form


def classes_one_by_one(net, n=10):
    explain = captum.attr.Saliency(net.module)
    return lambda td: torch.stack([explain.attribute(td.get("x"), target=i) for i in range(n)], 1)


def saliency(net):
    explain = captum.attr.Saliency(net.module)
    return lambda td: explain.attribute(td.get("x"), target=Y, abs=False)


def test_gradient_of_an_mlp(compare):
    net = mlp(4, 64, 64, 2)
    compare(
        "Gradient, MLP 4-64-64-2, batch 8",
        Gradient(net, Target("y", Y)),
        lambda td: written(td, raw_gradient(net, td.get("x"))),
        rows(8, 4),
        [X],
        at_most=1.3,
        peers={"Captum's Saliency of the bare network": saliency(net)},
    )


def test_gradient_of_the_chosen_action(compare):
    net = mlp(4, 64, 64, 2)
    compare(
        'Gradient, MLP 4-64-64-2, batch 8, by="action"',
        Gradient(net, Target("y", by="action")),
        lambda td: written(td, raw_gradient(net, td.get("x"), td.get("action"))),
        rows(8, 4).set("action", torch.randint(2, (8,))),
        [X],
        at_most=1.3,
    )


def test_gradient_of_a_cnn(compare):
    net = cnn()
    compare(
        "Gradient, CNN 32x32, batch 16",
        Gradient(net, Target("y", Y)),
        lambda td: written(td, raw_gradient(net, td.get("x"))),
        rows(16, 3, 32, 32),
        [X],
        at_most=1.05,
        peers={"Captum's Saliency of the bare network": saliency(net)},
    )


@pytest.mark.parametrize("batch", [1, 16])
def test_ten_classes_of_a_cnn(compare, batch):
    """One forward for all; backwards there are ten in either case, so that 2.5 is out of reach where they dominate."""
    net = cnn()
    compare(
        f"Saliency of 10 classes, CNN 32x32, batch {batch} / Captum one by one",
        Saliency(net, Target("y", list(range(10)))),
        classes_one_by_one(net),
        rows(batch, 3, 32, 32),
        [X],
        faster=2.5,
    )


IMAGES = {
    "Saliency": (
        lambda net: Saliency(net, Target("y", Y)),
        lambda net: lambda td: raw_gradient(net, td.get("x")).abs(),
    ),
    "InputXGradient": (
        lambda net: InputXGradient(net, Target("y", Y)),
        lambda net: lambda td: raw_gradient(net, td.get("x")) * td.get("x"),
    ),
    "GradCAM": (lambda net: GradCAM(net, Target("y", Y), "3"), raw_cam),
    "SmoothGrad, 20 draws": (
        lambda net: SmoothGrad(Gradient(net, Target("y", Y))),
        lambda net: raw_draws(net, lambda each: each.mean(0)),
    ),
    "VarGrad, 20 draws": (
        lambda net: VarGrad(Gradient(net, Target("y", Y))),
        lambda net: raw_draws(net, lambda each: each.var(0, correction=0)),
    ),
    "ExpectedGradients, 20 samples": (
        lambda net: ExpectedGradients(
            net, Target("y", Y), baselines=TensorDict(x=torch.zeros(1, 3, 32, 32), batch_size=[1]), n_samples=20
        ),
        raw_expected,
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_methods_of_images(compare, name):
    net = cnn()
    make, by_hand = IMAGES[name]
    key = ("attribution", "3") if name == "GradCAM" else X
    ours = make(net)
    compare(
        f"{name}, CNN 32x32, batch 16",
        lambda td: ours(td).get(key),
        by_hand(net),
        rows(16, 3, 32, 32),
        [key],
        at_most=1.1,
        tolerance=1e-5 if "draws" not in name and "samples" not in name else 0.1,
    )


@pytest.mark.parametrize("at_once", [16, None])
@pytest.mark.parametrize("count", [1, 10])
def test_integrated_gradients_of_captum(compare, count, at_once):
    """At equal memory, and as it comes: all points of the path in one batch."""
    net = cnn()
    explain = captum.attr.IntegratedGradients(net.module)

    def loop(td):
        each = [Y] if count == 1 else range(count)
        found = [explain.attribute(td.get("x"), target=i, internal_batch_size=at_once) for i in each]
        return found[0] if count == 1 else torch.stack(found, 1)

    compare(
        f"IntegratedGradients, 50 steps, {count} targets, CNN 32x32, batch 4 / Captum, "
        + ("all rows at once" if at_once is None else f"{at_once} rows at once, as ours"),
        IntegratedGradients(net, Target("y", Y if count == 1 else list(range(10)))),
        loop,
        rows(4, 3, 32, 32),
        [X],
        **({"at_most": 1.0} if count == 1 else {"faster": 2}),
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_vargrad_of_pnpxai(compare, batch):
    """Its numbers are others: it subtracts the mean, not its square; relative noise, one draw after the other."""
    net, draws = mlp(17, 64, 64, 6), 20
    theirs = oracle("pnpxai.explainers").VarGrad(net.module, noise_level=0.1, n_iter=draws)
    compare(
        f"VarGrad, {draws} draws, MLP 17-64-64-6, batch {batch} / PnPXAI",
        VarGrad(Gradient(net, Target("y", Y)), noise_level=0.1, n_iter=draws),
        lambda td: theirs.attribute(td.get("x"), torch.full((batch,), Y)),
        rows(batch, 17),
        [X],
        faster=8,
        tolerance=10.0,
    )


def test_integrated_gradients_of_an_mlp(compare):
    net = mlp(4, 64, 64, 2)
    explain = captum.attr.IntegratedGradients(net.module)
    compare(
        "IntegratedGradients, 50 steps, MLP 4-64-64-2, batch 8",
        IntegratedGradients(net, Target("y", Y)),
        raw_integral(net),
        rows(8, 4),
        [X],
        at_most=1.2,
        peers={"Captum's of the bare network": lambda td: explain.attribute(td.get("x"), target=Y)},
    )


@pytest.mark.parametrize("chunk_size", [None, 200])
def test_integrated_gradients_of_a_cnn(compare, chunk_size):
    net = cnn()
    chunks = "" if chunk_size is None else ", in one chunk"
    compare(
        f"IntegratedGradients, 50 steps, CNN 32x32, batch 4{chunks}",
        IntegratedGradients(net, Target("y", Y), chunk_size=chunk_size),
        raw_integral(net),
        rows(4, 3, 32, 32),
        [X],
        at_most=1.05,
    )


def test_many_neurons(compare):
    net, neurons = mlp(17, 128, 128, 6, between=nn.ReLU), range(128)
    explain = captum.attr.NeuronGradient(net.module, net.module[2])
    compare(
        "Gradient of 128 neurons, MLP 17-128-128-6, batch 8 / Captum's loop",
        Gradient(net, Target(Site("2"), neurons)),
        lambda td: torch.stack([explain.attribute(td.get("x"), i) for i in neurons], 1),
        rows(8, 17),
        [X],
        faster=4,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_vargrad(compare, batch):
    net, draws = mlp(17, 64, 64, 6), 20

    def loop(td):
        x = td.get("x")
        scale = 0.1 * (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))
        noise = torch.randn(draws, *x.shape) * scale
        gradients = torch.stack([raw_gradient(net, x + one) for one in noise])
        return written(td, gradients.var(0, correction=0))

    compare(
        f"VarGrad, {draws} draws, MLP 17-64-64-6, batch {batch} / a loop of gradients",
        VarGrad(Gradient(net, Target("y", Y)), noise_level=0.1, n_iter=draws),
        loop,
        rows(batch, 17),
        [X],
        faster=8 if batch == 1 else None,
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler uses it
@torch.no_grad()  # as in a collector
def test_compiled_gradient(compare):
    torch.manual_seed(0)
    policy = TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(4, 64), nn.Tanh()), ["x"], ["hidden"]),
        TensorDictModule(nn.Linear(64, 64), ["hidden"], ["concept"]),
        TensorDictModule(nn.Linear(64, 2), ["concept"], ["y"]),
    )
    eager = Gradient(policy, Target("y", by="action"), "x")
    compare(
        "Gradient of the policy, compiled, batch 16 / eager",
        torch.compile(eager, fullgraph=True),
        eager,
        rows(16, 4).set("action", torch.randint(2, (16,))),
        [X],
        faster=3,
    )
