"""The function mode: it acts during calls only, and is withdrawn from wherever it stands."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import StopRule


class Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Other(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def stopped(y, x):
    return bool((torch.autograd.grad(y.sum(), x)[0] == 0).all())


def test_it_acts_in_calls_of_the_model_only():
    net, x = Tanh(), torch.randn(3, requires_grad=True)
    program = Rules((), {"tanh": StopRule()})
    with program.on(net) as m:
        assert stopped(m(x), x)
        assert stopped(net(x), x)
        assert not stopped(torch.tanh(x), x)
    assert not stopped(net(x), x)
    assert stopped(m(x), x)


def test_exits_in_any_order():
    net, x = Tanh(), torch.randn(3, requires_grad=True)
    first, second = (Rules((), {"tanh": StopRule()}).on(net) for _ in range(2))
    first.__enter__()
    with Other():
        second.__enter__()
        first.__exit__(None, None, None)
        assert stopped(net(x), x)
        second.__exit__(None, None, None)
        assert [type(mode) for mode in _get_current_function_mode_stack()] == [Other]
    assert not stopped(net(x), x)
