"""Functions under rules: which are looked at, and that those which pass give what they gave."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdconcepts.hooks.kept import Kept, overwrites
from tdconcepts.hooks.operating import How, Operate
from tdconcepts.hooks.plans import Plan, Run
from tdconcepts.hooks.rectifiers import GuidedBackpropRule
from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import EpsilonRule


def operate(**more):
    rules = Rules((), {"relu": GuidedBackpropRule()}, "relevance", **more)
    return Operate(rules, How(rules, True))


class Unknown:
    def __init__(self):
        self.told = []

    def knows(self, name):
        return name != "gelu"

    def __call__(self, name):
        self.told.append(name)


def test_only_what_may_matter_is_looked_at():
    act = operate(unknown=Unknown())
    passing = [f for f in (torch.conv2d, F.linear, torch.add, torch.Tensor.size, F.gelu, F.relu) if act._passes(f)]
    assert passing == [torch.conv2d, F.linear, torch.add, torch.Tensor.size]
    assert not any(map(act._passes, [torch.Tensor.add_, torch.Tensor.__iadd__, torch.Tensor.__setitem__]))
    assert not act._passes(torch.sigmoid)  # which says of a sign


def test_every_function_that_overwrites_is_looked_at():
    act = operate()
    names = [name for name in dir(torch.Tensor) if callable(getattr(torch.Tensor, name))]
    overwriting = [f for name in names if overwrites(f := getattr(torch.Tensor, name), {})]
    assert len(overwriting) > 100
    assert not any(map(act._passes, overwriting))


def test_all_are_looked_at_where_a_first_layer_is_sought():
    assert not operate(first=(lambda kind: kind == "linear", EpsilonRule()))._passes(F.linear)


@pytest.mark.parametrize("inplace", [True, False])
def test_an_argument_may_say_that_a_function_overwrites(inplace):
    act, value = operate(), -torch.ones(4)
    kept = Kept(value)
    assert act._passes(F.leaky_relu)
    found = act.operate(Run(Plan(nn.Identity(), [])), F.leaky_relu, (value, 0.5), {"inplace": inplace})
    assert torch.equal(found, torch.full((4,), -0.5))
    assert torch.equal(value, found) == inplace
    assert torch.equal(kept.get(), -torch.ones(4))


def test_an_operator_without_a_rule_ends_the_link_to_the_call_before():
    run = Run(Plan(nn.Identity(), []))
    run.store["last call"] = ("rule", "call", "output")
    assert operate()._passed(run, torch.Size([2])) == torch.Size([2])
    assert "last call" in run.store
    operate()._passed(run, torch.ones(2))
    assert "last call" not in run.store
