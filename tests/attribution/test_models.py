"""Models as people have them, under every gradient method: several inputs, dicts, dataclasses, keywords, integers."""

import dataclasses
import functools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Gradient, InputXGradient, IntegratedGradients, Saliency, Site, SmoothGrad, Target, VarGrad
from tdconcepts.attribution import (
    Conductance,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    ExpectedGradients,
    FullGrad,
    GradCAM,
    GuidedBackprop,
    InternalInfluence,
)


class Core(nn.Module):
    """``x [4], z [2], idle [3] -> [3]``; ``idle`` does not matter."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)
        self.relu = nn.ReLU()

    def forward(self, x, z, idle):
        return self.head(self.relu(self.left(x) + self.right(z)))


class Keywords(Core):
    """Keyword-only."""

    def forward(self, *, x, z, idle):
        return super().forward(x, z, idle)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    more: torch.Tensor


class Structured(Core):
    """A dict, with a dataclass in it."""

    def forward(self, x, z, idle):
        logits = super().forward(x, z, idle)
        return {"answer": Answer(logits, 2 * logits), "size": torch.cumprod(logits, -1)}


class Picked(nn.Module):
    """What a TensorDictModule takes: the wanted part of a structured output."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, x, z, idle):
        return self.core(x, z, idle)["answer"].logits


class Several(Core):
    """A tuple of outputs."""

    def forward(self, x, z, idle):
        logits = super().forward(x, z, idle)
        return logits, logits.sum(-1, keepdim=True)


KEYS = ["x", "z", "idle"]
MODELS = {
    "several inputs": lambda: TensorDictModule(Core(), KEYS, ["logits"]),
    "several outputs": lambda: TensorDictModule(Several(), KEYS, ["logits", "total"]),
    "keywords": lambda: TensorDictModule(
        Keywords(), {"x": "x", "z": "z", "idle": "idle"}, ["logits"], out_to_in_map=True
    ),
    "a dict with a dataclass": lambda: TensorDictModule(Picked(Structured()), KEYS, ["logits"]),
}
METHODS = {
    "Gradient": Gradient,
    "Saliency": Saliency,
    "InputXGradient": InputXGradient,
    "IntegratedGradients": lambda m, t, w: IntegratedGradients(m, t, w, n_steps=4),
    "ExpectedGradients": lambda m, t, w: ExpectedGradients(m, t, w, baselines=rows(3), n_samples=3, generator=seeded()),
    "SmoothGrad": lambda m, t, w: SmoothGrad(Gradient(m, t, w), n_iter=3, noise=seeded()),
    "VarGrad": lambda m, t, w: VarGrad(Gradient(m, t, w), n_iter=3, noise=seeded()),
    "DeepLift": DeepLift,
    "DeepLiftShap": lambda m, t, w: DeepLiftShap(m, t, w, baselines=rows(3)),
    "GuidedBackprop": GuidedBackprop,
    "Deconvolution": Deconvolution,
    "FullGrad": FullGrad,
}


def rows(n):
    """The same at each call."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=seeded())
    return TensorDict(x=draw(n, 4), z=draw(n, 2), idle=draw(n, 3), batch_size=[n])


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_model(method, model):
    torch.manual_seed(0)
    module = MODELS[model]().double()
    td = rows(5)
    found = METHODS[method](module, Target("logits", [0, 2]), None)(td.copy())["attribution"]
    assert found["x"].shape == (5, 2, 4)
    assert found["z"].shape == (5, 2, 2)
    assert torch.equal(found["idle"], torch.zeros(5, 2, 3, dtype=torch.float64))
    assert found["x"].isfinite().all()
    assert found["x"].abs().sum() > 0
    assert found["z"].abs().sum() > 0
    torch.manual_seed(0)
    same = METHODS[method](MODELS["several inputs"]().double(), Target("logits", [0, 2]), None)
    expected = same(rows(5))["attribution"]
    for key in ("x", "z"):
        torch.testing.assert_close(found[key], expected[key])


LAYERED = {
    "Conductance": lambda m, t: Conductance(m, t, Site("relu"), n_steps=3),
    "InternalInfluence": lambda m, t: InternalInfluence(m, t, Site("relu"), n_steps=3),
    "GradCAM": lambda m, t: GradCAM(m, t, "relu"),
    "Gradient": lambda m, t: Gradient(m, t, Site("relu")),
    "DeepLift": lambda m, t: DeepLift(m, t, Site("relu")),
    "IntegratedGradients": lambda m, t: IntegratedGradients(m, t, Site("relu"), n_steps=3),
    "ExpectedGradients": lambda m, t: ExpectedGradients(m, t, Site("relu"), baselines=rows(3), n_samples=3),
}


@pytest.mark.parametrize("model", ["several outputs", "keywords"])
@pytest.mark.parametrize("method", LAYERED)
def test_layers_inside_every_model(method, model):
    module, td = MODELS[model]().double(), rows(5)
    found = LAYERED[method](module, Target("logits", 1))(td)["attribution", "relu"]
    assert found.shape == ((5, 1) if method == "GradCAM" else (5, 5))


class Words(nn.Module):
    """``ids [7] -> [3]``, in the manner of Hugging Face."""

    def __init__(self, config=None):
        super().__init__()
        self.embed, self.body = nn.Embedding(11, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, *, input_ids):
        return self.body(self.embed(input_ids).mean(-2))


WORDS = {
    **{name: METHODS[name] for name in ("Gradient", "Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution")},
    "IntegratedGradients": lambda m, t, w: IntegratedGradients(m, t, w, n_steps=4),
    "DeepLift": DeepLift,
    "FullGrad": lambda m, t, w: FullGrad(m, t, w, layers=["body.0", "body.2"]),
}


@pytest.mark.parametrize("method", WORDS)
def test_integers_at_their_embedding(method):
    module = TensorDictModule(Words().double(), {"ids": "input_ids"}, ["logits"], out_to_in_map=False)
    td = TensorDict(ids=torch.randint(0, 11, (5, 7)), batch_size=[5])
    td["baseline", "embed"] = torch.zeros(5, 7, 4, dtype=torch.float64)
    found = WORDS[method](module, Target("logits", "argmax"), Site("embed"))(td)["attribution", "embed"]
    assert found.shape == (5, 7, 4)
    assert found.abs().sum() > 0
