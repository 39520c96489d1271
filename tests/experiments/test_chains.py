"""Chains: which calls a model falls into, and where a site is among them."""

import pytest
from experiments.models import mlp, pipeline, residual
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.experiments.chains import Chain, Spot
from tdconcepts.experiments.moves import Unfit
from tdconcepts.hooks import Site, locate


def chain(model):
    return Chain(model, model.out_keys, [])


def spots(model, what):
    return chain(model).spots(locate(model, what)[0])


def test_links():
    model, _ = mlp(2)
    assert [link.kind for link in chain(model).links] == ["open", *["call"] * 5, "close"]
    model, _ = pipeline(2)
    assert [link.kind for link in chain(model).links] == ["open", "call", "call", "close", "stage", "stage", "stage"]


def test_spots():
    model, _ = mlp(2)
    assert spots(model, Site("0")) == [Spot(2, None)]
    assert spots(model, Site("0", "input")) == [Spot(1, None)]
    assert spots(model, Site("2")) == [Spot(5, None)]  # the end of what is inside
    assert spots(model, "y") == [Spot(7, "y")]
    model, _ = pipeline(2)
    assert spots(model, "hidden") == [Spot(4, "hidden")]
    assert spots(model, Site("0.1")) == [Spot(3, None)]


def test_a_layer_that_runs_twice():
    layer = nn.Linear(3, 3)
    model = TensorDictModule(nn.Sequential(layer, nn.Tanh(), layer), ["x"], ["y"])
    assert spots(model, Site("0")) == [Spot(2, None), Spot(4, None)]
    assert spots(model, Site("0", call=1)) == [Spot(4, None)]


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_what_it_can_not_do():
    with pytest.raises(Unfit, match="not a Sequential"):
        spots(residual(2)[0], Site("join.0"))
    with pytest.raises(Unfit, match="one stage only"):
        spots(pipeline(2)[0], Site("1.0", "input"))
    layer = nn.Linear(3, 3)
    model = TensorDictSequential(
        TensorDictModule(nn.Sequential(layer), ["x"], ["h"]), TensorDictModule(Holder(layer), ["h"], ["y"])
    )
    with pytest.raises(Unfit, match="another stage too"):
        spots(model, Site("0.0"))
    several = TensorDictModule(lambda x: (x, x), ["x"], ["a", "b"])
    with pytest.raises(Unfit):
        spots(TensorDictSequential(several), Site("0"))


def test_hooks_of_others_keep_a_stage_whole():
    model, _ = mlp(2)
    handle = model.module.register_forward_hook(lambda *args: None)
    assert [link.kind for link in chain(model).links] == ["stage"]
    handle.remove()


def test_other_forms_of_a_stage():
    inner = nn.Sequential(nn.Linear(3, 3))
    by_name = TensorDictModule(inner, {"input": "x"}, ["y"])
    assert [link.kind for link in chain(by_name).links] == ["stage"]
    assert len(chain(TensorDictModule(inner, ["x"], ["y"])).links) == 3
