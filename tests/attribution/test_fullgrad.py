"""FullGrad: the sum of all terms is the output, bias terms by their parameters, implicit biases, maps by hand."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.attribution import FullGrad
from tdconcepts.errors import BadValue


@pytest.fixture
def cnn():
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)]
    net = nn.Sequential(*layers).double().eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    net[1].weight.data.normal_()
    net[1].bias.data.normal_()
    return TensorDictModule(net, ["image"], ["logits"])


@pytest.fixture
def td():
    return TensorDict(image=torch.randn(4, 2, 8, 8, dtype=torch.float64), batch_size=[4])


def total(found, keys, rows=1):
    return sum(found[key].flatten(rows).sum(-1) for key in keys)


def test_the_terms_sum_to_the_output(cnn, td):
    explain = FullGrad(cnn, Target("logits", [3, 1]), convergence_delta=True)
    assert explain.out_keys[:-1] == [("attribution", name) for name in ("image", "0", "1", "4", "7")]
    found = explain(td)
    logits = cnn.module(td["image"]).detach()
    torch.testing.assert_close(total(found, explain.out_keys[:-1], 2), logits[:, [3, 1]])
    assert found["convergence_delta", "image"].abs().max() < 1e-14
    assert found["attribution", "4"].shape == (4, 2, 4, 2, 2)


def test_bias_terms_by_the_gradient_of_the_parameter(cnn, td):
    """The sum over places is the bias times the gradient of the parameter; the batch norm's is beta - gamma mu / s."""
    row = td[:1].clone()
    found = FullGrad(cnn, Target("logits", 2))(row)
    net = cnn.module
    parameters = [net[0].bias, net[4].bias, net[7].bias, net[1].bias, net[1].weight]
    gradients = torch.autograd.grad(net(row["image"])[:, 2].sum(), parameters)
    for name, b, g in zip(("0", "4", "7"), parameters, gradients, strict=False):
        each = found["attribution", name][0]
        torch.testing.assert_close(each.flatten(1).sum(1) if each.ndim > 1 else each, (b * g).detach())
    scale = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    implicit = (net[1].bias - scale * net[1].running_mean) * gradients[3]
    torch.testing.assert_close(found["attribution", "1"][0].flatten(1).sum(1), implicit.detach())


@pytest.mark.parametrize(
    "layer",
    [nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.LayerNorm(6), nn.Softmax(-1), nn.GroupNorm(2, 6), nn.BatchNorm1d(6).eval()],
)
def test_layers_that_are_not_homogeneous(layer):
    net = nn.Sequential(nn.Linear(4, 6, bias=False), layer, nn.ReLU(), nn.Linear(6, 2)).double()
    td = TensorDict(x=torch.randn(2, 3, 4, dtype=torch.float64), batch_size=[2, 3])
    module = TensorDictModule(nn.Sequential(nn.Flatten(0, 1), net, nn.Unflatten(0, (2, 3))), ["x"], ["y"])
    explain = FullGrad(module, Target("y", 1), layers=["1.1", "1.3"])
    found = explain(td)
    assert explain.out_keys == [("attribution", name) for name in ("x", "1.1", "1.3")]
    torch.testing.assert_close(total(found, explain.out_keys, 2), module.module(td["x"])[..., 1].detach())
    x = net[0](td["x"].flatten(0, 1))
    x = x.detach()
    value = layer(x)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    along = torch.einsum("bibj,bj->bi", jacobian, x)
    z = value.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net[2:](z)[:, 1].sum(), z)
    torch.testing.assert_close(found["attribution", "1.1"].flatten(0, 1), (gradient * (value - along)).detach())


def test_what_is_no_layer_is_missing_and_the_delta_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 1)

        def forward(self, x):
            return self.two(F.gelu(self.one(x)))

    module = TensorDictModule(Net().double(), ["x"], ["y"])
    td = TensorDict(x=torch.randn(3, 4, dtype=torch.float64), batch_size=[3])
    explain = FullGrad(module, Target("y"), convergence_delta=True)
    found = explain(td)
    expected = total(found, explain.out_keys[:-1]) - module.module(td["x"])[:, 0]
    torch.testing.assert_close(found["convergence_delta", "x"], expected.detach())
    assert found["convergence_delta", "x"].abs().max() > 1e-3


@pytest.mark.parametrize("post", ["abs", "rescaled", "positive", "none"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_map_by_hand(cnn, td, post, mode):
    target = Target("logits", "argmax")
    terms = FullGrad(cnn, target)(td.copy())
    found = FullGrad(cnn, target, size=(8, 8), post=post, mode=mode)(td)["attribution", "image"]
    expected = 0
    for name in ("image", "0", "1", "4"):
        term = terms["attribution", name]
        if post in ("abs", "rescaled"):
            term = term.abs()
        if post == "positive":
            term = term.clamp(min=0)
        if post == "rescaled":
            low, high = term.flatten(1).min(1).values, term.flatten(1).max(1).values
            term = (term - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)
        corners = {"align_corners": False} if mode == "bilinear" else {}
        expected = expected + F.interpolate(term, (8, 8), mode=mode, **corners).sum(1)
    assert found.shape == (4, 8, 8)
    torch.testing.assert_close(found, expected)


def test_at_a_site_with_the_layers_behind_it(cnn, td):
    explain = FullGrad(cnn, Target("logits", 0), Site("3"), layers=["4", Site("7")])
    found = explain(td)
    torch.testing.assert_close(total(found, explain.out_keys), cnn.module(td["image"])[:, 0].detach())


def test_bad_input(cnn, td):
    target = Target("logits", 0)
    for options in ({"post": "square"}, {"mode": "cubic"}, {"size": (0, 8)}, {"size": (8,) * 4}):
        with pytest.raises(BadValue):
            FullGrad(cnn, target, **options)
    with pytest.raises(BadValue, match="in front of a site"):
        FullGrad(cnn, target, Site("3"))
    with pytest.raises(BadValue, match="without a bias"):
        FullGrad(
            TensorDictModule(nn.Sequential(nn.Linear(2, 2, bias=False)), ["x"], ["y"]), Target("y", 0), layers=["0"]
        )
    with pytest.raises(BadValue, match="no full-gradient terms for LSTM"):
        FullGrad(TensorDictModule(nn.Sequential(nn.LSTM(2, 2)), ["x"], ["y"]), Target("y", 0))
    with pytest.raises(BadValue, match="no map"):
        FullGrad(cnn, target, size=(8,))(td)
    cnn.train()
    with pytest.raises(BadValue, match="statistics of the batch"):
        FullGrad(cnn, target)(td)
    twice = nn.Linear(4, 4)
    module = TensorDictModule(nn.Sequential(twice, nn.ReLU(), twice), ["x"], ["y"])
    x = TensorDict(x=torch.randn(2, 4), batch_size=[2])
    with pytest.raises(BadValue, match="runs several times"):
        FullGrad(module, Target("y", 0))(x)
    explain = FullGrad(module, Target("y", 0), layers=[Site("0", call=0), Site("0", call=1)])
    torch.testing.assert_close(total(explain(x), explain.out_keys), module.module(x["x"])[:, 0].detach())
