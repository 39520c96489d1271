"""A call under a rule: conventions, and the refusal of terminal rules in the middle."""

import pytest
import torch
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.calls import check_convention
from tdconcepts.lrp import FlatRule, PassRule, WSquareRule


def test_conventions():
    check_convention("gradient")
    check_convention("relevance")
    with pytest.raises(BadValue, match="no such convention"):
        PassRule().on(nn.ReLU(), convention="gradients")


def test_terminal_rules_end_the_propagation():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3, requires_grad=True)
    with WSquareRule().on(net[0]), FlatRule().on(net[1]), pytest.raises(BadValue, match="ends the propagation"):
        net(x)
    with FlatRule().on(net[1]):  # nothing with a rule lies in front
        net(x)
