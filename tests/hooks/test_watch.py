"""What a step does at a place that is read: the value, its version, and where a gradient can be taken."""

import pytest
import torch
from hooks.nets import mlp

from tdconcepts.errors import BadValue
from tdconcepts.hooks.plans import Plan, Run
from tdconcepts.hooks.watch import Read, Record, Seen, Watch, check_version, settle, unwrapped


@pytest.fixture
def run():
    run = Run(Plan(mlp(), ()))
    run.store["points"] = {}
    return run


def graph():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    return x, x * 2


# ---------------------------------------------------------------------------------------------------- record


def test_a_record_shares_memory_and_has_no_graph(run):
    value = graph()[1]
    assert Record("k", 1, clone=False, detach=True)(value, run) is value
    (seen,) = run.store["k"]
    assert seen.value.data_ptr() == value.data_ptr()
    assert not seen.value.requires_grad
    assert seen.version == value._version


def test_a_record_keeps_the_graph_on_request(run):
    value = graph()[1]
    Record("k", 1, clone=False, detach=False)(value, run)
    assert run.store["k"][0].value is value


@pytest.mark.parametrize(("keep", "kept"), [(None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), (9, [0, 1, 2, 3])])
def test_a_record_keeps_the_last_calls(run, keep, kept):
    step = Record("k", keep, clone=True, detach=True)
    for i in range(4):
        step(torch.tensor(float(i)), run)
    assert [seen.value.item() for seen in run.store["k"]] == kept


def test_an_overwritten_value_is_noticed(run):
    value = graph()[1]
    Record("copy", 1, clone=True, detach=True)(value, run)
    Record("same", 1, clone=False, detach=True)(value, run)
    copied, same = run.store["copy"][0], run.store["same"][0]
    assert check_version(same, "site").equal(value)
    value.relu_()
    assert check_version(copied, "site").tolist() == [2, -4, 6]
    with pytest.raises(BadValue, match="captured at 'site' was overwritten") as error:
        check_version(same, "site")
    assert "capture(model, 'site', clone=True)" in str(error.value)


@pytest.mark.parametrize("clone", [False, True])
def test_inference_tensors_are_copied_into_normal_ones(run, clone):
    with torch.inference_mode():
        value = torch.ones(3)
        Record("k", 1, clone, detach=True)(value, run)
    seen = run.store["k"][0]
    assert not seen.value.is_inference()
    assert seen.version is None


# ---------------------------------------------------------------------------------------------------- watch, read


def test_the_edge_of_a_value_survives_what_is_done_in_place_to_it(run):
    x, value = graph()
    assert Watch("k")(value, run) is value
    kept = value.detach().clone()
    y = value.relu_().sum()
    gradient = torch.autograd.grad(y, [run.store["k"].handle, x])
    assert gradient[0].tolist() == [1, 0, 1], "before the ReLU"
    assert gradient[1].tolist() == [2, 0, 2]
    run.store["snapshot"] = True
    x, value = graph()
    Watch("k")(value, run)
    value.relu_()
    assert run.store["k"].value.equal(kept)


def test_the_edge_of_a_view_survives_too(run):
    x = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    view = (x * 2).view(3)
    passed = Watch("k")(view, run)
    gradient = torch.autograd.grad(passed.relu_().sum(), run.store["k"].handle)[0]
    assert gradient.tolist() == [1, 0, 1]


def test_a_value_without_a_graph_becomes_a_leaf(run):
    value = torch.tensor([1.0, -2.0])
    passed = Watch("k")(value, run)
    assert passed.equal(value)
    assert not value.requires_grad
    gradient = torch.autograd.grad(passed.relu_().sum(), run.store["k"].handle)[0]
    assert gradient.tolist() == [1, 0]


@pytest.mark.parametrize("grown", [False, True])
def test_a_given_point_takes_the_place(run, grown):
    value = graph()[1] if grown else torch.ones(3)
    run.store["points"]["k"] = torch.tensor([[5.0, 6.0, 7.0]], dtype=torch.float64)
    passed = Watch("k")(value, run)
    assert passed.tolist() == [5, 6, 7]
    assert passed.dtype == value.dtype
    gradient = torch.autograd.grad((passed**2).sum(), run.store["k"].handle)[0]
    assert gradient.tolist() == [10, 12, 14]
    Watch("other")(value, run)
    assert run.store["other"].value.equal(value)


def test_shapes_are_looked_at_without_a_graph(run):
    run.store["shapes"] = True
    value = graph()[1]
    assert Watch("k")(value, run) is value
    value.relu_()
    assert run.store["k"].value.tolist() == [2, -4, 6]


def test_a_zero_is_added_under_transforms(run):
    zeros = torch.zeros(3, requires_grad=True)
    run.store["zeros"] = {"k": zeros}
    passed = Watch("k")(torch.ones(3), run)
    assert torch.autograd.grad((passed * 3).sum(), zeros)[0].tolist() == [3, 3, 3]


def test_a_target_is_read_as_it_is_now(run):
    x, value = graph()
    assert Read("k")(value, run) is value
    value.relu_()
    assert run.store["target", "k"].tolist() == [2, -4, 6]
    assert torch.autograd.grad(run.store["target", "k"].sum(), x)[0].tolist() == [2, 2, 2]


# ---------------------------------------------------------------------------------------------------- inside a vmap


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_values_that_leave_a_vmap_are_settled(dim):
    held = []

    def model(x):
        held.extend([x, x * 2])
        return x

    x = torch.arange(24.0).reshape(2, 3, 4)
    torch.vmap(model, dim)(x)
    assert unwrapped(held[0]).equal(x), "as vmap keeps it"
    for lead in (0, 1, 2):
        for value, factor in zip(held, (1, 2), strict=True):
            assert settle(value, torch.Size([2] * lead)).equal(factor * x.movedim(dim, lead)), "behind the batch dims"
    assert settle(x, torch.Size([2])) is x
    assert unwrapped(x) is x


def test_values_of_the_callers_own_vmap_stay():
    def inside(x):
        assert settle(x, torch.Size([])) is x
        return x

    torch.vmap(inside)(torch.ones(3, 2))


def test_a_site_inside_a_vmap_needs_a_graph(run):
    def model(x):
        return Watch("site")(x, run)

    with pytest.raises(BadValue, match="the site site runs inside vmap and has no graph") as error:
        torch.vmap(model)(torch.ones(3, 2))
    assert "needed:" in str(error.value)
    x = torch.ones(3, 2, requires_grad=True)
    out = torch.vmap(model, 1)(x)
    seen = run.store["site"]
    assert isinstance(seen, Seen)
    assert torch.autograd.grad(out.sum(), seen.handle)[0].shape == (3, 2)
    assert seen.mapped == 1
