"""Rules of several contexts on one model: the later one counts where both have a rule; conventions do not mix."""

import contextlib

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.lrp import LRP, AttnLRP, Composite, EpsilonPlus, EpsilonRule, GuidedBackprop, PassRule

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers, a container and functional calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head, self.rnn = nn.Linear(4, 2), nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        h = torch.tanh(self.first(x)) + x
        h = self.rnn(self.block(h).unsqueeze(1))[0].squeeze(1)
        return nn.functional.linear(h, self.head.weight, self.head.bias)


@pytest.fixture
def net():
    return Net().double()


def flow(net, *contexts):
    x = X.clone().requires_grad_()
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return torch.autograd.grad(net(x)[:, 0].sum(), x)[0]


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_the_later_composite_counts(net, convention):
    one, other = EpsilonPlus(0.5, 0.5), EpsilonPlus(0.1, 0.1)
    assert flow(net, one.on(net, convention), other.on(net, convention)).equal(flow(net, other.on(net, convention)))
    within = other.on(net, convention)
    assert flow(within, one.on(net, convention), within).equal(flow(net, other.on(net, convention)))
    assert flow(within, one.on(net, convention)).equal(flow(net, other.on(net, convention)))
    assert flow(net, one.on(net, convention), AttnLRP().on(net, convention)).equal(
        flow(net, AttnLRP().on(net, convention))
    )


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(
    ("path", "rule"), [("first", EpsilonRule(2.0)), ("block", EpsilonRule(2.0)), ("rnn", EpsilonRule(2.0))]
)
def test_a_rule_on_a_part_of_a_model_under_a_composite(net, path, rule, convention):
    composite, part = EpsilonPlus(0.1), net.get_submodule(path)
    both = flow(net, (composite | {path: rule}).on(net, convention))
    assert flow(net, composite.on(net, convention), rule.on(part, convention)).equal(both)
    alone = flow(net, composite.on(net, convention))
    assert not alone.equal(both)
    assert flow(net, rule.on(part, convention), composite.on(net, convention)).equal(alone)


def test_a_later_context_that_has_no_rule_for_a_layer_leaves_it(net):
    rules = Composite({nn.Linear: EpsilonRule(0.5)}, on_missing="gradient")
    both = flow(net, rules.on(net, "relevance"), GuidedBackprop().on(net))
    over = dict(GuidedBackprop().rules)
    assert both.equal(flow(net, (rules | over).on(net, "relevance")))
    assert not both.equal(flow(net, GuidedBackprop().on(net)))


def test_a_plain_rule_counts_too(net):
    """LRP-0 is the gradient in the gradient convention, also of one layer under a composite that has another rule."""
    zero = EpsilonRule(0.0)
    expected = X * flow(net, (EpsilonPlus(0.5, 1e-12) | {"first": EpsilonRule(1e-13)}).on(net))
    torch.testing.assert_close(X * flow(net, (EpsilonPlus(0.5, 1e-12) | {"first": zero}).on(net)), expected)
    found = flow(net, EpsilonPlus(0.5, 1e-12).on(net), zero.on(net.first))
    torch.testing.assert_close(X * found, expected)


def test_explainers_inside_contexts(net):
    model, td = TensorDictModule(net, ["x"], ["y"]), TensorDict(x=X, batch_size=[3])
    explainer = LRP(model, EpsilonPlus(0.1), Target("y", 0))
    expected = explainer(td.copy())["attribution", "x"]
    for context in (EpsilonPlus(0.5).on(net), EpsilonRule(0.5).on(net.first), PassRule().on(nn.ReLU(), "relevance")):
        with context:
            assert explainer(td.copy())["attribution", "x"].equal(expected)


def test_mixtures_are_refused(net):
    for one, other in (
        (EpsilonPlus().on(net, "relevance"), EpsilonPlus().on(net)),
        (EpsilonRule().on(net.first, "relevance"), EpsilonPlus().on(net)),
        (EpsilonPlus().on(net, "relevance"), EpsilonRule().on(net.block)),
    ):
        with pytest.raises(BadValue, match=r"two contexts mix two conventions[\s\S]*relevance\) and|gradient\) and"):
            flow(net, one, other)
