"""The models that sweeps are tested on, each with a batch and experiments that suit it."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.experiments import each, every, grid, product
from tdconcepts.hooks import Ablate, Add, Replace, Scale, Site


class Residual(nn.Module):
    """Blocks whose inside is not all that the rest depends on, and one layer that runs twice."""

    def __init__(self, width=6, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.shared = nn.Linear(width, width)
        self.join = nn.ModuleList(nn.Identity() for _ in range(blocks))

    def forward(self, x):
        x = self.shared(x)
        for block, join in zip(self.blocks, self.join, strict=True):
            x = join(x + block(x))
        return self.shared(x)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return (x + self.mlp(self.ln_2(x)),)


class Language(nn.Module):
    """A GPT-2 in small: token and position embeddings, blocks that write tuples, a tied head."""

    def __init__(self, width=8, heads=2, layers=3, words=11, length=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1], device=tokens.device))
        for block in self.blocks:
            x = block(x)[0]
        return self.ln_f(x) @ self.wte.weight.mT


class Mixing(nn.Module):
    """A layer through which the rows of a batch see each other."""

    def forward(self, x):
        return x - x.mean(0)


def double(net):
    return net.double().eval()


def mlp(rows):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Linear(6, 2))
    return Mod(double(net), ["x"], ["y"]), data(x=(rows, 4))


def pipeline(rows):
    model = TensorDictSequential(
        Mod(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), ["x"], ["hidden"]),
        TensorDictSequential(Mod(nn.Linear(5, 3), ["hidden"], ["concepts"]), Mod(nn.Linear(4, 2), ["x"], ["side"])),
        Mod(lambda a, b: (a.sin().sum(-1, keepdim=True) + b, a - 1), ["concepts", "side"], ["y", ("more", "y")]),
    )
    return double(model), data(x=(rows, 4))


def cnn(rows):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    return Mod(double(net), ["image"], ["y"]), data(image=(rows, 1, 8, 8))


def residual(rows):
    return Mod(double(Residual()), ["x"], ["y"]), data(x=(rows, 6))


def language(rows):
    tokens = torch.randint(0, 11, (rows, 5))
    return Mod(double(Language()), ["tokens"], ["logits"]), TensorDict(tokens=tokens, batch_size=[rows])


def mixing(rows):
    return Mod(double(nn.Sequential(nn.Linear(4, 5), Mixing(), nn.Linear(5, 2))), ["x"], ["y"]), data(x=(rows, 4))


def data(**shapes):
    rows = next(iter(shapes.values()))[0]
    return TensorDict({key: torch.randn(*shape).double() for key, shape in shapes.items()}, batch_size=[rows])


def shift(value, td):
    value += 0.5


VECTORS = [Add(torch.linspace(-1, 1, 5).double() * i, scale=2.0) for i in range(3)]

CASES = {
    "mlp: units of a layer": (mlp, every(Site("1"), Ablate())),
    "mlp: units of all layers": (mlp, every([Site("*"), Site("2.0")], Scale(0.5))),
    "mlp: inputs of layers": (mlp, every(Site("2", "input"), Ablate(to="mean")) + every(Site("3", "input"), Add(1.0))),
    "mlp: vectors": (mlp, each([Site("0"), Site("1")], VECTORS)),
    "mlp: edits of several kinds": (mlp, each(Site("0"), [Scale(2.0), Ablate([1]), Replace(0.3), shift])),
    "mlp: a callable": (mlp, every(Site("0"), shift)),
    "mlp: part of a site": (mlp, every(Site("2.0", index=([1, 3],)), Ablate())),
    "mlp: pairs": (mlp, product(every(Site("0"), Ablate(), [0, 1]), every(Site("2.0"), Scale(3.0), [-1, 2, 0]))),
    "mlp: pairs at one site": (mlp, product(every(Site("0"), Add(1.0)), every(Site("0"), Scale(3.0)))),
    "mlp: pairs and singles": (
        mlp,
        each(Site("3"), Scale(2.0)) + product(every(Site("1"), Ablate()), each([Site("0"), Site("2")], Add(0.1))),
    ),
    "mlp: the input": (mlp, every("x", Ablate()) + every(Site("0"), Ablate())),
    "mlp: the model": (mlp, every(Site("."), Ablate()) + each("y", Scale(2.0))),
    "pipeline: an entry": (pipeline, every("concepts", Ablate())),
    "pipeline: entries and sites": (
        pipeline,
        every(["hidden", "x", "side"], Scale(-1.0)) + each(Site("0.0"), VECTORS) + each("y", Ablate()),
    ),
    "pipeline: an entry and an input": (pipeline, product(every("x", Ablate()), every("concepts", Ablate()))),
    "pipeline: an entry for one stage": (pipeline, every(Site("1.1", "input"), Ablate())),
    "cnn: channels": (cnn, every([Site("0"), Site("2")], Ablate(), dim=-3)),
    "cnn: rows": (cnn, grid(Site("3"), None, Add(1.0))),
    "residual: between blocks": (residual, every(Site("join.*"), Ablate())),
    "residual: inside blocks": (residual, every(Site("blocks.*"), Ablate())),
    "residual: a layer that runs twice": (residual, every(Site("shared"), Ablate())),
    "residual: its second call": (residual, every(Site("shared", call=1), Ablate()) + each(Site("join.0"), Ablate())),
    "language: blocks and positions": (language, grid(Site("blocks.*"), None, Ablate())),
    "language: heads": (language, every(Site("blocks.*.out", "input"), Ablate(), groups=2)),
    "language: the head of one position": (
        language,
        every(Site("blocks.1.out", "input", index=(-1,)), Ablate(), groups=2),
    ),
    "language: embeddings": (language, grid(Site("wte"), [0, -1], Replace(0.1))),
    "rows that see each other": (mixing, every(Site("0"), Ablate())),
}
