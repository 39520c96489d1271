"""Second derivatives through changed backward passes."""

import torch

from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.twice import differentiable_once_more, now


def tripled(x):
    """``x ** 2``, whose backward pass is three times what flows."""
    return backward_by(lambda flow: (3 * flow,), x * x, [x], keep=False)


def doubled(x):
    return backward_by(lambda flow, y: (2 * flow * y,), x.sin(), [x], x.sin(), keep=False)


def test_the_first_pass_is_the_formula_the_second_one_is_ordinary():
    x = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    with differentiable_once_more(True):
        y = doubled(tripled(x))
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert first.allclose(6 * (x * x).sin())
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.allclose(6 * (x * x).cos() * 2 * x)


def test_nothing_changes_where_it_is_not_wanted():
    x = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    with differentiable_once_more(False):
        assert now() is None
        assert torch.autograd.grad(tripled(x).sum(), x)[0].equal(torch.full_like(x, 3))
    with differentiable_once_more(True):
        one = now()
        with differentiable_once_more(False):
            assert now() is None
        assert now() is one
        assert one.first
    assert not one.first
    assert now() is None
