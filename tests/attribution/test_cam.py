"""Grad-CAM: Captum 0.9, the formula by hand for images and tokens, sizes, several targets."""

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.attribution import GradCAM
from tdconcepts.errors import BadKey, BadValue


@pytest.fixture
def cnn():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 16, 5)).double()
    return TensorDictModule(layers, ["image"], ["logits"])


@pytest.fixture
def images():
    return TensorDict(image=torch.randn(4, 2, 6, 6, dtype=torch.float64), batch_size=[4])


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_of_captum(cnn, images, layer, relu):
    captum = oracle("captum.attr").LayerGradCam(cnn.module, cnn.module[int(layer)])
    theirs = captum.attribute(images["image"], target=2, relu_attributions=relu)
    found = GradCAM(cnn, Target("logits", 2), layer, relu=relu)(images)["attribution", layer]
    torch.testing.assert_close(found, theirs.detach())


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_a_map_in_the_size_of_the_image(cnn, images, mode):
    small = GradCAM(cnn, Target("logits", [2, 0]), "0")(images.copy())["attribution", "0"]
    found = GradCAM(cnn, Target("logits", [2, 0]), "0", size=(6, 6), mode=mode)(images)["attribution", "0"]
    interpolate = oracle("captum.attr").LayerAttribution.interpolate
    expected = torch.stack([interpolate(small[:, t], (6, 6), mode)[:, 0] for t in (0, 1)], 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dims", "mode"), [(1, "linear"), (3, "trilinear")])
def test_series_and_volumes(dims, mode):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](2, 3, 2)
    layers = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 3**dims, 2)).double()
    td = TensorDict(x=torch.randn(2, 2, *[4] * dims, dtype=torch.float64), batch_size=[2])
    net = TensorDictModule(layers, ["x"], ["y"])
    small = GradCAM(net, Target("y", 0), "1")(td.copy())["attribution", "1"]
    found = GradCAM(net, Target("y", 0), "1", size=(7,) * dims)(td)["attribution", "1"]
    expected = nn.functional.interpolate(small, size=(7,) * dims, mode=mode, align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected)


def test_tokens_by_hand():
    body = nn.Linear(4, 6).double()
    layer = TensorDictModule(nn.Sequential(body, nn.Tanh(), nn.Flatten(-2), nn.Linear(30, 3).double()), ["x"], ["y"])
    td = TensorDict(x=torch.randn(2, 5, 4, dtype=torch.float64), batch_size=[2])
    found = GradCAM(layer, Target("y", 1), "0", channels=-1, relu=False)(td)["attribution", "0"]
    value = body(td["x"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer.module[1:](value)[:, 1].sum(), value)
    expected = (gradient.mean(1, keepdim=True) * value).sum(-1, keepdim=True)
    assert found.shape == (2, 5, 1)
    torch.testing.assert_close(found, expected.detach())


def test_a_layer_of_vectors(net, batch):
    """Captum's rule there: each number is a channel, weighted by its own gradient."""
    td = batch(3)
    captum = oracle("captum.attr").LayerGradCam(net.module, net.module[2])
    theirs = captum.attribute(td["x"], target=1)
    found = GradCAM(net, Target("logits", 1), "2", relu=False)(td)["attribution", "2"]
    torch.testing.assert_close(found, theirs.detach())


def test_bad_input(cnn, images, net, batch):
    with pytest.raises(BadKey, match="no module at path 'conv'"):
        GradCAM(cnn, Target("logits", 0), "conv")
    with pytest.raises(BadValue, match="no such dim"):
        GradCAM(cnn, Target("logits", 0), "0", channels=3)(images)
    with pytest.raises(BadValue, match="no such way"):
        GradCAM(cnn, Target("logits", 0), "0", mode="cubic")
    for size in ((), (4, 0), (1, 2, 3, 4)):
        with pytest.raises(BadValue, match="size of a map"):
            GradCAM(cnn, Target("logits", 0), "0", size=size)
    with pytest.raises(BadValue, match="can't be resized"):
        GradCAM(cnn, Target("logits", 0), "0", size=(4,))(images)
    with pytest.raises(BadValue, match="can't be resized"):
        GradCAM(net, Target("logits", 0), "2", size=(4, 4))(batch(2))
