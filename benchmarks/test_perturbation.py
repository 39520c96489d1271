"""Methods of forward passes against Captum's, and against hand-written PyTorch: the forwards they can't do without."""

import captum.attr
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.perturbation import FeatureAblation, Grid, KernelShap, Lime, Occlusion, ShapleyExact, ShapleySampling

IMAGE, ROW, Y = ("attribution", "image"), ("attribution", "x"), 1

pytestmark = [
    pytest.mark.benchmark(group="perturbation"),
    pytest.mark.filterwarnings("ignore::UserWarning:captum", "ignore:.*attention mask.*:UserWarning"),
]


def strided(side=32):
    """Convolutions alone: their arithmetic is nearly all there is to pay, for everyone."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * (side // 2) ** 2, 10))
    return TensorDictModule(layers, ["image"], ["y"])


def pooled(side=32):
    """The CNN on which Captum's loops were first measured: two convolutions, each pooled, and two linear layers."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    convolved = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers = nn.Sequential(*convolved, nn.Linear(32 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10))
    return TensorDictModule(layers, ["image"], ["y"])


class Mean(nn.Module):
    """A model that costs next to nothing."""

    def forward(self, image):
        return image.mean((1, 2, 3)).unsqueeze(-1).expand(-1, 2)


def mlp():
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 6)), ["x"], ["y"])


def images(batch, side=32):
    return TensorDict(image=torch.randn(batch, 3, side, side), batch_size=[batch])


def observations(batch):
    return TensorDict(x=torch.randn(batch, 17), batch_size=[batch])


def captums(explainer, key, **options):
    return lambda td: explainer.attribute(td.get(key), target=Y, **options)


def loop(net, side=32, tile=4):
    """One copy of the images, of which one tile at a time is taken away and put back."""

    def form(td):
        x = td.get("image")
        with torch.no_grad():
            whole = net.module(x)[:, Y]
            found, moved = torch.empty_like(x), x.clone()
            for row in range(0, side, tile):
                for column in range(0, side, tile):
                    at = (..., slice(row, row + tile), slice(column, column + tile))
                    moved[at] = 0.0
                    found[at] = (whole - net.module(moved)[:, Y]).view(-1, 1, 1, 1)
                    moved[at] = x[at]
        return found

    return form


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("net", [pooled, strided])
def test_feature_ablation(compare, net, batch):
    model = net()
    compare(
        f"FeatureAblation, 64 tiles, {net.__name__} CNN, batch {batch} / a loop in PyTorch",
        FeatureAblation(model, Target("y", Y), mask=Grid((4, 4))),
        loop(model),
        images(batch),
        [IMAGE],
        at_most=1.1,
    )


# Captum's default is one experiment at a time; its best setting is looked for, and is a row of its own.
AT_ONCE = {"Captum": (1,), "the best of": (16, 64)}


@pytest.mark.parametrize("whose", AT_ONCE)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("net", [pooled, strided])
def test_feature_ablation_of_captum(compare, net, batch, whose):
    model, mask = net(), Grid((4, 4))
    groups = mask(torch.Size([3, 32, 32]))[None].contiguous()
    explain = captum.attr.FeatureAblation(model.module)
    compare(
        f"FeatureAblation, 64 tiles, {net.__name__} CNN, batch {batch} / {whose}",
        FeatureAblation(model, Target("y", Y), mask=mask),
        {
            f"{n} at once": captums(explain, "image", feature_mask=groups, perturbations_per_eval=n)
            for n in AT_ONCE[whose]
        },
        images(batch),
        [IMAGE],
        faster=1.5,
    )


@pytest.mark.parametrize("at_once", [1, 64])  # 512 take twice the time of 64
def test_feature_ablation_of_each_number(compare, at_once):
    model = pooled()
    explain = captum.attr.FeatureAblation(model.module)
    compare(
        f"FeatureAblation, 3072 numbers, pooled CNN / Captum, {at_once} at once",
        FeatureAblation(model, Target("y", Y)),
        captums(explain, "image", perturbations_per_eval=at_once),
        images(1),
        [IMAGE],
        faster=1.5,
    )


@pytest.mark.parametrize("whose", AT_ONCE)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("net", [pooled, strided])
def test_occlusion(compare, net, batch, whose):
    model = net()
    explain = captum.attr.Occlusion(model.module)
    windows = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4)}
    compare(
        f"Occlusion, 49 windows, {net.__name__} CNN, batch {batch} / {whose}",
        Occlusion(model, Target("y", Y), window=(8, 8), stride=4),
        {f"{n} at once": captums(explain, "image", perturbations_per_eval=n, **windows) for n in AT_ONCE[whose]},
        images(batch),
        [IMAGE],
        faster=1.5,
    )


def test_shapley_values_of_a_trivial_model(compare):
    net, mask = TensorDictModule(Mean(), ["image"], ["y"]), Grid((16, 16))
    groups = mask(torch.Size([3, 64, 64]))[None].contiguous()
    explain = captum.attr.ShapleyValueSampling(net.module)
    compare(
        "ShapleySampling, 16 tiles x 25, 64x64, a trivial model / Captum",
        ShapleySampling(net, Target("y", Y), n_samples=25, mask=mask),
        captums(explain, "image", feature_mask=groups, n_samples=25),
        images(1, 64),
        [IMAGE],
        faster=20,
        tolerance=1e-4,
    )


def test_shapley_values_of_a_cnn(compare):
    model, mask = pooled(64), Grid((16, 16))
    groups = mask(torch.Size([3, 64, 64]))[None].contiguous()
    explain = captum.attr.ShapleyValueSampling(model.module)
    compare(
        "ShapleySampling, 16 tiles x 25, pooled CNN 64x64 / Captum, 16 at once",
        ShapleySampling(model, Target("y", Y), n_samples=25, mask=mask),
        captums(explain, "image", feature_mask=groups, n_samples=25, perturbations_per_eval=16),
        images(1, 64),
        [IMAGE],
        at_most=1.0,
        tolerance=10.0,  # other orders
    )


def test_kernel_shap(compare):
    net = mlp()
    explain = captum.attr.KernelShap(net.module)
    compare(
        "KernelShap, 100 samples, MLP 17-64-6, batch 8 / Captum",
        KernelShap(net, Target("y", Y), n_samples=100),
        captums(explain, "x", n_samples=100),
        observations(8),
        [ROW],
        faster=5,
        tolerance=100.0,  # other subsets
    )


def test_lime(compare):
    net = mlp()
    explain = captum.attr.Lime(net.module)
    compare(
        "Lime, 100 samples, MLP 17-64-6, batch 8 / Captum",
        Lime(net, Target("y", Y), n_samples=100),
        captums(explain, "x", n_samples=100),
        observations(8),
        [ROW],
        faster=5,
        tolerance=100.0,
    )


def test_exact_shapley_values(compare):
    net, mask = mlp(), torch.arange(17) // 3
    explain = captum.attr.ShapleyValues(net.module)
    compare(
        "ShapleyExact, 6 groups, MLP 17-64-6, batch 8 / Captum's 6! orders",
        ShapleyExact(net, Target("y", Y), mask=mask),
        captums(explain, "x", feature_mask=mask[None]),
        observations(8),
        [ROW],
        faster=20,
        tolerance=1e-4,
    )
