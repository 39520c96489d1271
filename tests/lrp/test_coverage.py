"""The table of models and composites in docs/lrp.md: what each cell says is tried, on models without biases."""

import functools
from pathlib import Path

import pytest
import torch
from lrp import test_policies as policies
from lrp import test_transformers as transformers
from lrp.cases import close
from lrp.nets import ResNet18, as_td, prepared, vgg11
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.lrp import (
    CPLRP,
    LRP,
    AttnLRP,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    GuidedBackprop,
)

TINY = 1e-12
COMPOSITES = {
    "EpsilonPlus": EpsilonPlus(TINY, TINY),
    "EpsilonPlusFlat": EpsilonPlusFlat(TINY, TINY),
    "EpsilonAlpha2Beta1Flat": EpsilonAlpha2Beta1Flat(TINY, TINY),
    "EpsilonGammaBox": EpsilonGammaBox(-3.0, 3.0, stabilizer=TINY),
    "AttnLRP": AttnLRP(0.0, TINY),
    "CPLRP": CPLRP(0.0, TINY),
    "GuidedBackprop": GuidedBackprop(),
}


class Last(nn.Module):
    """The head's logits at the last step of a sequence."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x):
        out = self.body(x, x, x) if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


def batch(*shape):
    return TensorDict(x=torch.rand(2, *shape, dtype=torch.float64) - 0.5, batch_size=[2])


def plain(net, *shape):
    net = policies.without_biases(prepared(net, bias=False, init=True))
    return as_td(net), batch(*shape), "x", 1


def hugging_face(make):
    net, site = transformers.built(make, "sdpa", bias=False)
    return net, transformers.tokens(), site, 1


def memory():
    module = policies.modules.LSTMModule(input_size=5, hidden_size=8, in_key="x", out_key="h")
    net = TensorDictSequential(module, TensorDictModule(nn.Linear(8, 3), ["h"], ["logits"]))
    td = batch(5)
    td["is_init"] = torch.zeros(2, 1, dtype=torch.bool)
    for key in module.in_keys[1:]:
        if "state" in str(key):
            td[key] = torch.zeros(2, 1, 8, dtype=torch.float64)
    return policies.without_biases(net), td, "x", 1


def agents():
    options = {"centralized": False, "share_params": False, "num_cells": [8]}
    net, td, *_ = plain(policies.modules.MultiAgentMLP(5, 2, 3, **options), 3, 5)
    return net, td, "x", (0, 1)


MODELS = {
    "MLP": lambda: plain(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), 5),
    "VGG11": lambda: plain(vgg11(width=4), 3, 32, 32),
    "VGG11-BN": lambda: plain(vgg11(True, width=4), 3, 32, 32),
    "ResNet18": lambda: plain(ResNet18(width=16), 3, 32, 32),
    "nn.MultiheadAttention": lambda: plain(Last(nn.MultiheadAttention(8, 2, batch_first=True)), 5, 8),
    "nn.TransformerEncoder": lambda: plain(transformers.Encoder(False), 6, 8),
    "nn.LSTM": lambda: plain(Last(nn.LSTM(8, 8, batch_first=True)), 5, 8),
    "nn.GRU": lambda: plain(Last(nn.GRU(8, 8, batch_first=True)), 5, 8),
    "nn.RNN": lambda: plain(Last(nn.RNN(8, 8, batch_first=True)), 5, 8),
    "Hugging Face GPT-2": lambda: hugging_face(transformers.gpt2),
    "Hugging Face Llama": lambda: hugging_face(transformers.llama),
    "Hugging Face BERT": lambda: hugging_face(transformers.bert),
    "torchrl MLP": lambda: plain(policies.mlp(), 5),
    "torchrl ConvNet": lambda: plain(policies.conv_net(), 3, 16, 16),
    "torchrl DuelingCnnDQNet": lambda: plain(policies.dueling(), 3, 16, 16),
    "torchrl LSTMModule": memory,
    "torchrl MultiAgentMLP": agents,
}


@functools.cache
def table():
    page = (Path(__file__).parents[2] / "docs" / "lrp.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.split("| model |")[1].split("\n\n")[0].splitlines()]
    names = [cell.strip() for cell in rows[0]]
    return names, {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def test_the_table_is_complete():
    names, rows = table()
    assert names == list(COMPOSITES)
    assert list(rows) == list(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_cells(model):
    torch.manual_seed(0)
    net, td, wrt, select = MODELS[model]()
    key = ("attribution", getattr(wrt, "key", wrt))
    for name, cell in zip(table()[0], table()[1][model], strict=True):
        found = {}
        for convention in ("gradient", "relevance"):
            explain = functools.partial(LRP, net, COMPOSITES[name], Target("logits", select), wrt, outputs=True)
            if cell == "R" and convention == "gradient":
                with pytest.raises(BadValue, match=r"middle of the model|mix two conventions"):
                    explain(convention=convention)(td.copy())
                continue
            out = explain(convention=convention)(td.copy())
            found[convention] = out[key]
            assert out[key].isfinite().all()
        if cell == "R":
            continue
        close(found["gradient"], found["relevance"], 1e-4)
        kept = out[key].flatten(1).sum(1) / out["logits"][(slice(None), *_index(select))]
        assert (((kept - 1).abs() < 1e-3).all()) == (cell == "="), name


def _index(select):
    return select if isinstance(select, tuple) else (select,)
