"""Steering vectors: the three methods, their lengths, and their edits in a model."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Site, capture, patch
from tdconcepts.representations import LinearProbe, LogisticProbe, SteeringVector


def make(n=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator).double()
    y = torch.arange(n) % 2
    x[:, 1] += 3.0 * y
    shift = torch.tensor([2.0, 0, 0, 0]) + torch.randn(n, 4, generator=generator) * torch.tensor([0.5, 0.1, 0.1, 0.1])
    return TensorDict(x=x, y=y, w=-2 * x, negative=x - shift, one=torch.ones_like(y), short=x[:, :2], batch_size=[n])


def test_difference_of_means():
    td = make()
    step = td["x"][1::2].mean(0) - td["x"][::2].mean(0)
    for data in (td, [td[:13], td[13:]]):
        steer = SteeringVector(["x", "w"], "y", norm=None).fit(data)
        torch.testing.assert_close(steer.vector("x"), step)
        torch.testing.assert_close(steer.vector("w"), -2 * step)
    found = SteeringVector("x", "y").fit(td)(td)["steering", "x"]
    torch.testing.assert_close(found, (td["x"] - td["x"].mean(0)) @ step / step.norm())


def test_principal_axis_of_the_differences():
    td = make()
    for data in (td, [td[:13], td[13:]]):
        steer = SteeringVector("x", negative="negative", method="pca").fit(data)
        _, _, vh = torch.linalg.svd(td["x"] - td["negative"])
        torch.testing.assert_close(steer.vector(), vh[0] * vh[0, 0].sign())
    torch.testing.assert_close(
        SteeringVector("x", negative="negative", norm=None).fit(td).vector(), (td["x"] - td["negative"]).mean(0)
    )


def test_the_direction_of_a_probe():
    td = make()
    torch.testing.assert_close(
        SteeringVector("x", "y", method="probe").fit(td).vector(), LogisticProbe("x", "y").fit(td).direction()
    )
    ridge = LinearProbe(["x", "w"], "y").fit(td)
    steer = SteeringVector("w", method=ridge).fit(td)
    torch.testing.assert_close(steer.vector(), ridge.direction("w"))
    assert list(steer.state_dict()) == ["vector_0", "mean_0"]


def test_lengths():
    td = make()
    apart = td["x"][1::2].mean(0) - td["x"][::2].mean(0)
    for norm, expected in (
        (None, apart.norm()),
        ("unit", 1.0),
        ("activation", td["x"].norm(dim=-1).mean()),
        (2.5, 2.5),
    ):
        assert float(SteeringVector("x", "y", norm=norm).fit(td).vector().norm()) == pytest.approx(float(expected))


def test_edits_of_captured_activations():
    torch.manual_seed(0)
    net = TensorDictModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), ["x"], ["out"]).double()
    with capture(net, "0", "1") as m:
        td = m(make())
    steer = SteeringVector([("activation", "0"), ("activation", "1")], "y").fit(td)
    assert list(steer.edits()) == [Site("0"), Site("1")]
    vector = steer.vector(("activation", "1"))
    with patch(net, {Site("1"): steer.add(("activation", "1"), 3.0)}) as m:
        steered = m(make())["out"]
    torch.testing.assert_close(steered, td["out"] + 3.0 * vector @ net.module[2].weight.T)
    with patch(net, steer.edits("project_out")) as m, capture(m, "1") as both:
        out = both(make())
    seen = steer(out.set(("activation", "0"), td["activation", "0"]))["steering", "activation", "1"]
    torch.testing.assert_close(seen, torch.zeros(60).double())
    without = steer.project_out(("activation", "1"), to_mean=False)(td["activation", "1"])
    torch.testing.assert_close(without @ vector, torch.zeros(60).double())


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda: SteeringVector("x"), "compared"),
        (lambda: SteeringVector("x", "y", "negative"), "compared"),
        (lambda: SteeringVector("x", negative=["negative", "w"]), "pair up"),
        (lambda: SteeringVector("x", "y", method="most"), "no such method"),
        (lambda: SteeringVector("x", "y", method="pca"), "pairs of rows"),
        (lambda: SteeringVector("x", negative="negative", method="probe"), "kind of each row"),
        (lambda: SteeringVector("x", "y", norm=-1.0), "norm"),
        (lambda: SteeringVector("x", "one").fit(make()), "one kind"),
        (lambda: SteeringVector("x", negative="x").fit(make()), "alike"),
        (lambda: SteeringVector("x", negative="short").fit(make()), "different widths"),
        (lambda: SteeringVector("x", "x").fit(make()), "one label"),
        (lambda: SteeringVector("x", "y").fit([]), "no data"),
        (lambda: SteeringVector("x", "y").fit(make()).edits("turn"), "no such edit"),
    ],
)
def test_bad_input(make_it, text):
    with pytest.raises(BadValue, match=text):
        make_it()


def test_which_vector():
    with pytest.raises(BadKey, match="which of the entries"):
        SteeringVector(["x", "w"], "y").fit(make()).vector()
