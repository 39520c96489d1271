"""Guided back-propagation, deconvolution, guided Grad-CAM: Captum 0.9 where it is right, the formulas elsewhere."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Gradient, Site, Target
from tdconcepts.attribution import Deconvolution, DeepLift, GradCAM, GuidedBackprop, GuidedGradCAM
from tdconcepts.errors import BadKey, BadType, BadValue

METHODS = [(GuidedBackprop, "GuidedBackprop"), (Deconvolution, "Deconvolution")]


@pytest.fixture
def cnn():
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()]
    return TensorDictModule(nn.Sequential(*layers, nn.Linear(16, 5)).double(), ["image"], ["logits"])


def images(n=4):
    return TensorDict(image=torch.randn(n, 2, 8, 8, dtype=torch.float64), batch_size=[n])


def of_captum(name, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explain = getattr(oracle("captum.attr"), name)(*args)
        return explain.attribute(kwargs.pop("x"), **kwargs).detach()


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_it_is_captums(cnn, method, name):
    td = images()
    theirs = of_captum(name, cnn.module, x=td["image"], target=2)
    torch.testing.assert_close(method(cnn, Target("logits", 2))(td)["attribution", "image"], theirs)
    assert (theirs - Gradient(cnn, Target("logits", 2))(td)["attribution", "image"]).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_of_a_neuron_it_is_captums(cnn, method, name):
    td = images()
    theirs = of_captum(f"Neuron{name}", cnn.module, cnn.module[3], x=td["image"], neuron_selector=(1, 0, 1))
    torch.testing.assert_close(method(cnn, Target(Site("3"), (1, 0, 1)))(td)["attribution", "image"], theirs)


class Two(nn.Module):
    """One ReLU in two places, and as a function."""

    def __init__(self, relu):
        super().__init__()
        self.one, self.other, self.last, self.relu = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2), relu

    def forward(self, x):
        return self.last(self.relu(self.one(x)) - self.relu(self.other(x)))


@pytest.mark.parametrize("relu", [F.relu, torch.relu, torch.relu_, nn.ReLU(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize(("method", "name"), METHODS)
def test_one_relu_on_two_branches_by_hand(method, name, relu):
    """Captum's Deconvolution gets this wrong, and takes the plain gradient for functions."""
    net = Two(relu).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    found = method(TensorDictModule(net, ["x"], ["y"]), Target("y", [0, 1]))(TensorDict(x=x, batch_size=[6]))
    for t in (0, 1):
        expected = 0
        for layer, sign in ((net.one, 1), (net.other, -1)):
            flow = (sign * net.last.weight[t]).clamp(min=0) * torch.ones(6, 1)
            expected = expected + (flow * (layer(x) > 0) if method is GuidedBackprop else flow) @ layer.weight
        torch.testing.assert_close(found["attribution", "x"][:, t], expected.detach())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("method", "name"), METHODS)
def test_at_a_site_alone(cnn, method, name, frozen):
    """What only parameters have made is explained all the same, if it is what is explained."""
    cnn.requires_grad_(not frozen)
    td = images()
    both = method(cnn, Target("logits", 1), ["image", Site("3")])(td.copy())["attribution", "3"]
    alone = method(cnn, Target("logits", 1), Site("3"))(td.copy())["attribution", "3"]
    assert torch.equal(both, alone)
    layer = method(cnn, Target("logits", 1), Site("0"))(td)["attribution", "0"]
    assert (layer - Gradient(cnn, Target("logits", 1), Site("0"))(td)["attribution", "0"]).abs().max() > 1e-3


def test_a_site_alone_in_a_shallow_net():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    td = TensorDict(x=torch.randn(5, 3, dtype=torch.float64), batch_size=[5])
    found = GuidedBackprop(TensorDictModule(net, ["x"], ["y"]), Target("y"), Site("0"))(td)["attribution", "0"]
    torch.testing.assert_close(found, (net[2].weight.clamp(min=0) * (net[0](td["x"]) > 0)).detach())


@pytest.mark.parametrize("layer", ["1", "3"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_guided_grad_cam_is_captums(cnn, layer, mode):
    td = images()
    theirs = of_captum(
        "GuidedGradCam", cnn.module, cnn.module[int(layer)], x=td["image"], target=2, interpolate_mode=mode
    )
    found = GuidedGradCAM(cnn, Target("logits", 2), layer, mode=mode)(td)["attribution", "image"]
    torch.testing.assert_close(found, theirs)


def test_guided_grad_cam_of_several_targets(cnn):
    td, target = images(), Target("logits", [3, 1])
    found = GuidedGradCAM(cnn, target, "3")(td.copy())["attribution", "image"]
    cam = GradCAM(cnn, target, "3", size=(8, 8), mode="nearest")(td.copy())["attribution", "3"]
    guided = GuidedBackprop(cnn, target)(td)["attribution", "image"]
    torch.testing.assert_close(found, guided * cam.unsqueeze(2))


def test_guided_grad_cam_of_a_series():
    layers = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).double()
    net = TensorDictModule(layers, ["x"], ["y"])
    td = TensorDict(x=torch.randn(3, 2, 8, dtype=torch.float64), batch_size=[3])
    found = GuidedGradCAM(net, Target("y", 0), "1")(td.copy())["attribution", "x"]
    theirs = of_captum("GuidedGradCam", layers, layers[1], x=td["x"], target=0)
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("other", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.ELU(), F.gelu, F.relu6])
@pytest.mark.parametrize(("method", "name"), METHODS)
def test_another_rectifier(method, name, other):
    """Captum gives the plain gradient, silently."""
    net = TensorDictModule(Two(other).double(), ["x"], ["y"])
    td = TensorDict(x=torch.randn(2, 4, dtype=torch.float64), batch_size=[2])
    with pytest.raises(BadValue, match=f"{name} is a rule for ReLUs"):
        method(net, Target("y", 0))(td)
    found = method(net, Target("y", 0), on_missing="gradient")(td.copy())["attribution", "x"]
    torch.testing.assert_close(found, Gradient(net, Target("y", 0))(td)["attribution", "x"])


def test_bad_input(cnn):
    target = Target("logits", 0)
    with pytest.raises(BadValue, match="no such choice"):
        GuidedBackprop(cnn, target, on_missing="warn")
    with pytest.raises(BadType, match="no option 'size'"):
        GuidedBackprop(cnn, target, size=3)
    with pytest.raises(BadValue, match="taken to inputs"):
        GuidedGradCAM(cnn, target, "3", Site("0"))
    with pytest.raises(BadKey, match="no module"):
        GuidedGradCAM(cnn, target, "conv")
    with pytest.raises(BadValue, match="no such way"):
        GuidedGradCAM(cnn, target, "3", mode="cubic")
    with pytest.raises(BadValue, match="does not lie on"):
        GuidedGradCAM(cnn, target, "6")(images())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution, DeepLift])
@pytest.mark.parametrize("compile", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(1, 6))])
def test_what_torch_jit_has_compiled_is_refused_for_its_functions_are_not_seen(method, compile):
    net = nn.Sequential(nn.Linear(4, 6), compile(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))))
    with pytest.raises(BadType, match=r"at 'module\.1'"):
        method(TensorDictModule(net, ["x"], ["y"]), Target("y", 1))
