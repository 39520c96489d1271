"""Rules on the nodes of a graph: the numbers of rules at calls, nothing left behind, and when a call is looked at."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.nn import functional as F

from tdconcepts import Capture, Deconvolution, GuidedBackprop, Site, Target
from tdconcepts.attribution.guided import _RECTIFIERS
from tdconcepts.errors import BadValue
from tdconcepts.hooks import Pullback
from tdconcepts.hooks.nodes import AtNodes
from tdconcepts.hooks.rectifiers import DeconvNetRule, GuidedBackpropRule
from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import EpsilonRule


def rules(rule):
    return Rules((), {"relu": rule}, "relevance")


class Residual(nn.Module):
    """ReLUs as modules, functions and in place, one module twice, sums in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.one(x))
        out = self.two(h)
        out += h
        out = F.relu(out) + self.act(self.two(h))
        return self.three((out - 1).relu_())


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weights = nn.Parameter(torch.randn(5, 6, 4, generator=generator))
        self.mix = nn.Parameter(torch.randn(6, 3, generator=generator))

    def forward(self, x):
        return torch.vmap(lambda w: torch.relu(torch.relu(x @ w.mT) @ self.mix))(self.weights).mean(0)


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def image():
    """A view between two matrices: the flows of several targets go together as far as there, and then one by one."""
    conv = [nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(-3)]
    return nn.Sequential(*conv, nn.Linear(27, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))


def bound(make, seed=0):
    torch.manual_seed(seed)
    return TensorDictModule(make().double(), ["x"], ["y"])


def data(*batch):
    x = torch.randn(*batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return TensorDict(x=x, batch_size=batch)


def both(pull, td, **how):
    return pull(td, **how), pull(td, **how, at_calls=True)


@pytest.mark.parametrize("rule", [GuidedBackpropRule(), DeconvNetRule()], ids=["guided", "deconvolution"])
@pytest.mark.parametrize("make", [plain, Residual, Ensemble])
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
@pytest.mark.parametrize("target", [Target("y", 1), Target("y", [0, 2])], ids=["one", "two"])
def test_they_give_what_rules_at_calls_give(rule, make, batch, target):
    net = bound(make)
    pull = Pullback(net, target, rules=rules(rule))
    assert pull._nodes is not None
    nodes, calls = both(pull, data(*batch))
    torch.testing.assert_close(nodes.gradients[0], calls.gradients[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(nodes.values, calls.values, rtol=0, atol=0)
    unruled = Pullback(net, target)(data(*batch)).gradients[0]
    assert not torch.allclose(nodes.gradients[0], unruled)


@pytest.mark.parametrize("rule", [GuidedBackpropRule(), DeconvNetRule()], ids=["guided", "deconvolution"])
@pytest.mark.parametrize("width", [1, 2, None])
def test_the_flows_of_several_targets_through_an_image(rule, width):
    pull = Pullback(bound(image), Target("y", [0, 2, 1]), rules=rules(rule))
    nodes, calls = both(pull, data(7), width=width)
    assert pull._nodes is not None
    torch.testing.assert_close(nodes.gradients[0], calls.gradients[0], rtol=0, atol=1e-14)
    assert nodes.gradients[0].any(0).any(-1).all()


@pytest.mark.parametrize("path", ["1", "2"])
def test_from_a_site_inside(path):
    pull = Pullback(bound(plain), Target("y", 1), Site(path), rules=rules(GuidedBackpropRule()))
    nodes, calls = both(pull, data(7))
    assert torch.equal(nodes.gradients[0], calls.gradients[0])
    assert nodes.gradients[0].any()


def test_from_a_site_and_from_what_lies_before_it():
    pull = Pullback(bound(plain), Target("y", 1), ["x", Site("2")], rules=rules(GuidedBackpropRule()))
    nodes, calls = both(pull, data(7))
    for one, other in zip(nodes.gradients, calls.gradients, strict=True):
        assert torch.equal(one, other)


def test_the_target_may_be_a_site_behind_the_last_relu():
    net = bound(plain)
    nodes, calls = both(Pullback(net, Target(Site("3"), 2), rules=rules(DeconvNetRule())), data(7))
    assert torch.equal(nodes.gradients[0], calls.gradients[0])
    assert nodes.gradients[0].any()


def less_than_it_was(value, td):
    return -value[..., 1].relu() - F.gelu(td["inner", "h"]).sum(-1)


@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
@pytest.mark.parametrize("of", ["y", Site("1")])
def test_no_rule_is_for_what_a_target_makes_of_what_it_reads(method, of):
    torch.manual_seed(0)
    first = TensorDictModule(nn.Sequential(nn.Linear(4, 6), nn.ReLU()).double(), ["x"], [("inner", "h")])
    net = TensorDictSequential(first, TensorDictModule(nn.Linear(6, 3).double(), [("inner", "h")], ["y"]))
    rule = GuidedBackpropRule() if method is GuidedBackprop else DeconvNetRule()
    nodes, calls = both(Pullback(net, Target(of, less_than_it_was), rules=rules(rule)), data(7))
    assert torch.equal(nodes.gradients[0], calls.gradients[0])
    explained = method(net, Target(of, less_than_it_was))(data(7))["attribution", "x"]
    assert torch.equal(explained, calls.gradients[0])
    assert torch.equal(nodes.values, calls.values)


def test_nothing_is_left_on_graphs_that_the_caller_has_made():
    seed = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight, other = torch.relu(seed), torch.relu(2 * seed)  # a hypernetwork, and an entry with a graph

    def forward(x, z):
        return torch.relu(x @ weight.mT) * torch.relu(z @ weight.mT)

    net = TensorDictModule(forward, ["x", "z"], ["y"])
    td = data(3).set("z", other)
    before = torch.autograd.grad(-weight.sum() - other.sum(), seed, retain_graph=True)[0]
    nodes, calls = both(Pullback(net, Target("y", 1), "x", rules=rules(DeconvNetRule())), td)
    assert torch.equal(nodes.gradients[0], calls.gradients[0])
    assert torch.equal(torch.autograd.grad(-weight.sum() - other.sum(), seed)[0], before)
    assert (before < 0).any()


def test_nothing_is_left_after_an_error():
    x = torch.randn(4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    y = torch.relu(x)
    with pytest.raises(RuntimeError):
        AtNodes({"relu": DeconvNetRule()}, None).pull([y], y, [object()], False, False, None, "y")
    assert torch.equal(torch.autograd.grad(-y.sum(), x)[0], -(x > 0).float())


def rectifier(name):
    more = {
        "prelu": lambda x: F.prelu(x, torch.tensor([0.1], dtype=x.dtype)),
        "threshold": lambda x: F.threshold(x, 0.0, 0.0),
        "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    }
    return more.get(name) or getattr(F, name)


@pytest.mark.parametrize("name", sorted(_RECTIFIERS))
def test_another_rectifier_is_named_as_it_was_called(name):
    net = TensorDictModule(lambda x: rectifier(name)(torch.relu(x) - 0.5), ["x"], ["y"])
    with pytest.raises(BadValue, match=f"'{name}'"):
        GuidedBackprop(net, Target("y", 1))(data(3))
    GuidedBackprop(net, Target("y", 1), on_missing="gradient")(data(3))


@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
def test_another_rectifier_of_parameters_alone_is_none_of_ours(method):
    weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double())
    net = TensorDictModule(lambda x: torch.relu(x @ F.gelu(weight).mT), ["x"], ["y"])
    td = data(5)
    found = method(net, Target("y", 1))(td)["attribution", "x"]
    flows = torch.ones(5, 1) if method is Deconvolution else (td["x"] @ F.gelu(weight[1]) > 0).unsqueeze(-1)
    torch.testing.assert_close(found, (flows * F.gelu(weight[1])).detach())


def test_functions_of_the_callers_own_are_passed_through():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, flow):
            return 2 * flow

    net = TensorDictModule(lambda x: -Double.apply(torch.relu(x)), ["x"], ["y"])
    assert torch.equal(Deconvolution(net, Target("y", 1))(data(3))["attribution", "x"], torch.zeros(3, 4).double())
    both_signs = TensorDictModule(lambda x: Double.apply(torch.relu(x)), ["x"], ["y"])
    assert (Deconvolution(both_signs, Target("y", 1))(data(3))["attribution", "x"][:, 1] == 2).all()


def test_within_a_context_the_calls_are_looked_at():
    net = bound(plain)
    pull, td = Pullback(net, Target("y", 1), rules=rules(GuidedBackpropRule())), data(7)
    alone = pull(td).gradients[0]
    with Capture("1").on(net):
        assert torch.equal(pull(td).gradients[0], alone)
    with pytest.raises(BadValue, match="mix two conventions"), EpsilonRule().on(net.module[2]):
        pull(td)


@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
def test_a_second_derivative_is_that_of_the_explanation(method):
    net = bound(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    td = data(3)
    explain = method(net, Target("y", 1), create_graph=True)

    def explained(x):
        return explain(TensorDict(x=x, batch_size=[3]))["attribution", "x"]

    assert torch.equal(explained(td["x"]).detach(), method(net, Target("y", 1))(td.copy())["attribution", "x"])
    assert torch.autograd.gradcheck(explained, td["x"].requires_grad_())


def test_modules_and_other_rules_are_for_calls():
    assert AtNodes.of(rules(GuidedBackpropRule())) is not None
    assert AtNodes.of(Rules((("1", GuidedBackpropRule()),), {}, "relevance")) is None
    assert AtNodes.of(Rules((), {"relu": EpsilonRule()}, "relevance")) is None
    assert AtNodes.of(Rules((), {"gelu": GuidedBackpropRule()}, "relevance")) is None


def test_what_is_written_over_a_view_hides_the_function_so_calls_are_looked_at_from_then_on():
    pull, td = Pullback(bound(Residual), Target("y", 1), rules=rules(DeconvNetRule())), data(2, 3)
    assert pull._nodes is not None
    first, again, calls = pull(td), pull(td), pull(td, at_calls=True)
    assert pull._nodes is None
    assert torch.equal(first.gradients[0], calls.gradients[0])
    assert torch.equal(again.gradients[0], calls.gradients[0])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda nodes: pickle.loads(pickle.dumps(nodes))], ids=["deep", "pickle"]
)
def test_a_copy_knows_as_much(copied):
    nodes = AtNodes({"relu": GuidedBackpropRule()}, None)
    x = torch.randn(2, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    view = (2 * x).view(8)
    view.relu_()
    how = view.sum(), [x], False, False, None, "y"
    assert nodes.pull([view], *how) is None
    assert copied(nodes).pull([view], *how) is None
    y = torch.relu(x)
    assert torch.equal(copied(nodes).pull([y], -y.sum(), *how[1:])[0], torch.zeros(2, 4))


def test_in_a_pipeline_of_stages():
    torch.manual_seed(0)
    first = TensorDictModule(nn.Sequential(nn.Linear(4, 6), nn.ReLU()).double(), ["x"], [("inner", "h")])
    net = TensorDictSequential(first, TensorDictModule(nn.Linear(6, 3).double(), [("inner", "h")], ["y"]))
    nodes, calls = both(Pullback(net, Target("y", 1), rules=rules(GuidedBackpropRule()), whole=True), data(2, 3))
    assert torch.equal(nodes.gradients[0], calls.gradients[0])
    assert torch.equal(nodes.outputs["inner", "h"], calls.outputs["inner", "h"])
