"""A bare module under a program: called as it is, unchanged afterwards."""

import copy
import pickle

import pytest
import torch
from hooks.nets import hook_count
from torch import nn

from tdconcepts.errors import BadType
from tdconcepts.lrp import EpsilonRule, PassRule


def test_it_is_called_as_the_module_is():
    layer = nn.Bilinear(2, 3, 4)
    a, b = torch.randn(5, 2, requires_grad=True), torch.randn(5, 3)
    with EpsilonRule().on(layer) as m:
        assert m(a, b).equal(layer(a, b))
        assert m(input1=a, input2=b).equal(layer(a, b))
        assert hook_count(layer)
    assert not hook_count(layer)


def test_copies_and_pickles():
    m = PassRule().on(nn.ReLU(), convention="relevance")
    x = torch.tensor([-1.0], requires_grad=True)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.autograd.grad(other(x), x)[0] == 1


def test_not_a_module():
    with pytest.raises(BadType, match=r"nn\.Module"):
        EpsilonRule().on(torch.tanh)
