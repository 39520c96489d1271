"""Conductance: exact on linear networks, Captum 0.9 where it is right, derivatives of the formulas elsewhere."""

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import IntegratedGradients, Site, Target
from tdconcepts.attribution import Conductance, ExpectedGradients, InternalInfluence, NeuronConductance
from tdconcepts.errors import BadType, BadValue


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def linear():
    return TensorDictModule(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), ["x"], ["logits"])


def change(net, td, index):
    return (net.module(td["x"]) - net.module(torch.zeros_like(td["x"])))[..., index].detach()


@pytest.mark.parametrize("n_steps", [1, 2, 5, 50])
def test_conductance_is_complete_on_a_linear_net_for_any_number_of_steps(linear, batch, n_steps):
    """Captum's default: 42 % low at one step."""
    td = batch(3)
    found = Conductance(linear, Target("logits", 1), Site("0"), n_steps=n_steps)(td)["attribution", "0"]
    close(found.sum(-1), change(linear, td, 1))
    first, last = linear.module
    moved = first(td["x"]) - first(torch.zeros(4).double())
    close(found, (moved * last.weight[1]).detach())


@pytest.mark.parametrize(
    "method", ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 50])
def test_the_other_paths_are_complete_on_a_linear_net_too(linear, batch, n_steps, method):
    td, target = batch(3), Target("logits", 1)
    first, _ = linear.module
    moved = (first(td["x"]) - first(torch.zeros(4).double())).detach()
    flow = InternalInfluence(linear, target, Site("0"), n_steps=n_steps, method=method)(td.copy())["attribution", "0"]
    close((flow * moved).sum(-1), change(linear, td, 1))
    if method == "gausslegendre":
        each = [
            NeuronConductance(linear, target, "0", i, n_steps=n_steps)(td.copy())["attribution", "x"] for i in range(5)
        ]
        close(sum(each).sum(-1), change(linear, td, 1))
        rows = ExpectedGradients(
            linear, target, baselines=TensorDict(x=torch.ones(1, 4), batch_size=[1]), n_samples=n_steps
        )
        found = rows(td.copy())["attribution", "x"].sum(-1)
        close(found, (linear.module(td["x"]) - linear.module(torch.ones(3, 4).double()))[:, 1].detach())


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize("size", [(), (3,), (2, 2)])
def test_conductance_by_hand(net, batch, size, chunk_size):
    td = batch(*size)
    explain = Conductance(net, Target("logits", 0), Site("2"), n_steps=6, chunk_size=chunk_size)
    found = explain(td)["attribution", "2"]
    body, head = net.module[:3], net.module[3:]
    total, last = 0.0, None
    for k in range(7):
        h = body(td["x"] * k / 6).detach().requires_grad_()
        (g,) = torch.autograd.grad(head(h)[..., 0].sum(), h)
        if last is not None:
            total = total + (h - last[0]) * (g + last[1]) / 2
        last = h, g
    close(found, total.detach())


def test_conductance_of_captum_with_its_trapezoid(net, batch):
    """Its rule takes the gradient at the start of each piece: equal in the limit."""
    td = batch(4)
    captum = oracle("captum.attr").LayerConductance(net.module, net.module[2])
    theirs = captum.attribute(td["x"], target=1, n_steps=2000, method="riemann_trapezoid")
    found = Conductance(net, Target("logits", 1), Site("2"), n_steps=400)(td)["attribution", "2"]
    close(found, theirs, 2e-3)


def test_conductance_sums_to_the_change_and_over_several_targets_and_from_a_baseline(net, batch):
    td = batch(3).set(("baseline", "x"), torch.randn(3, 4, dtype=torch.float64))
    found = Conductance(net, Target("logits", [2, 0]), [Site("2"), Site("3")], n_steps=300)(td)["attribution"]
    expected = (net.module(td["x"]) - net.module(td["baseline", "x"]))[:, [2, 0]].detach()
    close(found["2"].sum(-1), expected, 1e-3)
    close(found["3"].sum(-1), expected, 1e-10)  # linear from there


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_trapezoid", "riemann_left"])
def test_internal_influence_by_hand(net, batch, method):
    from tdconcepts.attribution.paths import quadrature

    td = batch(3)
    found = InternalInfluence(net, Target("logits", 1), Site("2"), n_steps=5, method=method)(td)["attribution", "2"]
    total = 0.0
    for point, weight in zip(*quadrature(method, 5), strict=True):
        h = net.module[:3](point * td["x"]).detach().requires_grad_()
        total = total + weight * torch.autograd.grad(net.module[3:](h)[:, 1].sum(), h)[0]
    close(found, total)


def test_internal_influence_of_captum(net, batch):
    td = batch(4)
    captum = oracle("captum.attr").InternalInfluence(net.module, net.module[2])
    theirs = captum.attribute(td["x"], target=1, n_steps=20)
    close(InternalInfluence(net, Target("logits", 1), Site("2"), n_steps=20)(td)["attribution", "2"], theirs, 1e-6)


def test_an_entry_between_stages_is_a_layer(pipeline, batch):
    td = batch(3)
    found = Conductance(pipeline, Target("logits", 0), "hidden", n_steps=200)(td.copy())["attribution", "hidden"]
    ends = pipeline(td.copy())["logits"], pipeline(td.apply(lambda v: v * 0 if v.is_floating_point() else v))["logits"]
    close(found.sum(-1), (ends[0] - ends[1])[:, 0].detach(), 1e-4)


@pytest.mark.parametrize("selector", [2, -1, (3,)])
def test_neuron_conductance_of_captum(net, batch, selector):
    td = batch(4)
    captum = oracle("captum.attr").NeuronConductance(net.module, net.module[2])
    theirs = captum.attribute(td["x"], selector, target=1, n_steps=20, method="gausslegendre")
    found = NeuronConductance(net, Target("logits", 1), "2", selector, n_steps=20)(td)["attribution", "x"]
    close(found, theirs, 1e-6)


def test_a_slice_is_the_sum_over_its_neurons(net, batch):
    """Captum multiplies the two sums."""
    td = batch(3)
    each = [NeuronConductance(net, Target("logits", 1), "2", j)(td.copy())["attribution", "x"] for j in range(6)]
    some = NeuronConductance(net, Target("logits", 1), "2", slice(1, 4))(td.copy())["attribution", "x"]
    close(some, each[1] + each[2] + each[3])
    whole = IntegratedGradients(net, Target("logits", 1))(td.copy())["attribution", "x"]
    close(sum(each), whole)  # everything flows through the layer


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_neuron_conductance_of_several_targets_and_two_inputs(pipeline, batch, chunk_size):
    td = batch(2, 2)
    many = NeuronConductance(pipeline, Target("logits", [2, 0]), "1.0", 3, n_steps=7, chunk_size=chunk_size)(td.copy())[
        "attribution"
    ]
    for t, index in enumerate((2, 0)):
        one = NeuronConductance(pipeline, Target("logits", index), "1.0", 3, n_steps=7)(td.copy())["attribution"]
        for key in ("x", "z"):
            close(many[key][:, :, t], one[key])


def test_bad_input(net, pipeline):
    with pytest.raises(BadValue, match="an input, not a hidden layer"):
        Conductance(net, Target("logits", 0), "x")
    with pytest.raises(BadValue, match="an input, not a hidden layer"):
        InternalInfluence(net, Target("logits", 0), ["x", Site("2")])
    with pytest.raises(BadValue, match="taken to inputs"):
        NeuronConductance(pipeline, Target("logits", 0), "1.0", 0, wrt="hidden")
    with pytest.raises(BadType, match="callable"):
        NeuronConductance(net, Target("logits", 0), "2", lambda value: value[:, 0])
    with pytest.raises(BadType, match="not a neuron selector"):
        NeuronConductance(net, Target("logits", 0), "2", 1.5)
    with pytest.raises(BadValue, match="number of steps"):
        Conductance(net, Target("logits", 0), Site("2"), n_steps=0)
