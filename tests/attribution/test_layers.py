"""Captum's layer words: the same numbers as Captum 0.9."""

import pytest
import torch
from oracles import oracle

from tdconcepts import Target
from tdconcepts.attribution import (
    Conductance,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronIntegratedGradients,
)
from tdconcepts.errors import BadKey, BadType


def close(one, other):
    torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("to_input", [False, True])
def test_the_same_numbers_as_captum(net, batch, to_input):
    captum, td, layer = oracle("captum.attr"), batch(4), net.module[2]
    key, where = ("2:in" if to_input else "2"), {"attribute_to_layer_input": to_input}
    activation = LayerActivation(net, "2", to_input)(td.copy())["activation", key]
    close(activation.detach(), captum.LayerActivation(net.module, layer).attribute(td["x"], **where))
    theirs = captum.LayerIntegratedGradients(net.module, layer).attribute(td["x"], target=1, n_steps=30, **where)
    ours = LayerIntegratedGradients(net, Target("logits", 1), "2", to_input, n_steps=30, baseline=None)
    close(ours(td.copy())["attribution", key], theirs)
    theirs = captum.LayerGradCam(net.module, layer).attribute(td["x"], target=1, **where)
    close(LayerGradCam(net, Target("logits", 1), "2", to_input)(td.copy())["attribution", key], theirs)


def test_an_activation_is_replaced_by_another(net):
    first = LayerActivation(net, "2")
    assert first.replace(layer="0").out_keys[-1] == ("activation", "0")
    assert first.replace(attribute_to_layer_input=True).out_keys[-1] == ("activation", "2:in")
    assert first.out_keys[-1] == ("activation", "2")
    assert first.tunables == ()
    with pytest.raises(BadType, match="no argument 'layr'"):
        first.replace(layr="0")


@pytest.mark.parametrize("selector", [1, slice(0, 3), (slice(2, 4),)])
def test_integrated_gradients_of_neurons(net, batch, selector):
    td = batch(4)
    captum = oracle("captum.attr").NeuronIntegratedGradients(net.module, net.module[2])
    theirs = captum.attribute(td["x"], (selector,) if isinstance(selector, slice) else selector, n_steps=30)
    close(NeuronIntegratedGradients(net, "2", selector, n_steps=30)(td)["attribution", "x"], theirs)


def test_layers_in_a_list_and_a_conductance(net, batch):
    td = LayerIntegratedGradients(net, Target("logits", 1), ["0", "2"], n_steps=3)(batch(2))
    assert td["attribution", "0"].shape == (2, 8)
    assert td["attribution", "2"].shape == (2, 6)
    named = LayerConductance(net, Target("logits", 1), "2", n_steps=4)
    assert isinstance(named, Conductance)
    assert named(batch(2))["attribution", "2"].shape == (2, 6)


def test_bad_input(net):
    with pytest.raises(BadKey, match="no module at path 'conv1'"):
        LayerGradCam(net, Target("logits", 0), "conv1")
    with pytest.raises(BadType, match="not a neuron selector"):
        NeuronIntegratedGradients(net, "2", None)
