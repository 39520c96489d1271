"""LRP against the plain gradient of the same run: forward and input-backward on one thread, batch 8.

Aims, as ratios to forward + input-backward: epsilon 1.3; EpsilonPlusFlat 1.5 for non-negative inputs, 2.0 for any sign;
Alpha2Beta1Flat 2.1; ten targets in one pass less than half of ten passes. Forms take turns; medians of CPU time.
"""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts import Target
from tdconcepts.lrp import LRP, EpsilonAlpha2Beta1Flat, EpsilonPlus, EpsilonPlusFlat, UniformEpsilon

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from lrp.nets import ResNet18, as_td, prepared, vgg11

COMPOSITES = {
    "epsilon": UniformEpsilon(1e-6),
    "plus flat": EpsilonPlusFlat(),
    "alpha 2 beta 1 flat": EpsilonAlpha2Beta1Flat(),
}


def alternating_medians(forms, rounds):
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.process_time()
            form()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("size", [64, 112])
@pytest.mark.parametrize("net", [vgg11, ResNet18])
@pytest.mark.benchmark(group="lrp / forward + input-backward")
def test_convolutional_nets(benchmark, net, size, convention):
    torch.manual_seed(0)
    model = prepared(net(), dtype=torch.float32)
    x = torch.rand(8, 3, size, size)
    td = TensorDict(x=x, batch_size=[8])

    def plain():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).amax(1).sum(), leaf)

    explainers = {
        name: LRP(as_td(model), composite, Target("logits", "argmax"), convention=convention)
        for name, composite in COMPOSITES.items()
    }
    forms = {name: lambda explainer=explainer: explainer(td.copy()) for name, explainer in explainers.items()}
    medians = alternating_medians({"plain": plain, **forms}, 5)
    ratios = {name: round(seconds / medians["plain"], 2) for name, seconds in medians.items()}
    benchmark.extra_info.update(ratios)
    benchmark.pedantic(forms["plus flat"], rounds=1)
    print(f"\n{net.__name__} {size}: {ratios}")


@pytest.mark.benchmark(group="lrp / forward + input-backward")
def test_ten_targets_in_one_pass(benchmark):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()
    net, td = as_td(nn.Sequential(*layers, nn.LazyLinear(10))), TensorDict(x=torch.randn(8, 3, 32, 32), batch_size=[8])
    net(td.copy())
    together = LRP(net, EpsilonPlus(), Target("logits", range(10)))
    each = [LRP(net, EpsilonPlus(), Target("logits", i)) for i in range(10)]
    medians = alternating_medians(
        {"together": lambda: together(td.copy()), "ten": lambda: [one(td.copy()) for one in each]}, 10
    )
    ratio = round(medians["together"] / medians["ten"], 2)
    benchmark.extra_info.update(ratio=ratio)
    benchmark.pedantic(lambda: together(td.copy()), rounds=3)
    print(f"\nten targets in one pass / ten passes: {ratio}")
