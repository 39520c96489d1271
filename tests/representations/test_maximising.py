"""Activation maximisation: the ascent step by step, targets that climb apart, and what keeps an input natural."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Site, Target
from tdconcepts.representations import ActivationMaximisation, Regularise


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return TensorDictModule(net, ["x"], ["y"]), TensorDict(x=torch.randn(5, 4).double(), batch_size=[5])


def image():
    torch.manual_seed(0)
    net = TensorDictModule(nn.Conv2d(1, 2, 3).double(), ["x"], ["y"])
    return net, TensorDict(x=torch.randn(2, 1, 6, 6).double(), batch_size=[2])


def total(value, td):
    return value[:, 1].sum((-2, -1))


@pytest.mark.parametrize("normalise", [True, False])
def test_the_steps_one_by_one(normalise):
    net, td = make()
    ascent = ActivationMaximisation(
        net, Target("y", 1), steps=4, rate=0.3, normalise=normalise, regularise=Regularise(0.2, 0.1, low=-1.0, high=1.0)
    )
    x = td["x"].clamp(-1, 1)
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net.module(leaf)[:, 1].sum(), leaf)
        g = g / g.square().mean(-1, keepdim=True).sqrt() if normalise else g
        x = (x + 0.3 * (g - 0.2 * x - 0.1 * x.sign())).clamp(-1, 1)
    torch.testing.assert_close(ascent(td)["maximised", "x"], x)


def test_targets_climb_apart_and_as_they_would_alone():
    net, td = make()
    options = {"steps": 5, "chunk_size": 3}
    together = ActivationMaximisation(net, Target("y", [2, 0]), **options)(td.clone())["maximised", "x"]
    for i, unit in enumerate((2, 0)):
        alone = ActivationMaximisation(net, Target("y", unit), **options)(td.clone())["maximised", "x"]
        torch.testing.assert_close(together[:, i], alone)
    assert ActivationMaximisation(net, Target("y", [2]), steps=2)(td)["maximised", "x"].shape == (5, 1, 4)


def test_it_climbs_to_neurons_and_for_argmax():
    net, td = make()
    best = net.module(td["x"]).argmax(-1)
    found = ActivationMaximisation(net, Target("y", "argmax"), steps=30)(td.clone())["maximised", "x"]
    rows = torch.arange(5)
    assert (net.module(found)[rows, best] > net.module(td["x"])[rows, best]).all()
    hidden = net.module[0]
    found = ActivationMaximisation(net, Target(Site("0"), [3, 5]), steps=20)(td.clone())["maximised", "x"]
    assert (hidden(found[:, 0])[:, 3] > hidden(td["x"])[:, 3]).all()
    assert (hidden(found[:, 1])[:, 5] > hidden(td["x"])[:, 5]).all()


def test_penalties_are_gradients_of_their_formulas():
    _, td = image()
    for options, formula in (
        ({"l2": 0.3}, lambda x: -0.15 * x.square().sum()),
        ({"l1": 0.3}, lambda x: -0.3 * x.abs().sum()),
        ({"smooth": 0.3}, lambda x: -0.15 * (x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum())),
    ):
        x = td["x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(formula(x), x)
        torch.testing.assert_close(Regularise(**options).pull(td["x"], 1), expected)


def test_jitter_comes_from_the_generator_and_is_undone():
    net, td = image()

    def run(seed, steps=6, jitter=2):
        generator = torch.Generator().manual_seed(seed)
        regularise = Regularise(jitter=jitter, generator=generator)
        ascent = ActivationMaximisation(net, Target("y", total), steps=steps, regularise=regularise)
        return ascent(td.clone())["maximised", "x"]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert net.module(run(0))[:, 1].sum() > net.module(td["x"])[:, 1].sum()
    assert (run(0) - td["x"]).abs().max() < 6 * 0.1 * 6 * 6


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"steps": 0}, BadValue, "out of range"),
        ({"rate": 0.0}, BadValue, "out of range"),
        ({"wrt": Site("0")}, BadValue, "what the module reads"),
        ({"outputs": True}, BadType, "no outputs"),
        ({"create_graph": True}, BadType, "no create_graph"),
        ({"nonsense": 1}, BadType, "no option"),
    ],
)
def test_bad_settings(options, error, text):
    with pytest.raises(error, match=text):
        ActivationMaximisation(make()[0], Target("y", 0), **options)


def test_an_entry_without_gradient():
    net, td = make()
    with pytest.raises(BadType, match="'x' has no gradient"):
        ActivationMaximisation(net, Target("y", 0), steps=1)(td.clone().set("x", td["x"].long()))


@pytest.mark.parametrize("options", [{"l2": -1.0}, {"jitter": 0.5}, {"low": 1.0, "high": 0.0}])
def test_bad_regularisers(options):
    with pytest.raises(BadValue, match="regulariser"):
        Regularise(**options)


def test_vectors_are_no_images():
    net, td = make()
    with pytest.raises(BadValue, match="for images"):
        ActivationMaximisation(net, Target("y", 0), steps=1, regularise=Regularise(jitter=1))(td)
