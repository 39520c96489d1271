"""The pull-back: one and many targets against a slow loop of autograd, to entries and sites of all kinds."""

import copy
import pickle

import pytest
import torch
from hooks.nets import batch, entries, hook_count, linear, mlp, pipeline, slow, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Patch, Pullback, Replace, Scale, Site, Target, anchor, patch

W0, B0 = linear(4, 3, 0).weight.detach(), linear(4, 3, 0).bias.detach()
W1, B1 = linear(3, 2, 1).weight.detach(), linear(3, 2, 1).bias.detach()


PARTS = {
    "x": (lambda x: x, lambda x: torch.tanh(x @ W0.T + B0) @ W1.T + B1),
    "h": (lambda x: x @ W0.T + B0, lambda h: torch.tanh(h) @ W1.T + B1),
    "z": (lambda x: torch.tanh(x @ W0.T + B0), lambda z: z @ W1.T + B1),
}
SELECTIONS = {
    "int": (1, lambda y: y[..., 1]),
    "argmax": ("argmax", lambda y: y.max(-1).values),
    "list": ([1, 0], lambda y: y[..., [1, 0]]),
    "slice": (slice(None), lambda y: y),
    "one of a list": ([1], lambda y: y[..., [1]]),
    "mixed": ([0, "argmax"], lambda y: torch.stack([y[..., 0], y.max(-1).values], -1)),
    "callable": (lambda y, td: y.square().sum(-1), lambda y: y.square().sum(-1)),
}
WHERE = {
    "entries": (pipeline, ["x", "h", "z"]),
    "sites": (pipeline, ["x", Site("0"), Site("1")]),
    "inputs of sites": (pipeline, [Site("0", "input"), Site("1", "input"), Site("2", "input")]),
    "inside one module": (mlp, ["x", Site("0"), Site("1")]),
    "inputs inside": (mlp, [Site("0", "input"), Site("1", "input"), Site("2", "input")]),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_against_a_loop_of_autograd(where, selection, shape):
    (make, wrts), (select, meaning) = WHERE[where], SELECTIONS[selection]
    net = make()
    td = batch(5) if shape == (5,) else batch(2, 3) if shape else batch(1)[0]
    lead = len(shape)
    found = Pullback(net, Target("y", select), wrts).gradients(td)
    for gradient, (before, rest) in zip(found, PARTS.values(), strict=True):
        expected = slow(lambda v, rest=rest: meaning(rest(v)), before(td["x"]), lead)
        assert gradient.shape == expected.shape
        torch.testing.assert_close(gradient, expected)
        assert not gradient.requires_grad


@settings(max_examples=25)
@given(st.lists(st.integers(-3, 2), min_size=1, max_size=6), st.none() | st.integers(1, 4))
def test_targets_are_independent_whatever_their_number_and_width(columns, width):
    net = TensorDictModule(nn.Sequential(linear(4, 3, 0), nn.Tanh(), linear(3, 3, 1)), ["x"], ["y"])
    td = batch()
    together = Pullback(net, Target("y", columns), ["x", Site("1")])(td, width=width)
    for i, column in enumerate(columns):
        alone = Pullback(net, Target("y", column), ["x", Site("1")])(td)
        assert together.values[:, i].equal(alone.values)
        for many, one in zip(together.gradients, alone.gradients, strict=True):
            torch.testing.assert_close(many[:, i], one)


def test_parts_of_sites():
    net = mlp()
    whole = Pullback(net, Target("y", [0, 1]), Site("1")).gradients(batch())[0]
    for index in (2, slice(0, 2), [0, 2], (..., 1)):
        part = Pullback(net, Target("y", [0, 1]), Site("1", index=index)).gradients(batch())[0]
        assert part.equal(whole[(slice(None), slice(None), *(index if isinstance(index, tuple) else (index,)))])


def test_an_activation_as_the_target():
    net, td = mlp(), batch()
    for select, meaning in (
        (2, lambda h: h[..., 2]),
        ([0, 2], lambda h: h[..., [0, 2]]),
        ("argmax", lambda h: h.max(-1).values),
    ):
        found = Pullback(net, Target(Site("0"), select)).gradients(td)[0]
        torch.testing.assert_close(found, slow(lambda x, meaning=meaning: meaning(x @ W0.T + B0), td["x"], 1))
    part = Pullback(net, Target(Site("1", index=slice(0, 2)), 1), Site("0")).gradients(td)[0]
    torch.testing.assert_close(part, slow(lambda h: torch.tanh(h)[..., 1], td["x"] @ W0.T + B0, 1))


def test_a_target_before_what_it_is_explained_by_gives_zeros():
    net = pipeline()
    for select, shape in ((0, (5, 3)), ([0, 1], (5, 2, 3))):
        x, z = Pullback(net, Target("h", select), ["x", Site("1")]).gradients(batch())
        assert x.any()
        assert z.shape == shape
        assert not z.any()


@pytest.mark.parametrize("select", [0, [0, 1]])
def test_inputs_that_do_not_matter_give_zeros(select):
    net = TensorDictModule(lambda x, unused: x * 2, ["x", "unused"], ["y"])
    td = batch(unused=torch.ones(5, 7))
    x, unused = Pullback(net, Target("y", select)).gradients(td)
    assert x.any()
    assert unused.shape == ((5, 7) if select == 0 else (5, 2, 7))
    assert not unused.any()


def test_by_the_chosen_index():
    net = mlp()
    action = torch.tensor([0, 1, 1, 0, 1])
    expected = slow(lambda x: PARTS["x"][1](x).gather(-1, action.unsqueeze(-1)).squeeze(-1), batch()["x"], 1)
    pull = Pullback(net, Target("y", by="action"))
    assert pull.in_keys == ["x", "action"]
    for code in (action, action.unsqueeze(-1), nn.functional.one_hot(action, 2)):
        torch.testing.assert_close(pull.gradients(batch(action=code))[0], expected)


# ---------------------------------------------------------------------------------------------------- derivatives of it


@pytest.mark.parametrize("wrt", ["x", Site("0"), Site("1", index=slice(0, 2))])
@pytest.mark.parametrize("select", [1, [1, 0]])
def test_create_graph_gives_the_hessian(wrt, select):
    net, x = mlp().double(), batch()["x"].double()[0]
    pull = Pullback(net, Target("y", select), wrt)

    def gradient(x):
        found = pull.gradients(TensorDict(x=x, batch_size=[]), create_graph=True)[0]
        return found if select == 1 else found[0]

    w0, b0, w1, b1 = W0.double(), B0.double(), W1.double(), B1.double()
    jacobian = torch.autograd.functional.jacobian(gradient, x)
    hessian = torch.autograd.functional.hessian(lambda x: (torch.tanh(x @ w0.T + b0) @ w1.T + b1)[1], x)
    if wrt == "x":
        torch.testing.assert_close(jacobian, hessian)
    elif wrt == Site("0"):
        torch.testing.assert_close(w0.T @ jacobian, hessian)
    else:
        assert not jacobian.any(), "the last layer is linear"


def test_create_graph_reaches_the_parameters():
    net, td = mlp(), batch()
    penalty = Pullback(net, Target("y", 0), ["x", Site("0")])(td, create_graph=True)
    (penalty.gradients[0].square().sum() + penalty.values.sum() + penalty.points[1].sum()).backward()
    reference = mlp()
    x = td["x"].clone().requires_grad_()
    h = reference.module[0](x)
    y = reference.module[2](torch.tanh(h))[:, 0]
    (torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum() + y.sum() + h.sum()).backward()
    for mine, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_create_graph_goes_on_into_what_made_the_input():
    net, scale = mlp(), torch.tensor(2.0, requires_grad=True)
    td = TensorDict(x=batch()["x"] * scale, batch_size=[5])
    gradient = Pullback(net, Target("y", 0)).gradients(td, create_graph=True)[0]
    found = torch.autograd.grad(gradient.sum(), scale)[0]
    x = batch()["x"]
    expected = torch.autograd.functional.jacobian(
        lambda s: ((1 - torch.tanh(x * s @ W0.T + B0) ** 2) * W1[0] @ W0).sum(), torch.tensor(2.0)
    )
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("wrt", ["x", "h", Site("1")])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_model_and_inputs_stay_as_they_were(wrt, mode):
    net = pipeline()
    net[2].requires_grad_(False)
    td = batch(other=torch.ones(5))
    expected = Pullback(net, Target("y", 1), wrt).gradients(td)[0]
    before, held = snapshot(net), entries(td)
    with mode():
        pulled = Pullback(net, Target("y", 1), wrt)(td)
    assert snapshot(net) == before
    assert entries(td) == held
    assert not td["x"].requires_grad
    assert pulled.gradients[0].equal(expected)
    assert not any(t.requires_grad for t in [pulled.values, *pulled.points, *pulled.gradients])


def test_gradients_that_are_being_collected_stay_apart():
    net, td = mlp(), batch()
    td["x"].requires_grad_()
    net(td.copy())["y"].sum().backward()
    kept = [p.grad.clone() for p in [*net.parameters(), td["x"]]]
    Pullback(net, Target("y", [0, 1]), ["x", Site("0")]).gradients(td)
    assert all(p.grad.equal(k) for p, k in zip([*net.parameters(), td["x"]], kept, strict=True))


@pytest.mark.parametrize("select", [1, [0, 1]])
@pytest.mark.parametrize("frozen", ["all", "first", "last"])
def test_frozen_parameters(select, frozen):
    net = mlp()
    expected = Pullback(net, Target("y", select), ["x", Site("0"), Site("1"), Site("2", "input")]).gradients(batch())
    {"all": net, "first": net.module[0], "last": net.module[2]}[frozen].requires_grad_(False)
    for wrts, which in (
        (["x", Site("0"), Site("1"), Site("2", "input")], [0, 1, 2, 3]),
        ([Site("0"), Site("1")], [1, 2]),
    ):
        found = Pullback(net, Target("y", select), wrts).gradients(batch())
        for mine, i in zip(found, which, strict=True):
            torch.testing.assert_close(mine, expected[i])


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
@pytest.mark.parametrize("wrt", ["x", Site("0"), Site("0", index=1)])
@pytest.mark.parametrize("select", [1, [0, 1]])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_place_modules_change_nothing(shape, wrt, select, frozen):
    """A linear layer gives a view where there is no batch dim, or several; an in-place ReLU rebases its history."""
    td = batch(*shape) if shape else batch(1)[0]
    plain, in_place = mlp(act=nn.ReLU()), mlp(act=nn.ReLU(inplace=True))
    for net in (plain, in_place):
        net.requires_grad_(not frozen)
    expected, found = (Pullback(net, Target("y", select), wrt)(td, snapshot=True) for net in (plain, in_place))
    assert found.gradients[0].equal(expected.gradients[0])
    assert found.points[0].equal(expected.points[0])
    assert found.values.equal(expected.values)


def test_an_input_that_the_model_overwrites():
    """Torch refuses to change a leaf in place, and says so; the caller's tensor is safe."""
    net = TensorDictModule(lambda x: x.mul_(2).sum(-1, keepdim=True), ["x"], ["y"])
    td = batch()
    kept = td["x"].clone()
    with pytest.raises(RuntimeError, match="in-place"):
        Pullback(net, Target("y", 0)).gradients(td)
    assert td["x"].equal(kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    net = mlp().to(dtype)
    td = batch().to(dtype)
    pulled = Pullback(net, Target("y", [0, 1]), ["x", Site("1")])(td)
    assert {t.dtype for t in [pulled.values, *pulled.points, *pulled.gradients]} == {dtype}


@pytest.mark.parametrize("select", [0, [0, 1], "argmax"])
def test_empty_batches(select):
    t = (2,) if isinstance(select, list) else ()
    found = Pullback(mlp(), Target("y", select), ["x", Site("0"), Site("1", index=2)]).gradients(batch()[:0])
    assert [tuple(g.shape) for g in found] == [(0, *t, 4), (0, *t, 3), (0, *t)]


def test_rows_are_explained_alone():
    net, td = mlp(), batch()
    pull = Pullback(net, Target("y", ["argmax", 0]), ["x", Site("1")])
    together = pull.gradients(td)
    alone = [pull.gradients(td[i : i + 1]) for i in range(5)]
    for many, rows in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(many, torch.cat(rows))


# ---------------------------------------------------------------------------------------------------- points, values


def test_what_one_pull_back_gives():
    net, td = pipeline(), batch()
    pulled = Pullback(net, Target("y", 1), ["x", "h", Site("1")])(td, snapshot=True)
    reference = net(batch())
    torch.testing.assert_close(pulled.values, reference["y"][:, 1].detach())
    for point, key in zip(pulled.points, ("x", "h", "z"), strict=True):
        torch.testing.assert_close(point, reference[key].detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_at_given_points(frozen):
    """A path or a noise moves the point: the gradient is that of the rest of the network, there."""
    net, td, z = mlp().requires_grad_(not frozen), batch(), torch.randn(5, 3)
    expected = slow(lambda h: (torch.tanh(h) @ W1.T + B1)[:, 0], z, 1)
    pulled = Pullback(net, Target("y", 0), [Site("0")])(td, {Site("0"): z})
    torch.testing.assert_close(pulled.gradients[0], expected)
    torch.testing.assert_close(pulled.values, (torch.tanh(z) @ W1.T + B1)[:, 0])
    torch.testing.assert_close(pulled.points[0], z)
    x = torch.randn(5, 4)
    moved = Pullback(net, Target("y", 0))(td, {"x": x})
    torch.testing.assert_close(moved.gradients[0], slow(lambda x: PARTS["x"][1](x)[:, 0], x, 1))
    assert td["x"].equal(batch()["x"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("where", ["x", Site("0")])
def test_given_points_keep_their_graph_on_request(frozen, where):
    """A path from a baseline to the input: its gradient's gradient goes through the points."""
    net = mlp().double().requires_grad_(not frozen)
    rest = (lambda x: net.module(x)) if where == "x" else (lambda h: net.module[2](torch.tanh(h)))
    point = torch.randn(5, 4 if where == "x" else 3, dtype=torch.float64, requires_grad=True)
    td = batch().double()
    pulled = Pullback(net, Target("y", 0), where)(td, {where: point}, create_graph=True)
    found = pulled.gradients[0].sum() + pulled.values.sum() + pulled.points[0].square().sum()
    values = rest(point)[:, 0]
    gradient = torch.autograd.grad(values.sum(), point, create_graph=True)[0]
    expected = gradient.sum() + values.sum() + point.square().sum()
    torch.testing.assert_close(torch.autograd.grad(found, point)[0], torch.autograd.grad(expected, point)[0])


def test_evaluate_is_the_forward_alone():
    net, td, z = mlp(), batch(), torch.randn(5, 3)
    pull = Pullback(net, Target("y", 0), ["x", Site("0")])
    values, seen = pull.evaluate(td)
    torch.testing.assert_close(values, net(batch())["y"][:, 0].detach())
    torch.testing.assert_close(seen[Site("0")], td["x"] @ W0.T + B0)
    values, seen = pull.evaluate(td, {Site("0"): z})
    torch.testing.assert_close(values, (torch.tanh(z) @ W1.T + B1)[:, 0])
    torch.testing.assert_close(seen[Site("0")], z)
    assert not values.requires_grad
    assert not hook_count(net)


def test_the_choice_of_argmax_is_held():
    net = TensorDictModule(nn.Identity(), ["x"], ["y"])
    pull = Pullback(net, Target("y", "argmax"))
    td, other = (
        TensorDict(x=torch.tensor([[1.0, 2.0]]), batch_size=[1]),
        TensorDict(x=torch.tensor([[9.0, 3.0]]), batch_size=[1]),
    )
    held = pull.hold(td)
    assert held.tolist() == [1]
    assert pull(other).gradients[0].tolist() == [[1, 0]]
    assert pull(other, held=held).gradients[0].tolist() == [[0, 1]]
    assert Pullback(net, Target("y", 0)).hold(td) is None


def test_the_whole_module_writes_its_outputs():
    net = TensorDictSequential(*pipeline(), TensorDictModule(lambda y: y.argmax(-1), ["y"], ["action"]))
    part, whole = Pullback(net, Target("y", 0)), Pullback(net, Target("y", 0), whole=True)
    assert part(batch()).outputs.get("action") is None
    outputs = whole(batch()).outputs
    assert outputs["action"].equal(net(batch())["action"])
    assert not any(value.requires_grad for value in outputs.values())


def test_by_means_what_the_whole_module_has_just_written():
    net = TensorDictSequential(*pipeline(), TensorDictModule(lambda y: y.argmin(-1), ["y"], ["action"]))
    logged = torch.zeros(5, dtype=torch.long)
    td = batch(action=logged)
    part = Pullback(net, Target("y", by="action"), "x").gradients(td)[0]
    whole = Pullback(net, Target("y", by="action"), "x", whole=True).gradients(td)[0]
    torch.testing.assert_close(part, Pullback(net, Target("y", 0)).gradients(td)[0])
    least = slow(lambda x: PARTS["x"][1](x).min(-1).values, td["x"], 1)
    torch.testing.assert_close(whole, least)
    assert td["action"].equal(logged)


def test_a_callable_may_read_entries():
    def contrast(value, td):
        chosen, other = (value.gather(-1, td[key].unsqueeze(-1)).squeeze(-1) for key in ("action", "other"))
        return chosen - other

    contrast.in_keys = ["action", "other"]
    net = mlp()
    td = batch(action=torch.tensor([0, 1, 0, 1, 0]), other=torch.tensor([1, 0, 0, 0, 1]))
    pull = Pullback(net, Target("y", contrast))
    assert set(pull.in_keys) == {"x", "action", "other"}
    expected = slow(lambda x: contrast(PARTS["x"][1](x), td), td["x"], 1)
    torch.testing.assert_close(pull.gradients(td)[0], expected)


# ---------------------------------------------------------------------------------------------------- under transforms


@pytest.mark.parametrize("make", [mlp, pipeline])
@pytest.mark.parametrize("select", [1, [1, 0], "argmax"])
def test_under_vmap_it_is_the_same(make, select):
    """Inside a transform the pull-back is written with torch.func; outside it is one call of autograd."""
    net, td = make(), batch(3, 5)
    wrts = ["x", Site("0"), Site("1", index=slice(0, 2)), Site("2", "input")]
    pull = Pullback(net, Target("y", select), wrts)
    eager = pull(td, snapshot=True)

    def mapped(x):
        pulled = pull(TensorDict(x=x, batch_size=[5]), snapshot=True)
        return pulled.values, pulled.points, pulled.gradients

    values, points, gradients = torch.vmap(mapped)(td["x"])
    torch.testing.assert_close(values, eager.values)
    for mine, theirs in zip([*points, *gradients], [*eager.points, *eager.gradients], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not hook_count(net)


def test_under_vmap_over_parameters():
    nets = [mlp(), mlp()]
    with torch.no_grad():
        nets[1].module[2].weight.mul_(3)
    stacked = torch.stack([TensorDict.from_module(net) for net in nets])
    net, td = mlp(), batch()
    pull = Pullback(net, Target("y", 0), ["x", Site("1")])

    def mapped(params):
        with params.to_module(net):
            return tuple(pull.gradients(td))

    found = torch.vmap(mapped)(stacked)
    for i, one in enumerate(nets):
        expected = Pullback(one, Target("y", 0), ["x", Site("1")]).gradients(td)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[i], theirs)


# ---------------------------------------------------------------------------------------------------- inside contexts


def test_it_obeys_the_contexts_around_it():
    net, td = pipeline(), batch()
    plain = Pullback(net, Target("y", 0), ["x", Site("1")])
    with patch(net, {Site("0"): Scale(2.0), Site("1", call=0): Scale(3.0)}):
        inside = Pullback(net, Target("y", 0), ["x", Site("1")])
        for pull in (plain, inside, plain, inside):
            x, z = pull.gradients(td)
            h = td["x"] @ W0.T + B0
            torch.testing.assert_close(
                z, W1[0].expand(5, 3), msg="the site is watched after the edit of the outer context"
            )
            torch.testing.assert_close(x, 2 * (3 * W1[0] * (1 - torch.tanh(2 * h) ** 2)) @ W0)
    torch.testing.assert_close(plain.gradients(td)[0], slow(lambda x: PARTS["x"][1](x)[:, 0], td["x"], 1))


@pytest.mark.parametrize("anchored", [False, True])
def test_it_obeys_an_edit_of_the_root(anchored):
    net, td = pipeline(), batch()
    held = anchor(net, "0") if anchored else None
    pull = Pullback(net, Target("y", 0), "x")
    expected = 2 * pull.gradients(td)[0]
    with patch(net, {Site(".", leaf="y"): Scale(2.0)}):
        torch.testing.assert_close(pull.gradients(td)[0], expected)
    if held is not None:
        held.remove()


@pytest.mark.parametrize("wrt", ["x", Site("1")])
def test_the_module_of_a_context_can_be_explained(wrt):
    net, td = pipeline(), batch(donor=torch.randn(5, 3))
    with patch(net, {Site("0"): Replace("donor"), "z": Scale(2.0)}) as m:
        pull = Pullback(m, Target("y", 0), wrt)
        assert "donor" in pull.in_keys
        found = pull.gradients(td)[0]
    torch.testing.assert_close(found, torch.zeros(5, 4) if wrt == "x" else W1[0].expand(5, 3))
    with patch(net, {"x": Scale(0.0)}) as m:
        of_zero = Pullback(m, Target("y", 0), "x").gradients(td)[0]
        torch.testing.assert_close(of_zero, torch.zeros(5, 4))
        with pytest.raises(BadValue, match="can't be obeyed by direct calls") as error:
            Pullback(net, Target("y", 0)).gradients(td)
        assert "explainer of m" in str(error.value)


def test_entries_that_an_outer_context_reads_need_its_module():
    net = pipeline()
    with (
        patch(net, {Site("0"): Replace("donor")}),
        pytest.raises(BadKey, match="no entry 'donor'") as error,
    ):
        Pullback(net, Target("y", 0)).gradients(batch(donor=torch.randn(5, 3)))
    assert "the module that the context gives back" in str(error.value)


def test_it_may_run_inside_an_edit():
    net, inner = mlp(), []
    pull = Pullback(net, Target("y", 0), Site("1"))
    expected = pull.gradients(batch())[0]

    def edit(value, td):
        inner.append(pull.gradients(batch())[0])
        return value * 2

    patch(net, {Site("0"): edit})(batch())
    assert inner[0].equal(expected)
    assert not hook_count(net)


def test_programs_and_pullbacks_are_data():
    net, td = mlp(), batch()
    pull = Pullback(net, Target("y", [0, 1]), ["x", Site("1")])
    expected = pull.gradients(td)
    for clone in (copy.deepcopy(pull), pickle.loads(pickle.dumps(pull))):
        assert all(a.equal(b) for a, b in zip(clone.gradients(td), expected, strict=True))
        assert clone.module is not net
        assert not hook_count(clone.module)


# ---------------------------------------------------------------------------------------------------- what is refused


def refused(kind, match, *arguments, td=None, **keywords):
    """The error comes when it is bound, or with ``td`` when it is called; the model stays as it was."""
    net = arguments[0]
    before = snapshot(net) if isinstance(net, nn.Module) else None
    held = entries(td) if td is not None else None
    with pytest.raises(kind, match=match) as error:
        Pullback(*arguments, **keywords).gradients(td)
    assert before is None or snapshot(net) == before
    assert held is None or entries(td) == held
    assert "\n" in str(error.value), "got, needed, way out"
    return str(error.value)


def test_bad_modules_targets_and_keys():
    net = mlp()
    assert "TensorDictModule(module" in refused(BadType, "a bare Sequential", net.module, Target("y", 0))
    assert "Target('y', ...)" in refused(BadType, "not a Target", net, "y")
    assert "did you mean 'y'" in refused(BadKey, "writes no entry 'yy'", net, Target("yy", 0))
    refused(BadKey, "writes no entry 'x'", net, Target("x", 0))
    refused(BadKey, "writes no entry '0'", net, Target("0", 0))
    assert "Site('0')" in refused(BadKey, "writes no entry '0'", net, Target("y", 0), "0")
    refused(BadKey, "no module at path", net, Target("y", 0), Site("nope"))
    refused(BadKey, "no module at path", net, Target(Site("nope"), 0))
    refused(BadValue, "the same twice", net, Target("y", 0), ["x", "x"])
    refused(BadValue, "the same twice", net, Target("y", 0), [])
    refused(BadKey, "not a TensorDict key", net, Target("y", 0), [3])


def test_sites_that_are_several():
    net = pipeline()
    text = refused(BadValue, "names several places", net, Target("y", 0), Site("*"))
    assert "'0', '1', '2'" in text
    refused(BadValue, "names several places", net, Target(Site("*"), 0))


def test_bad_data():
    net = mlp()
    wrong = TensorDict(xx=torch.zeros(5, 4), batch_size=[5])
    assert "'xx'" in refused(BadKey, "no entry 'x'", net, Target("y", 0), td=wrong)
    refused(BadKey, "no entry 'action'", net, Target("y", by="action"), td=batch())
    refused(BadValue, "out of range", net, Target("y", 2), td=batch())
    refused(BadValue, "out of range", net, Target(Site("0"), (3,)), td=batch())
    refused(BadValue, "out of range", net, Target("y", 0), Site("0", index=3), td=batch())
    refused(BadValue, "rows of shape", net, Target("y", 0), td=TensorDict(x=torch.zeros(2, 3, 4), batch_size=[2]))


def test_integers_have_no_gradient():
    embed = TensorDictModule(nn.Sequential(nn.Embedding(5, 3), linear(3, 2, 1)), ["x"], ["y"])
    td = TensorDict(x=torch.tensor([1, 4]), batch_size=[2])
    text = refused(BadType, "the entry 'x' has no gradient", embed, Target("y", 0), td=td)
    assert "int64 of shape [2]" in text
    assert "Site(" in text
    assert Pullback(embed, Target("y", 0), Site("0")).gradients(td)[0].equal(W1[0].expand(2, 3))
    whole_numbers = TensorDictModule(lambda x: x.argmax(-1), ["x"], ["action"])
    refused(BadType, "the target 'action' has no gradient", whole_numbers, Target("action"), td=batch())


def test_groups_and_other_data_have_no_gradient():
    net = TensorDictModule(lambda group, x: x * 2, ["group", "x"], ["y"])
    td = batch(group=TensorDict(a=torch.ones(5), batch_size=[5]))
    refused(BadType, "the entry 'group' has no gradient", net, Target("y", 0), td=td)
    assert Pullback(net, Target("y", 0), "x").gradients(td)[0].sum() == 10
    text = batch()
    text["group"] = "text"
    refused(BadType, "the entry 'group' has no gradient", net, Target("y", 0), td=text)


class WithoutGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear(4, 2, 0)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)


class Detaches(WithoutGrad):
    def forward(self, x):
        return self.layer(x).detach()


@pytest.mark.parametrize("module", [WithoutGrad(), Detaches()])
@pytest.mark.parametrize("select", [0, [0, 1]])
def test_a_model_without_a_graph(module, select):
    net = TensorDictModule(module, ["x"], ["y"])
    text = refused(BadValue, "no gradient reaches the target 'y'", net, Target("y", select), td=batch())
    assert "no_grad" in text


def test_a_site_without_the_batch_in_front():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.part = linear(4, 2, 0), linear(4, 2, 1)

        def forward(self, x):
            return self.layer(x) + self.part(x.mean(0))

    net = TensorDictModule(Mean(), ["x"], ["y"])
    for target, wrt in ((Target("y", 0), Site("part")), (Target(Site("part"), 0), "x")):
        text = refused(BadValue, "does not have the batch in front", net, target, wrt, td=batch())
        assert "shape [2] for a TensorDict of batch size [5]" in text


def test_a_dict_under_the_name_of_an_entry_is_none():
    """What TensorDictModule writes where a model's dict has no entry of that name."""
    net = TensorDictModule(lambda x: {"logits": x * 2}, ["x"], ["logit"])
    td = TensorDict(x=torch.randn(3, 2), batch_size=[3])
    with pytest.raises(BadKey, match=r"(?s)'logit' is a group.*\['logits'\].*out_keys=\['logits'\]"):
        Pullback(net, Target("logit", 0), "x")(td)


def test_errors_of_the_model_come_out_as_they_are():
    net = mlp()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Pullback(net, Target("y", 0), Site("0")).gradients(batch(features=5))
    assert not hook_count(net)
    assert Patch({Site("0"): Scale(1.0)}).on(net)(batch())["y"].shape == (5, 2)


class Ratio:
    """``value[..., i] / scale`` for the index in ``"action"``, which the model writes too."""

    in_keys = ("action",)
    goals = ("scale",)

    def __call__(self, value, td):
        return value.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1) / td["scale"].squeeze(-1)


def test_a_selection_reads_what_was_given_and_what_the_model_writes():
    values, scale = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 1), nn.Softplus())
    module = TensorDictSequential(
        TensorDictModule(lambda x: (values(x), values(x).argmax(-1)), ["x"], ["q", "action"]),
        TensorDictModule(scale, ["x"], ["scale"]),
    )
    td = TensorDict(x=torch.randn(6, 4), action=torch.arange(6) % 3, batch_size=[6])
    pull = Pullback(module, Target("q", Ratio()))
    assert pull.in_keys == ["x", "action"]
    for index, whole in ((td["action"], False), (values(td["x"]).argmax(-1), True)):
        x = td["x"].clone().requires_grad_()
        slow = (values(x).gather(-1, index.unsqueeze(-1)) / scale(x)).sum()
        found = Pullback(module, Target("q", Ratio()), whole=whole).gradients(td)[0]
        torch.testing.assert_close(found, torch.autograd.grad(slow, x)[0])
    with pytest.raises(BadKey, match="no entry 'action'"):
        pull(td.exclude("action"))
    with pytest.raises(BadKey, match="writes no entry 'scale'"):
        Pullback(module[0], Target("q", Ratio()))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_value_at_a_site_is_the_one_of_its_time_whatever_a_hook_overwrites(frozen):
    """Nothing in the model says that it does; it is seen, and the values are copied from then on."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(not frozen)
    layers[1].register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    net, td = TensorDictModule(layers, ["x"], ["y"]), TensorDict(x=torch.randn(5, 3), batch_size=[5])
    pull = Pullback(net, Target("y", 0), Site("0"))
    for _ in range(2):
        (point,) = pull(td, snapshot=True).points
        torch.testing.assert_close(point, layers[0](td["x"]).detach())
