"""Explainers by gradients against hand-written autograd through the same TensorDictModule, Captum and PnPXAI."""

import itertools

import captum.attr
import numpy
import pytest
import torch
from lrp.nets import vgg11
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.nn.functional import interpolate

from tdconcepts import (
    Conductance,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    ExpectedGradients,
    FullGrad,
    GradCAM,
    Gradient,
    GuidedBackprop,
    GuidedGradCAM,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    NeuronConductance,
    Saliency,
    Site,
    SmoothGrad,
    SmoothGradSquared,
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


def lenet():
    """The network of the study that set the aims against Captum, with its frozen parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return module(*layers, nn.Linear(32 * 64, 128), nn.ReLU(), nn.Linear(128, 10)).requires_grad_(False)


def cnn():
    """Strides in the place of pools: a backward pass is two and a half times a forward one."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return module(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16 * 16, 10))


def vgg():
    """The eleven layers of VGG, narrow, for small images."""
    torch.manual_seed(0)
    layers, width = [], 3
    for one in [8, None, 16, None, 32, 32, None, 64, 64, None, 64, 64, None]:
        layers += [nn.MaxPool2d(2)] if one is None else [nn.Conv2d(width, one, 3, padding=1), nn.ReLU()]
        width = one or width
    return module(*layers, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


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


def last_map(layers):
    """The number of the ReLU behind the last convolution."""
    return max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)) + 1


def raw_cam(net):
    cut = last_map(net.module) + 1

    def form(td):
        layers, x = net.module, td.get("x")
        hidden = layers[:cut](x).detach().requires_grad_()
        gradient = torch.autograd.grad(layers[cut:](hidden)[:, Y].sum(), hidden)[0]
        return (gradient.mean((2, 3), keepdim=True) * hidden).sum(1, keepdim=True).relu().detach()

    return form


def raw_layers(layers, h, relu):
    for layer in layers:
        h = relu(h) if isinstance(layer, nn.ReLU) else layer(h)
    return h


class GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, flow):
        return torch.ops.aten.threshold_backward(flow.clamp(min=0), *ctx.saved_tensors, 0)


class DeconvReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, flow):
        return flow.clamp(min=0)


class Rescaled(torch.autograd.Function):
    """DeepLIFT's ReLU: the change of y over the change of x, and the derivative where x does not change."""

    @staticmethod
    def forward(ctx, x, base):
        y = x.relu()
        ctx.save_for_backward(x, base, y)
        return y

    @staticmethod
    def backward(ctx, flow):
        x, base, y = ctx.saved_tensors
        step = x - base
        near = step.abs() < 1e-10
        return flow * torch.where(near, (x > 0).to(x.dtype), (y - base.relu()) / step.masked_fill(near, 1)), None


def raw_changed(net, relu):
    def form(td):
        x = td.get("x").detach().requires_grad_()
        return torch.autograd.grad(raw_layers(net.module, x, relu.apply)[:, Y].sum(), x)[0]

    return form


def raw_guided_cam(net):
    guided, cam = raw_changed(net, GuidedReLU), raw_cam(net)
    return lambda td: guided(td) * interpolate(cam(td), size=td.get("x").shape[2:])


def raw_full(net):
    def form(td):
        h = x = td.get("x").detach().requires_grad_()
        at, biases = [x], [x]
        for layer in net.module:
            h = layer(h)
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                at.append(h)
                biases.append(layer.bias if h.ndim == 2 else layer.bias.view(-1, 1, 1))
        gradients = torch.autograd.grad(h[:, Y].sum(), at)
        return [(g * b).detach() for g, b in zip(gradients, biases, strict=True)]

    return form


def raw_lift(net, base=None):
    """``base``: one row of baselines for all; without one zeros, a row for each."""

    def form(td):
        x = td.get("x").detach().requires_grad_()
        start = torch.zeros_like(x) if base is None else base.unsqueeze(0)
        inner = []
        with torch.no_grad():
            raw_layers(net.module, start, lambda h: inner.append(h) or h.relu())
        others = iter(inner)
        y = raw_layers(net.module, x, lambda h: Rescaled.apply(h, next(others)))
        return torch.autograd.grad(y[:, Y].sum(), x)[0] * (x - start).detach()

    return form


def raw_leg(net, x):
    """The first layers' output at one point of the path, and the gradient there."""
    with torch.no_grad():
        hidden = net.module[:2](x)
    hidden.requires_grad_()
    return hidden, torch.autograd.grad(net.module[2:](hidden)[:, Y].sum(), hidden)[0]


def raw_conductance(net, n=50):
    def form(td):
        total, last = 0, None
        for i in range(n + 1):
            value, gradient = raw_leg(net, i / n * td.get("x"))
            if last is not None:
                total = total + 0.5 * (value.detach() - last[0]) * (gradient + last[1])
            last = value.detach(), gradient
        return total

    return form


def raw_influence(net, n=50):
    points, weights = numpy.polynomial.legendre.leggauss(n)

    def form(td):
        x = td.get("x")
        return sum(w / 2 * raw_leg(net, (0.5 + p / 2) * x)[1] for p, w in zip(points, weights, strict=True))

    return form


def raw_layer_integral(net, n=50):
    points, weights = numpy.polynomial.legendre.leggauss(n)

    def form(td):
        with torch.no_grad():
            end, start = net.module[:2](td.get("x")), net.module[:2](torch.zeros_like(td.get("x")))
        total = 0
        for p, w in zip(points, weights, strict=True):
            hidden = (start + (0.5 + p / 2) * (end - start)).requires_grad_()
            total = total + w / 2 * torch.autograd.grad(net.module[2:](hidden)[:, Y].sum(), hidden)[0]
        return total * (end - start)

    return form


def raw_neuron_conductance(net, neuron, n=50):
    points, weights = numpy.polynomial.legendre.leggauss(n)

    def form(td):
        total, x = 0, td.get("x")
        for p, w in zip(points, weights, strict=True):
            at = ((0.5 + p / 2) * x).requires_grad_()
            hidden = net.module[:2](at)
            one = hidden[(slice(None), *neuron)]
            flow = torch.autograd.grad(net.module[2:](hidden)[:, Y].sum(), hidden, retain_graph=True)[0]
            total = total + w / 2 * torch.autograd.grad(one, at, flow[(slice(None), *neuron)])[0]
        return total * x

    return form


def peak(form, td):
    """The most bytes that torch held at once, besides what was there before."""
    form(td.copy())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        form(td.copy())
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return torch.tensor([0, *(size for _, size in changes)]).cumsum(0).max().item()


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


@pytest.mark.parametrize(("make", "batch"), [(lenet, 1), (lenet, 4), (lenet, 8), (cnn, 1), (cnn, 16)])
def test_ten_classes_of_a_cnn(compare, make, batch):
    """One forward for all; backwards there are ten in either case, so that 2.5 is out of reach where they dominate."""
    net = make()
    compare(
        f"Saliency of 10 classes, {make.__name__} 32x32, batch {batch} / Captum one by one",
        Saliency(net, Target("y", list(range(10)))),
        classes_one_by_one(net),
        rows(batch, 3, 32, 32),
        [X],
        faster=2.5,
    )


# Each gradient method: ours, the key, by hand, Captum's where it gives the same numbers, the batch.
IMAGES = {
    "Saliency": (
        lambda net: Saliency(net, Target("y", Y)),
        lambda net: lambda td: raw_gradient(net, td.get("x")).abs(),
    ),
    "InputXGradient": (
        lambda net: InputXGradient(net, Target("y", Y)),
        lambda net: lambda td: raw_gradient(net, td.get("x")) * td.get("x"),
        lambda net: captum.attr.InputXGradient(net),
    ),
    "GradCAM": (
        lambda net: GradCAM(net, Target("y", Y), str(last_map(net.module))),
        raw_cam,
        lambda net: captum.attr.LayerGradCam(net, net[last_map(net)]),
        {"relu_attributions": True},
    ),
    "GuidedBackprop": (
        lambda net: GuidedBackprop(net, Target("y", Y)),
        lambda net: raw_changed(net, GuidedReLU),
        lambda net: captum.attr.GuidedBackprop(net),
    ),
    "Deconvolution": (
        lambda net: Deconvolution(net, Target("y", Y)),
        lambda net: raw_changed(net, DeconvReLU),
        lambda net: captum.attr.Deconvolution(net),
    ),
    "GuidedGradCAM": (
        lambda net: GuidedGradCAM(net, Target("y", Y), str(last_map(net.module))),
        raw_guided_cam,
        lambda net: captum.attr.GuidedGradCam(net, net[last_map(net)]),
    ),
    "FullGrad": (lambda net: FullGrad(net, Target("y", Y)), raw_full),
    "DeepLift": (
        lambda net: DeepLift(net, Target("y", Y)),
        raw_lift,
        lambda net: captum.attr.DeepLift(net),
    ),
    "SmoothGrad, 20 draws": (
        lambda net: SmoothGrad(Gradient(net, Target("y", Y))),
        lambda net: raw_draws(net, lambda each: each.mean(0)),
    ),
    "SmoothGradSquared, 20 draws": (
        lambda net: SmoothGradSquared(Gradient(net, Target("y", Y))),
        lambda net: raw_draws(net, lambda each: each.square().mean(0)),
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


ONE_PASS = ["Saliency", "InputXGradient", "GradCAM", "GuidedBackprop", "Deconvolution", "GuidedGradCAM", "FullGrad"]


@pytest.mark.parametrize(
    ("make_net", "name"), [*((cnn, name) for name in IMAGES), *((vgg11, name) for name in ONE_PASS)]
)
def test_methods_of_images(compare, make_net, name):
    """Two convolutions of 4 ms, where what a call costs beside them is seen best; and VGG11, at 64x64."""
    net = cnn() if make_net is cnn else module(*vgg11()).requires_grad_(False)
    batch, size = (16, 32) if make_net is cnn else (8, 64)
    make, by_hand, *peer = IMAGES[name]
    ours, form = make(net), by_hand(net)
    keys = [key for key in ours.out_keys if key[0] == "attribution"]
    if peer:
        theirs, options = peer[0](net.module), dict(*peer[1:])
    compare(
        f"{name}, {'CNN' if make_net is cnn else 'VGG11'} {size}x{size}, batch {batch}",
        ours,
        form,
        rows(batch, 3, size, size),
        keys,
        at_most=1.1,
        peers={"Captum's": lambda td: theirs.attribute(td.get("x"), target=Y, **options)} if peer else None,
        tolerance=1e-5 if "draws" not in name and "samples" not in name else 0.1,
    )


PATHS = {
    "Conductance": (
        lambda net: Conductance(net, Target("y", Y), Site("1")),
        lambda net: raw_conductance(net),
        lambda net: captum.attr.LayerConductance(net, net[1]),
    ),
    "InternalInfluence": (
        lambda net: InternalInfluence(net, Target("y", Y), Site("1")),
        lambda net: raw_influence(net),
        lambda net: captum.attr.InternalInfluence(net, net[1]),
    ),
    "IntegratedGradients at a layer": (
        lambda net: IntegratedGradients(net, Target("y", Y), Site("1")),
        lambda net: raw_layer_integral(net),
        lambda net: captum.attr.LayerIntegratedGradients(net, net[1]),
    ),
    "NeuronConductance": (
        lambda net: NeuronConductance(net, Target("y", Y), "1", (4, 5, 6)),
        lambda net: raw_neuron_conductance(net, (4, 5, 6)),
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_through_a_layer(compare, name):
    """50 steps. Captum's conductance is another sum, which leaves out the ends of the path."""
    net, td = cnn(), rows(4, 3, 32, 32)
    make, by_hand, *peer = PATHS[name]
    ours = make(net)
    key = ours.out_keys[0]
    if peer:
        theirs = peer[0](net.module)
    compare(
        f"{name}, 50 steps, CNN 32x32, batch 4",
        lambda td: ours(td).get(key),
        by_hand(net),
        td,
        [key],
        at_most=1.1,
        peers={"Captum's": lambda td: theirs.attribute(td.get("x"), target=Y)} if peer else None,
        tolerance=1e-5 if name != "Conductance" else 1e-3,
    )


def test_deep_lift_shap(compare):
    net, base = cnn(), torch.randn(10, 3, 32, 32)
    explain = captum.attr.DeepLiftShap(net.module)
    ours = DeepLiftShap(net, Target("y", Y), baselines=TensorDict(x=base, batch_size=[10]))
    compare(
        "DeepLiftShap, 10 baselines, CNN 32x32, batch 4",
        ours,
        lambda td: sum(raw_lift(net, one)(td) for one in base) / len(base),
        rows(4, 3, 32, 32),
        [X],
        at_most=1.1,
        peers={"Captum's": lambda td: explain.attribute(td.get("x"), base, target=Y)},
    )


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize(("make", "memory"), [(lenet, True), (lenet, False), (cnn, True)])
def test_integrated_gradients_of_captum(compare, make, memory, count):
    """At equal memory, measured: the fewest rows at once of Captum's whose peak is not below ours; and by default."""
    net, td = make(), rows(4, 3, 32, 32)
    explain = captum.attr.IntegratedGradients(net.module)
    ours = IntegratedGradients(net, Target("y", Y if count == 1 else list(range(10))))

    def loop(at_once):
        def form(td):
            each = [Y] if count == 1 else range(count)
            found = [explain.attribute(td.get("x"), target=i, internal_batch_size=at_once) for i in each]
            return found[0] if count == 1 else torch.stack(found, 1)

        return form

    at_once, how = None, "all rows at once"
    if memory:
        limit, sizes = peak(ours, td), range(len(td), 51 * len(td), len(td))
        at_once = next(size for size in sizes if peak(loop(size), td) >= limit)
        how = f"{at_once} rows at once: as much memory, {limit / 2**20:.1f} MiB"
    compare(
        f"IntegratedGradients, 50 steps, {count} targets, {make.__name__} 32x32, batch 4 / Captum, {how}",
        ours,
        loop(at_once),
        td,
        [X],
        **({"at_most": 1.0} if count == 1 else {"faster": 2}),
    )


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("lenet 32x32", lenet, [3, 32, 32]),
        ("cnn 32x32", cnn, [3, 32, 32]),
        ("VGG-11, narrow, 32x32", vgg, [3, 32, 32]),
        ("MLP 4-64-64-2", lambda: mlp(4, 64, 64, 2), [4]),
        ("MLP 784-256-256-10", lambda: mlp(784, 256, 256, 10), [784]),
    ],
)
def test_memory_of_integrated_gradients(compare, name, make, shape):
    """Not the time but the most memory that torch holds, of frozen networks: it is the same in each round."""
    net = make().requires_grad_(False)
    ours = IntegratedGradients(net, Target("y", Y), n_steps=200)
    for batch in (1, 4, 8, 32):
        td = rows(batch, *shape)
        taken, once = (peak(form, td) for form in (ours, lambda td: raw_gradient(net, td.get("x"))))
        limit = 4.0 if len(shape) > 1 else max(4.0, 2.5 * 2**20 / once)
        aim = "<= 4" if len(shape) > 1 else "<= 4, or 2.5 MiB"
        compare.add(
            f"KiB, not us: IntegratedGradients, 200 steps, {name}, batch {batch} / one forward and backward",
            *(1e-6 * size / 2**10 for size in (taken, once)),
            [taken / once],
            aim,
            taken <= limit * once,
        )
    compare.benchmark.pedantic(ours, setup=lambda: ((rows(1, *shape),), {}), rounds=1)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("draws", [20, 100])
def test_vargrad_of_pnpxai(compare, batch, draws):
    """Its numbers are others: it subtracts the mean, not its square; relative noise, one draw after the other."""
    net = mlp(17, 64, 64, 6)
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
