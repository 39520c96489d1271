"""Captum's neuron words: the same numbers as Captum 0.9 where it has any, and sums over slices."""

import pickle

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Gradient, NeuronGradient, Site, Target
from tdconcepts.attribution.neuron import NeuronSelector
from tdconcepts.errors import BadKey, BadType, BadValue


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def cnn():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 16, 5)).double()
    return TensorDictModule(layers, ["image"], ["logits"])


@pytest.fixture
def images():
    return TensorDict(image=torch.randn(4, 2, 6, 6, dtype=torch.float64), batch_size=[4])


def third_channel(value):
    return value[:, 2].square().sum((-1, -2)) if value.ndim == 4 else value[:, 2].square()


# ---------------------------------------------------------------------------------------- Captum


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("selector", [0, 5, -1, (3,), (slice(1, 4),), (slice(None),), third_channel])
def test_neurons_of_vectors(net, batch, selector, to_input):
    captum = oracle("captum.attr").NeuronGradient(net.module, net.module[2])
    td = batch(6)
    theirs = captum.attribute(td["x"].clone().requires_grad_(), selector, attribute_to_neuron_input=to_input)
    NeuronGradient(net, "2", selector, to_input)(td)
    close(td["attribution", "x"], theirs)


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize(
    "selector",
    [(0, 1, 2), (-1, 0, -2), (1, slice(0, 2), slice(None)), (slice(None), 3, 3), (slice(0, 3, 2), 0, 0), third_channel],
)
def test_neurons_of_images(cnn, images, layer, selector):
    captum = oracle("captum.attr").NeuronGradient(cnn.module, cnn.module[int(layer)])
    theirs = captum.attribute(images["image"].clone().requires_grad_(), selector)
    NeuronGradient(cnn, layer, selector)(images)
    assert theirs.abs().max() > 0
    close(images["attribution", "image"], theirs)


def test_a_slice_by_itself_sums(net, batch):
    """Captum documents it, and raises "object of type 'slice' has no len()"."""
    td = batch(3)
    found = NeuronGradient(net, "0", slice(2, 5))(td.copy())["attribution", "x"]
    close(found, net.module[0].weight[2:5].sum(0).expand(3, 4).detach())


def test_two_inputs_and_one_that_the_neuron_does_not_see(batch):
    """Captum needs both to be used; here the other gets zeros."""
    body = nn.Linear(4, 5).double()
    model = TensorDictModule(lambda x, z: body(x).tanh().sum(-1) * z.sum(-1), ["x", "z"], ["y"])
    model.body = body
    td = NeuronGradient(model, "body", 1)(batch(3))
    close(td["attribution", "x"], body.weight[1].expand(3, 4).detach())
    assert torch.equal(td["attribution", "z"], torch.zeros(3, 2).double())


def test_a_layer_with_several_outputs(batch):
    """Captum: AttributeError 'tuple' object has no attribute 'clone'."""
    lstm = TensorDictModule(nn.LSTM(4, 3, batch_first=True).double(), ["x"], ["h", "state"])
    model = TensorDictModule(lambda x: lstm.module(x)[0].sum((-1, -2)), ["x"], ["y"])
    model.lstm = lstm.module
    td = TensorDict(x=torch.randn(2, 6, 4, dtype=torch.float64), batch_size=[2])
    NeuronGradient(model, Site("lstm", leaf=0), (2, 1))(td)
    gradient = td["attribution", "x"]
    assert gradient[:, :3].abs().amin((0, 2)).min() > 0
    assert torch.equal(gradient[:, 3:], torch.zeros(2, 3, 4).double())  # what comes later can't matter


# ---------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
def test_it_is_a_gradient_with_a_site_as_target(net, batch, size):
    td = batch(*size)
    named = NeuronGradient(net, "2", 4, wrt=["x", Site("0")])
    plain = Gradient(net, Target(Site("2"), 4), ["x", Site("0")])
    assert isinstance(named, Gradient)
    for key in ("x", "0"):
        close(named(td.copy())["attribution", key], plain(td.copy())["attribution", key])
    summed = NeuronGradient(net, "2", (slice(1, 3),))(td.copy())["attribution", "x"]
    two = Gradient(net, Target(Site("2"), [1, 2]))(td.copy())["attribution", "x"]
    close(summed, two.sum(len(size)))


def test_its_options_are_those_of_a_gradient(net, batch):
    td = NeuronGradient(net, "2:in", 4, outputs=True, out_key="why", chunk_size=2)(batch(5))
    assert td["why", "x"].shape == (5, 4)
    close(td["logits"], net.module(td["x"]).detach())
    assert NeuronGradient(net, "2", 4, True)(td)["attribution", "x"].equal(td["why", "x"])


def test_selectors_compare_print_and_pickle():
    for selector in (3, (1, 2), (slice(0, 2), 1), slice(1, 2)):
        one = NeuronSelector(selector)
        assert one == NeuronSelector(selector) == pickle.loads(pickle.dumps(one))
        assert hash(one) == hash(NeuronSelector(selector))
        assert repr(one) == f"NeuronSelector({selector!r})"
    assert NeuronSelector(3) != NeuronSelector(4)
    assert NeuronSelector(3) != 3


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "selector", [None, 1.0, "a", True, (), (None,), (1.0,), (True,), [1], ([0, 1],), slice(0.5, 2)]
)
def test_what_is_no_selector(net, selector):
    with pytest.raises(BadType, match=r"(?s)not a neuron selector.*Target\(Site"):
        NeuronGradient(net, "0", selector)


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (8, r"rows of shape \[8\]"),
        (-9, r"rows of shape \[8\]"),
        ((1, 1), "1 indices or slices"),
        ((slice(3, 3),), "no neuron is selected"),
        (slice(8, 12), "no neuron is selected"),
        (lambda value: value, "no number for each row"),
        (lambda value: 3.0, "a float"),
    ],
)
def test_neurons_that_are_not_there(net, batch, selector, text):
    td = batch(3)
    with pytest.raises(BadValue, match=text):
        NeuronGradient(net, "0", selector)(td)
    assert "attribution" not in td


@pytest.mark.parametrize("selector", [0, (0, 1), (0, 1, 1, 1), (0, 4, 0), (slice(None), 0, -5), slice(0, 2)])
def test_neurons_that_are_not_in_images(cnn, images, selector):
    with pytest.raises(BadValue, match=r"rows of shape \[3, 4, 4\]"):
        NeuronGradient(cnn, "0", selector)(images)


def test_layers_that_are_not_there(net):
    with pytest.raises(BadKey, match="no module at path 'conv1'"):
        NeuronGradient(net, "conv1", 0)
    with pytest.raises(BadType, match="bare"):
        NeuronGradient(net.module, "0", 0)
