"""Sweeps of 64 experiments: against the same products without a framework (the floor), and against hooked forwards."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.experiments import Sweep, each, every, grid
from tdconcepts.hooks import Ablate, Add, Site

LAYERS, ROWS, N = 12, 8, 64
MIDDLE = 12  # the index of the seventh of the twelve layers
SPREAD = [6] * 4 + [5] * 8  # experiments at each layer

pytestmark = pytest.mark.benchmark(group="experiments")
against = pytest.mark.parametrize("reference", ["floor", "hooked forwards"])
widths = pytest.mark.parametrize("width", [64, 1024])


def mlp(width):
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = TensorDictModule(nn.Sequential(*layers), ["x"], ["y"]).requires_grad_(False)
    return net, TensorDict(x=torch.randn(ROWS, width), batch_size=[ROWS])


def same_layer():
    return every(Site(str(MIDDLE)), Ablate(), range(N))


def spread():
    parts = [every(Site(str(2 * i)), Ablate(), range(n)) for i, n in enumerate(SPREAD)]
    return sum(parts[1:], parts[0])


def hooked(net, places):
    """What one writes by hand: one forward with a hook for each experiment."""

    def form(td):
        found = []
        for path, unit in places:

            def ablate(module, args, output, unit=unit):
                output[:, unit] = 0.0

            handle = net.module[path].register_forward_hook(ablate)
            try:
                found.append(net.module(td["x"]))
            finally:
                handle.remove()
        return [torch.stack(found, 1)]

    return form


@against
@widths
def test_same_layer(compare, width, reference):
    net, td = mlp(width)
    units = torch.arange(N)
    before, after = net.module[: MIDDLE + 1], net.module[MIDDLE + 1 :]

    def floor(td):
        rows = before(td["x"]).expand(N, ROWS, width).clone()
        rows[units, :, units] = 0.0
        return [after(rows.view(N * ROWS, width)).view(N, ROWS, width).movedim(0, 1)]

    sweep = Sweep(net, same_layer())
    by_hand = hooked(net, [(MIDDLE, unit) for unit in range(N)])
    form, aim = (floor, {"at_most": 1.25}) if reference == "floor" else (by_hand, {"faster": 4})
    compare(f"sweep, one layer, width {width} / {reference}", sweep, form, td, [("sweep", "y")], **aim)


@against
@widths
def test_spread(compare, width, reference):
    net, td = mlp(width)

    def floor(td):
        rows, slots = td["x"], 1
        for i, n in enumerate(SPREAD):
            rows = net.module[2 * i](rows)
            rows = torch.cat([rows, rows[:ROWS].repeat(n, 1)])
            units = torch.arange(n)
            rows.view(-1, ROWS, width)[slots + units, :, units] = 0.0
            rows, slots = net.module[2 * i + 1](rows), slots + n
        return [rows.view(-1, ROWS, width)[1:].movedim(0, 1)]

    sweep = Sweep(net, spread())
    by_hand = hooked(net, [(2 * i, unit) for i, n in enumerate(SPREAD) for unit in range(n)])
    most = 1.6 if width == 64 else 1.15
    form, aim = (floor, {"at_most": most}) if reference == "floor" else (by_hand, {"faster": 4})
    compare(f"sweep, all layers, width {width} / {reference}", sweep, form, td, [("sweep", "y")], **aim)


def test_many(compare):
    """1024 experiments cost what sixteen times 64 cost."""
    net, td = mlp(64)
    vectors = [Add(vector) for vector in torch.randn(1024, 64)]
    whole = Sweep(net, each(Site(str(MIDDLE)), vectors))
    parts = [Sweep(net, each(Site(str(MIDDLE)), vectors[i : i + N])) for i in range(0, 1024, N)]

    def in_parts(td):
        return [torch.cat([part(td.copy())["sweep", "y"] for part in parts], 1)]

    compare("sweep, 1024 experiments / 16 of 64", whole, in_parts, td, [("sweep", "y")], at_most=1.2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(self.ln_1(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.ln_2(x))


class Language(nn.Module):
    def __init__(self, width=128, heads=4, words=100, length=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(width)

    def start(self, tokens):
        return self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1]))

    def end(self, x):
        return self.ln_f(x) @ self.wte.weight.mT

    def forward(self, tokens):
        x = self.start(tokens)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


@against
def test_language(compare, reference):
    """64 (layer, position) ablations of one prompt, over all twelve layers."""
    torch.manual_seed(0)
    model = Language().requires_grad_(False)
    net = TensorDictModule(model, ["tokens"], ["logits"])
    td = TensorDict(tokens=torch.randint(0, 100, (1, 16)), batch_size=[1])
    parts = [grid(Site(f"blocks.{i}"), range(n), Ablate()) for i, n in enumerate(SPREAD)]
    sweep = Sweep(net, sum(parts[1:], parts[0]))

    def floor(td):
        rows, slots = model.start(td["tokens"]), 1
        for block, n in zip(model.blocks, SPREAD, strict=True):
            rows = block(rows)
            rows = torch.cat([rows, rows[:1].repeat(n, 1, 1)])
            positions = torch.arange(n)
            rows[slots + positions, positions] = 0.0
            slots += n
        return [model.end(rows)[1:].unsqueeze(0)]

    def by_hand(td):
        found = []
        for block, n in zip(model.blocks, SPREAD, strict=True):
            for position in range(n):

                def ablate(module, args, output, position=position):
                    output[:, position] = 0.0

                handle = block.register_forward_hook(ablate)
                try:
                    found.append(model(td["tokens"]))
                finally:
                    handle.remove()
        return [torch.stack(found, 1)]

    form, aim = (floor, {"at_most": 1.15}) if reference == "floor" else (by_hand, {"faster": 4})
    compare(f"sweep, GPT-2-like / {reference}", sweep, form, td, [("sweep", "logits")], tolerance=1e-4, **aim)
