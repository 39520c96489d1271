"""Wrappers: what they do to what an explainer wrote, one inside the other, and under noise."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Gradient, InputXGradient, IntegratedGradients, Saliency, Site, SmoothGrad, Target
from tdconcepts.attribution import Absolute, Normalised, Summed, TimesInput
from tdconcepts.errors import BadType, BadValue


@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
@pytest.mark.parametrize("select", [1, [0, 2]])
def test_named_methods_are_compositions(pipeline, batch, size, select):
    td, target = batch(*size), Target("logits", select)
    for one, other in ((Absolute, Saliency), (TimesInput, InputXGradient)):
        found = one(Gradient(pipeline, target))(td.copy())["attribution"]
        expected = other(pipeline, target)(td.copy())["attribution"]
        for key in ("x", "z"):
            assert torch.equal(found[key], expected[key])


def test_what_else_an_explainer_writes_stays_as_it_is(net, batch):
    explain = IntegratedGradients(net, Target("logits", "argmax"), n_steps=3, convergence_delta=True, outputs=True)
    td, plain = Absolute(explain)(batch(3)), None
    plain = explain(td.select("x"))
    assert torch.equal(td["convergence_delta", "x"], plain["convergence_delta", "x"])
    assert torch.equal(td["logits"], plain["logits"])
    assert torch.equal(td["attribution", "x"], plain["attribution", "x"].abs())


@pytest.mark.parametrize("pool", ["sum", "abs", "positive", "max", "l2"])
def test_pooling_over_dims(pool):
    net = TensorDictModule(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 2)), ["image"], ["y"])
    td = TensorDict(image=torch.randn(2, 3, 5, 5), batch_size=[2])
    raw = Gradient(net, Target("y", [0, 1]))(td.copy())["attribution", "image"]
    found = Summed(Gradient(net, Target("y", [0, 1])), dims=-3, pool=pool)(td)["attribution", "image"]
    slow = {
        "sum": lambda a: sum(a),
        "abs": lambda a: sum(x.abs() for x in a),
        "positive": lambda a: sum(x.clamp(min=0) for x in a),
        "max": lambda a: torch.stack([x.abs() for x in a]).amax(0),
        "l2": lambda a: sum(x**2 for x in a).sqrt(),
    }[pool](raw.unbind(2))
    assert found.shape == (2, 2, 5, 5)
    torch.testing.assert_close(found, slow)


@pytest.mark.parametrize("by", ["max", "sum", "l2", "range"])
def test_normalised_rows(net, batch, by):
    td = batch(4)
    td["x"][3] = 0
    explain = InputXGradient(net, Target("logits", [0, 1]))
    raw = explain(td.copy())["attribution", "x"]
    for targets in (False, True):
        found = Normalised(explain, by, targets=targets)(td.copy())["attribution", "x"]
        for i in range(4):
            rows = raw[i] if targets else [raw[i]]
            for row, got in zip(rows, found[i] if targets else [found[i]], strict=True):
                if by == "range":
                    size = row.max() - row.min()
                    slow = (row - row.min()) / size if size else row * 0
                else:
                    size = {"max": row.abs().max(), "sum": row.abs().sum(), "l2": row.square().sum().sqrt()}[by]
                    slow = row / size if size else row
                torch.testing.assert_close(got, slow)


def test_wrappers_in_wrappers_and_under_noise(net, batch):
    td, target = batch(3), Target("logits", "argmax")
    inner = Summed(Absolute(Gradient(net, target)))
    assert inner(td.copy())["attribution", "x"].shape == (3,)
    seed = torch.Generator().manual_seed(0)
    found = SmoothGrad(Absolute(Gradient(net, target)), noise=seed, n_iter=4)(td.copy())["attribution", "x"]
    seed.manual_seed(0)
    expected = SmoothGrad(Saliency(net, target), noise=seed, n_iter=4)(td.copy())["attribution", "x"]
    torch.testing.assert_close(found, expected)


def test_bad_input(net, batch):
    explain = Gradient(net, Target("logits", 0))
    with pytest.raises(BadValue, match="no entry to multiply"):
        TimesInput(Gradient(net, Target("logits", 0), Site("0")))
    with pytest.raises(BadValue, match="not dims"):
        Summed(explain, dims=1)
    with pytest.raises(BadValue, match="no such dim"):
        Summed(explain, dims=-2)(batch(3))
    with pytest.raises(BadValue, match="no such pooling"):
        Summed(explain, pool="mean")
    with pytest.raises(BadValue, match="no such scale"):
        Normalised(explain, "min")
    with pytest.raises(BadType, match="bool"):
        Normalised(explain, "max", targets=2)
    with pytest.raises(BadType, match="explainer"):
        Absolute(net.module)
