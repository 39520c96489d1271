"""Flows: formulas as backward passes, also under vmap, twice differentiated and before in-place operations; names."""

import pytest
import torch
from torch import nn

from tdconcepts.hooks.flows import (
    backward_by,
    by_formula,
    changed,
    depends,
    is_inplace,
    operation_name,
    overwritable,
    overwrite,
    tensors,
)


def doubled(x):
    return backward_by(lambda flow, x: (2 * flow * x,), x.exp(), [x])


def test_the_formula_is_the_backward_pass():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = doubled(x)
    assert y.equal(x.exp())
    assert torch.autograd.grad(y, x, torch.ones(4), retain_graph=True)[0].equal(2 * x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].equal(torch.full((4,), 2.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_under_transforms():
    x = torch.randn(4, dtype=torch.float64)
    value, pull = torch.func.vjp(doubled, x)
    seeds = torch.eye(4, dtype=torch.float64)
    assert value.equal(x.exp())
    assert torch.vmap(pull)(seeds)[0].equal(torch.diag(2 * x))

    def pulled(x):
        return torch.func.vjp(lambda x: doubled(x.clone()), x)[1](torch.ones(4))[0]

    compiled = torch.compile(pulled, fullgraph=True, backend="eager")
    assert compiled(x).equal(2 * x)
    torch._dynamo.reset()


def test_an_inplace_operation_may_follow():
    x = torch.randn(4, requires_grad=True)
    y = backward_by(lambda flow: (flow,), x * 1, [x], keep=False)
    y.relu_()
    assert torch.autograd.grad(y.sum(), x)[0].equal((x > 0).float())


def test_depends():
    x, weight = torch.randn(3, requires_grad=True), nn.Parameter(torch.randn(3))
    assert depends(x)
    assert depends(x * weight)
    assert depends((x * weight).exp().log())
    assert not depends(weight)
    assert not depends(1 + weight.square())
    assert not depends(torch.randn(3))
    assert not depends(torch.arange(3))
    assert not depends("x")


def test_trees():
    tree = (torch.ones(1), [torch.zeros(2), {"a": torch.ones(3), "b": None}], 4)
    assert [t.numel() for t in tensors(tree)] == [1, 2, 3]
    assert changed(tree, lambda t: t + 1)[1][1]["a"].equal(torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("function", "name", "inplace"),
    [
        (torch.mul, "mul", False),
        (torch.Tensor.__mul__, "mul", False),
        (torch.Tensor.__rmul__, "mul", False),
        (torch.Tensor.mul_, "mul", True),
        (torch.Tensor.__imul__, "mul", True),
        (torch.bmm, "matmul", False),
        (torch.Tensor.__truediv__, "div", False),
        (torch.Tensor.__getitem__, "getitem", False),
        (torch.nn.functional.relu, "relu", False),
        (torch.relu_, "relu", True),
        (torch.rsqrt, "rsqrt", False),
    ],
)
def test_names(function, name, inplace):
    assert (operation_name(function), is_inplace(function)) == (name, inplace)


def test_overwriting_lets_nothing_flow_to_what_was_there():
    seen = []

    def old(flow, x):
        seen.append(flow)
        return (flow,)

    x = torch.randn(3, requires_grad=True)
    target = backward_by(old, x * 1, [x])
    storage = target.data_ptr()
    found = overwrite(target, doubled(x))
    assert found is target
    assert target.data_ptr() == storage
    assert target.equal(x.exp())
    assert torch.autograd.grad(target.sum(), x)[0].equal(2 * x)
    assert not seen
    part = (x * 1)[1:]
    assert torch.autograd.grad(overwrite(part, doubled(x)[1:]).sum(), x)[0].equal(
        torch.cat([torch.zeros(1), 2 * x[1:]])
    )


def test_what_may_be_written_over():
    x = torch.randn(3)
    assert not overwritable(x)
    with torch.no_grad():
        assert overwritable(x)
        assert not torch.vmap(lambda t: t * overwritable(t))(x).any()
    seen = []
    y = backward_by(lambda flow: (seen.append(overwritable(flow)) or flow,), x.requires_grad_() * 1, [x], keep=False)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y.sum(), x)
    assert seen == [False, True]
    assert by_formula(y.grad_fn)
    assert not by_formula((x * 1).grad_fn)
