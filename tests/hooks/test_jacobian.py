"""Vector-Jacobian products: seeds, widths, leaves and gradient modes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import get_gradient_edge

from tdconcepts.errors import BadValue
from tdconcepts.hooks.jacobian import _neck, differentiable, new_leaf, seeds, tangent, vector_jacobian

MIX = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def values_of(x):
    return torch.tanh(x @ MIX)


@given(st.sampled_from([(), (2,), (2, 3)]), st.integers(1, 5))
def test_seeds_have_a_one_in_their_own_column(shape, count):
    found = seeds(torch.zeros(*shape, count, dtype=torch.float64))
    assert found.shape == (count, *shape, count)
    assert found.dtype == torch.float64
    for t in range(count):
        expected = torch.zeros(*shape, count, dtype=torch.float64)
        expected[..., t] = 1
        assert found[t].equal(expected)


@given(st.sampled_from([(), (2,), (2, 3)]), st.none() | st.integers(1, 6))
def test_several_targets_are_the_rows_of_the_jacobian(shape, width):
    x = torch.randn(*shape, 3, requires_grad=True)
    found = vector_jacobian(values_of(x), [x], True, False, width, "y")[0]
    assert found.shape == (4, *shape, 3)
    for t in range(4):
        torch.testing.assert_close(found[t], torch.autograd.grad(values_of(x)[..., t].sum(), x)[0])


def test_one_target():
    x = torch.randn(5, 3, requires_grad=True)
    values = values_of(x)[..., 1]
    found = vector_jacobian(values, [x], False, False, None, "y")[0]
    assert found.equal(torch.autograd.grad(values_of(x)[..., 1].sum(), x)[0])
    with pytest.raises(RuntimeError):  # the graph is gone
        torch.autograd.grad(values.sum(), x)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("width", [None, 1, 3])
def test_the_graph_is_kept_on_request(several, width):
    x = torch.randn(3, requires_grad=True)
    values = values_of(x) if several else values_of(x)[1]
    found = vector_jacobian(values, [x], several, True, width, "y")[0]
    assert found.requires_grad
    gradient = torch.autograd.grad(found.sum(), x)[0]
    wanted = values_of if several else lambda x: values_of(x)[1]
    hessian = torch.autograd.functional.jacobian(lambda x: torch.func.jacrev(wanted)(x).sum(), x)
    torch.testing.assert_close(gradient, hessian)
    assert not vector_jacobian(values_of(x), [x], True, False, width, "y")[0].requires_grad


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("width", [None, 1])
def test_what_does_not_matter_is_none(several, width):
    x, unused = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    values = values_of(x) if several else values_of(x)[..., 0]
    found = vector_jacobian(values, [unused, x], several, False, width, "y")
    assert found[0] is None
    assert found[1].shape == ((4, 2, 3) if several else (2, 3))


def test_nothing_is_accumulated():
    x = torch.randn(2, 3, requires_grad=True)
    vector_jacobian(values_of(x), [x], True, False, None, "y")
    assert x.grad is None


def test_no_graph():
    with pytest.raises(BadValue, match="no gradient reaches the target 'y'") as error:
        vector_jacobian(torch.ones(3), [torch.ones(3)], False, False, None, "'y'")
    assert all(word in str(error.value) for word in ("got:", "needed:", "way out:"))


def test_leaves():
    plain, grown = torch.randn(3), torch.randn(3, requires_grad=True) * 2
    for value in (plain, grown):
        leaf = new_leaf(value, create_graph=False)
        assert leaf.requires_grad
        assert leaf.is_leaf
        assert leaf.data_ptr() == value.data_ptr(), "the same memory"
    assert not plain.requires_grad
    assert new_leaf(grown, create_graph=True) is grown
    assert new_leaf(plain, create_graph=True).is_leaf
    with torch.inference_mode():
        frozen = torch.randn(3)
    assert not new_leaf(frozen, create_graph=False).is_inference()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradient_mode_is_on_whatever_the_caller_is_in(mode):
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with differentiable():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            x = torch.ones(2, requires_grad=True)
            assert (x * 2).requires_grad
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("function", [torch.tanh, torch.relu, lambda x: x.softmax(-1)])
def test_the_derivative_along_the_input(function):
    x = torch.randn(3, dtype=torch.float64)
    value, along = tangent(function, x)
    assert torch.equal(value, function(x))
    torch.testing.assert_close(along, torch.autograd.functional.jacobian(function, x) @ x)


def image_network(frozen=False):
    """A convolution, then vectors: the graph has a neck between the two."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6), nn.Tanh(), nn.Linear(6, 5)
    return nn.Sequential(*layers).double().requires_grad_(not frozen)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("site", [None, 1, 2, 3])
def test_the_layers_at_the_end_are_pulled_through_together(frozen, site):
    """And the rest one by one, to the same numbers; also where some value after the neck is asked for."""
    net, x = image_network(frozen), torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    inner = x if site is None else net[: site + 1](x)
    values = net(x) if site is None else net[site + 1 :](inner)
    wanted = [x] if site is None else [x, get_gradient_edge(inner)]
    assert (_neck(values, wanted) is None) == (site is not None)
    found = vector_jacobian(values, wanted, True, False, 1, "y")
    for t in range(5):
        expected = torch.autograd.grad(net(x)[:, t].sum(), x)[0]
        torch.testing.assert_close(found[0][t], expected)
        if site is not None:
            after = inner.detach().requires_grad_()
            torch.testing.assert_close(found[1][t], torch.autograd.grad(net[site + 1 :](after)[:, t].sum(), after)[0])
    assert found[0].movedim(0, 1).is_contiguous(), "row by row in memory"


@pytest.mark.parametrize("at", range(6))
def test_a_hook_on_an_activation_acts_once(at):
    net, x = image_network(), torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def of(x):
        inner = net[: at + 1](x)
        inner.register_hook(lambda flow: 3 * flow)
        return net[at + 1 :](inner)

    found = vector_jacobian(of(x), [x], True, False, 1, "y")[0]
    torch.testing.assert_close(found[2], 3 * torch.autograd.grad(net(x)[:, 2].sum(), x)[0])


def test_no_neck_where_the_graph_has_two_ways():
    net, x = image_network(), torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def of(x):
        return net(x) + x.sum((1, 2, 3)).unsqueeze(-1)

    assert _neck(of(x), [x]) is None
    found = vector_jacobian(of(x), [x], True, False, 1, "y")[0]
    torch.testing.assert_close(found[2], torch.autograd.grad(of(x)[:, 2].sum(), x)[0])
    weight = net[3].weight  # whoever asks for a parameter gets it
    found = vector_jacobian(net(x), [x, weight], True, False, 1, "y")
    torch.testing.assert_close(found[1][2], torch.autograd.grad(net(x)[:, 2].sum(), weight)[0])


def test_no_neck_that_is_wider_than_what_is_asked_for():
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.randn(2, 4, requires_grad=True)
    assert _neck(net(x), [x]) is None
