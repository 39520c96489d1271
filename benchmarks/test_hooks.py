"""Captures and patches against raw forward hooks, registered and removed at each call, that give the same entries."""

import pytest
import torch
from tdhook.latent import ActivationCaching
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Replace, Site, capture, patch

LAYERS, ROWS = 12, 8
PATHS = [str(2 * i) for i in range(LAYERS)]

pytestmark = pytest.mark.benchmark(group="hooks")
widths = pytest.mark.parametrize("width", [64, 1024])


def mlp(width):
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = TensorDictModule(nn.Sequential(*layers), ["x"], ["y"]).requires_grad_(False)
    return net, TensorDict(x=torch.randn(ROWS, width), batch_size=[ROWS])


def run_hooked(net, hooks, td):
    """What one writes by hand: ``hooks`` on modules for the time of one call."""
    handles = [net.module[int(path)].register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        return net(td)
    finally:
        for handle in handles:
            handle.remove()


def storing(found, path):
    def hook(module, args, output):
        found[path] = output

    return hook


def raw_dict(net):
    def form(td):
        found = {}
        run_hooked(net, {path: storing(found, path) for path in PATHS}, td)
        return list(found.values())

    return form


def raw_entries(net):
    def form(td):
        found = {}
        td = run_hooked(net, {path: storing(found, path) for path in PATHS}, td)
        return td.set("activation", TensorDict(found, batch_size=td.batch_size))

    return form


def entered(context):
    def form(td):
        with context as module:
            return module(td)

    return form


@widths
def test_capture(compare, width):
    net, td = mlp(width)
    context = ActivationCaching(r"module\.\d*[02468]$").prepare(net)

    def tdhook(td):
        with context as module:
            return list(module(td).get("cache").values())

    compare(
        f"capture, width {width}, entered each time",
        entered(capture(net, *PATHS)),
        raw_entries(net),
        td,
        ["activation"],
        at_most=1.3 if width == 64 else 1.1,
        peers={"TDHook's ActivationCaching": tdhook},
    )


@widths
def test_capture_against_a_dict(compare, width):
    net, td = mlp(width)
    context = entered(capture(net, *PATHS))
    compare(f"capture, width {width} / hooks that fill a dict", context, raw_dict(net), td, ["activation"])


@widths
def test_capture_made_anew(compare, width):
    net, td = mlp(width)
    compare(
        f"capture, width {width}, made anew each time",
        lambda td: entered(capture(net, *PATHS))(td),
        raw_entries(net),
        td,
        ["activation"],
    )


@widths
def test_capture_standing(compare, width):
    net, td = mlp(width)
    with capture(net, *PATHS) as module:
        compare(f"capture, width {width}, entered once", module, raw_entries(net), td, ["activation"])


def raw_patch(net, value):
    return lambda td: run_hooked(net, {"10": lambda module, args, output: value}, td)


@widths
def test_patch(compare, width):
    net, td = mlp(width)
    value = torch.randn(ROWS, width)
    context = entered(patch(net, {Site("10"): Replace(value)}))
    compare(f"patch, width {width}, entered each time", context, raw_patch(net, value), td, ["y"], at_most=1.5)


@widths
def test_patch_made_anew(compare, width):
    net, td = mlp(width)
    value = torch.randn(ROWS, width)
    compare(
        f"patch, width {width}, made anew each time",
        lambda td: entered(patch(net, {Site("10"): Replace(value)}))(td),
        raw_patch(net, value),
        td,
        ["y"],
    )
