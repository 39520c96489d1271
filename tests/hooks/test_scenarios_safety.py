"""The conformance scenarios of hooks: what a context leaves behind."""

import gc
import weakref

import pytest
import torch
from hooks.nets import Twice, batch, entries, hook_count, linear, mlp, pipeline, snapshot
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Add, Replace, Scale, Site, Target, capture, patch


class Unlucky(Exception):
    pass


class Fails(nn.Module):
    """Raises in the middle of the forward, while ``armed``."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.armed = linear(4, 3, 0), linear(3, 2, 1), True

    def forward(self, x):
        h = self.first(x)
        if self.armed:
            raise Unlucky
        return self.last(h)


def zero(value, td):
    return torch.zeros_like(value)


# ---------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("direct", [False, True], ids=["by m", "directly"])
def test_01_model_raises_mid_forward(direct):
    net = TensorDictModule(Fails(), ["x"], ["y"])
    net.module.armed = False
    plain = net(batch())["y"]
    net.module.armed = True
    before = snapshot(net)
    with pytest.raises(Unlucky), patch(net, {Site("first"): zero}) as m, capture(net, "first", "last"):
        (net if direct else m)(batch())
    assert snapshot(net) == before
    net.module.armed = False
    assert net(batch())["y"].equal(plain)


@pytest.mark.parametrize("direct", [False, True], ids=["by m", "directly"])
def test_02_edit_raises(direct):
    net = mlp()
    plain, before = net(batch())["y"], snapshot(net)

    def edit(value, td):
        raise Unlucky

    with pytest.raises(Unlucky), patch(net, {Site("0"): edit}) as m:
        (net if direct else m)(batch())
    assert snapshot(net) == before
    assert net(batch())["y"].equal(plain)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_03_edit_raises_what_is_no_exception(error):
    net = mlp()
    plain, before = net(batch())["y"], snapshot(net)

    def edit(value, td):
        raise error

    with pytest.raises(error):
        patch(net, {Site("0"): edit})(batch())
    with pytest.raises(error), patch(net, {Site("0"): edit}) as m:
        m(batch())
    assert snapshot(net) == before
    assert net(batch())["y"].equal(plain)


def test_04_one_unknown_path_installs_nothing():
    net = mlp()
    before = snapshot(net)
    with pytest.raises(BadKey, match="no module at path 'nope'"), patch(net, {Site("0"): zero, Site("nope"): zero}):
        pytest.fail("entered")
    with pytest.raises(BadKey, match="no module at path 'nope'"):
        capture(net, "0", "nope")
    with pytest.raises(BadKey, match="the model writes no entry 'nope'"):
        patch(net, {Site("0"): zero, "nope": zero})
    assert snapshot(net) == before


def test_05_hooks_of_the_user_stay_and_fire():
    net, seen = mlp(), []
    layer = net.module[0]
    before_hook = layer.register_forward_pre_hook(lambda module, args: seen.append("in"))
    after_hook = layer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with patch(net, {Site("0"): Replace(9.0)}) as m:
        m(batch())
        during = list(seen)
        inside = layer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        seen.clear()
        m(batch())
    assert [type(s) for s in during] == [str, torch.Tensor]
    assert not (during[1] == 9).any(), "registered before: sees the value before the edit"
    assert (seen[2] == 9).all(), "registered inside: sees the edit"
    seen.clear()
    net(batch())
    assert len(seen) == 3
    for hook in (before_hook, after_hook, inside):
        hook.remove()
    assert not hook_count(net)


def test_05_a_hook_of_the_user_that_changes_the_output_is_respected():
    net = mlp()
    net.module[0].register_forward_hook(lambda module, args, out: out + 1)
    plain = nn.functional.linear(batch()["x"], net.module[0].weight, net.module[0].bias) + 1
    assert capture(net, "0")(batch())["activation", "0"].equal(plain)


@pytest.mark.parametrize("model", [mlp, pipeline])
def test_06_the_model_is_as_it_was(model):
    net = model()
    net.train()
    net.get_parameter("module.0.weight" if model is mlp else "module.0.module.weight").requires_grad_(False)
    before = snapshot(net)
    with patch(net, {Site("1"): Scale(2.0)}) as m, capture(net, "0", "1:in", gradients=Target("y", 1)) as c:
        m(batch())
        c(batch())
        net(batch())
    capture(net, "0", stop=True)(batch())
    assert snapshot(net) == before


def test_06_the_tensors_of_the_caller_are_as_they_were():
    net = mlp()
    td = batch(donor=torch.randn(5, 3))
    td["x"].requires_grad_()
    before = entries(td)
    program = capture(net, "1", gradients=Target("y", 0)).program + patch(net, {Site("0"): Replace("donor")}).program
    program.on(net)(td)
    after = entries(td)
    assert {key: after[key] for key in before} == before
    assert td["x"].requires_grad
    assert td["x"].grad is None


@pytest.mark.parametrize("site", ["0:in", "0"])
def test_06_an_edit_in_place_stays_inside(site):
    """The first site is the caller's tensor itself; after an Identity the output is it as well."""
    net = TensorDictModule(nn.Sequential(nn.Identity(), linear(4, 2, 0)), ["x"], ["y"])
    td = batch()
    before = entries(td)
    patch(net, {Site.parse(site): lambda value, td: value.zero_()})(td)
    assert entries(td)["x"] == before["x"]
    assert td["y"].equal(net.module[1].bias.expand(5, 2))


@pytest.mark.parametrize("site", [Site("0", "input"), Site(".", "input")])
def test_06_an_edit_of_a_stages_input_stays_inside(site):
    net, td = pipeline(), batch()
    before = entries(td)
    patch(net, {site: Scale(0.0)})(td)
    assert td["h"].equal(net[0].module.bias.expand(5, 3))
    assert entries(td)["x"] == before["x"]


# ---------------------------------------------------------------------------------------------------- nesting


def test_09_inner_exit_restores_the_outer_behaviour():
    net, td = mlp(), batch()
    with patch(net, {Site("0"): Add(1.0)}) as outer:
        before = outer(td.copy())["y"], net(td.copy())["y"]
        hooks = hook_count(net)
        with patch(net, {Site("0"): Scale(3.0), Site("1"): Add(5.0)}) as inner:
            assert not inner(td.copy())["y"].equal(before[0])
        assert outer(td.copy())["y"].equal(before[0])
        assert net(td.copy())["y"].equal(before[1])
        assert hook_count(net) == hooks
    assert not hook_count(net)


def test_10_exits_in_any_order():
    net, td = mlp(), batch()
    only_b = patch(net, {Site("0"): Scale(3.0)})(td.copy())["y"]
    plain = net(td.copy())["y"]
    a, b = patch(net, {Site("0"): Add(1.0)}), patch(net, {Site("0"): Scale(3.0)})
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert net(td.copy())["y"].equal(only_b)
    assert b(td.copy())["y"].equal(only_b)
    b.__exit__(None, None, None)
    assert net(td.copy())["y"].equal(plain)
    assert not hook_count(net)


def test_11_an_edit_may_call_the_model():
    net, td = mlp(), batch()
    plain = net(td.copy())["y"]
    inner = []

    def edit(value, td):
        inner.append(net(batch())["y"])
        return value + 1

    expected = patch(net, {Site("0"): Add(1.0)})(td.copy())["y"]
    with patch(net, {Site("0"): edit}) as m:
        assert m(td.copy())["y"].equal(expected)
        assert net(td.copy())["y"].equal(expected)
    assert len(inner) == 2
    assert all(y.equal(plain) for y in inner), "the inner call is not edited"
    assert not hook_count(net)


def test_11_the_inner_call_obeys_other_contexts():
    net, td = mlp(), batch()
    outer_alone = patch(net, {Site("2"): Add(10.0)})(td.copy())["y"]
    inner = []

    def edit(value, td):
        inner.append(net(batch())["y"])
        return value

    with patch(net, {Site("2"): Add(10.0)}), patch(net, {Site("0"): edit}) as m:
        assert m(td.copy())["y"].equal(outer_alone)
    assert inner[0].equal(outer_alone)


def test_12_one_context_many_times_in_sequence_not_nested():
    net, td = mlp(), batch()
    context = patch(net, {Site("0"): Add(1.0)})
    with context as m:
        first = m(td.copy())["y"]
        with pytest.raises(BadValue, match="entered on this thread already"):
            context.__enter__()
        assert m(td.copy())["y"].equal(first), "the failed entry changes nothing"
    with context as m:
        assert m(td.copy())["y"].equal(first)
    assert context(td.copy())["y"].equal(first), "outside of with it enters for the call"
    assert not hook_count(net)


def test_12_two_captures_of_one_plan_do_not_mix():
    net = mlp()
    program = capture(net, "0").program
    with program.on(net) as one, program.on(net) as two:
        a, b = one(batch(seed=1)), two(batch(seed=2))
    for td in (a, b):
        assert td["activation", "0"].equal(net.module[0](td["x"]))
    assert not a["activation", "0"].equal(b["activation", "0"])


def test_12_a_capture_acts_in_its_own_calls_only():
    net = mlp().requires_grad_(False)
    with capture(net, "0", stop=True), capture(net, "1", gradients=Target("y", 0)) as other:
        assert ("activation", "1") in other(batch()).keys(True)
        assert "y" in net(batch())
        assert not net(batch())["y"].requires_grad


def test_an_exit_without_an_entry_is_an_error():
    with pytest.raises(BadValue, match="not entered on this thread"):
        patch(mlp(), {Site("0"): zero}).__exit__(None, None, None)


# ---------------------------------------------------------------------------------------------------- lifetime


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("gradients", [None, Target("y", 0)])
def test_28_model_and_captures_are_freed_by_refcount(gradients):
    net, td = mlp(), batch()
    with capture(net, "0", "1:in", gradients=gradients) as m, patch(net, {Site("1"): Scale(2.0)}):
        m(td)
        net(batch())
    watched = [weakref.ref(net), weakref.ref(net.module[0]), weakref.ref(m), weakref.ref(td["activation", "0"])]
    del net, m
    assert [ref() is None for ref in watched[:3]] == [True] * 3
    del td
    assert watched[3]() is None


@pytest.mark.usefixtures("without_gc")
def test_28_a_forward_leaves_nothing_behind_inside_the_context():
    net, held = mlp(), []
    with patch(net, {Site("0"): lambda value, td: held.append(weakref.ref(value)) or value * 2}) as m:
        m(batch())
        assert held.pop()() is None
        with pytest.raises(RuntimeError):
            m(batch(features=5))


def test_31_results_do_not_depend_on_history():
    net, td = mlp(), batch()

    def edited():
        with patch(net, {Site("0"): Add(1.0)}) as m, capture(net, "1", gradients=Target("y", 0)) as c:
            return m(td.copy())["y"], c(td.copy())["gradient", "1"]

    first = edited()
    for wrong in ({Site("0"): Replace(torch.ones(7))}, {Site("0"): Replace("nope")}):
        with pytest.raises((BadValue, BadKey)), patch(net, wrong) as m:
            m(td.copy())
    with pytest.raises(RuntimeError), capture(net, "0") as m:
        m(batch(features=5))
    assert all(a.equal(b) for a, b in zip(first, edited(), strict=True))
    assert not hook_count(net)


class Swallows(nn.Module):
    """A model that handles every exception of its parts, and counts what ran."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.ran = linear(4, 3, 0), linear(3, 2, 1), []

    def forward(self, x):
        try:
            h = self.first(x)
            self.ran.append("first")
        except Exception:
            self.ran.append("swallowed")
            h = x[..., :3]
        self.ran.append("last")
        return self.last(h)


def test_38_early_stop():
    net = TensorDictModule(Swallows(), ["x"], ["y"])
    with capture(net, "first", stop=True) as m:
        td = m(batch())
    assert net.module.ran == []
    assert list(td.keys(True, True)) == ["x", ("activation", "first")]
    assert td["activation", "first"].equal(net.module.first(td["x"]))
    assert m.out_keys == [("activation", "first")]
    assert not hook_count(net)


def test_38_early_stop_waits_for_the_last_site():
    net = mlp()
    td = capture(net, "1", "0", stop=True)(batch())
    assert td["activation", "1"].equal(torch.tanh(td["activation", "0"]))
    assert "y" not in td


@pytest.mark.parametrize("of", ["1", "2"])
def test_38_early_stop_waits_for_the_target(of):
    net = mlp()
    target = Target(Site(of), 0)
    td = capture(net, "0", "1", gradients=target, stop=True)(batch())
    whole = capture(net, "0", "1", gradients=target)(batch())
    assert td["gradient", "0"].equal(whole["gradient", "0"])
    assert "y" not in td


@pytest.mark.parametrize("call", [-1, "all"])
def test_38_early_stop_has_no_last_call(call):
    net = TensorDictModule(Twice(), ["x"], ["y"])
    with pytest.raises(BadValue, match="no last call"):
        capture(net, Site("layer", call=call), stop=True)


def test_43_backward_after_the_exit():
    """The graph of a forward keeps the edit of that forward, and gets no other later."""
    net, td = mlp(), batch()
    x = td["x"].requires_grad_()
    with patch(net, {Site("0"): Scale(3.0)}), capture(net, "0", "1", detach=False) as m:
        m(td)
    w0, w2 = net.module[0].weight, net.module[2].weight
    act = td["activation", "0"]
    slope = (1 - act.tanh() ** 2) * w2[0]
    grad_x, grad_act = torch.autograd.grad(td["y"][:, 0].sum(), [x, act], retain_graph=True)
    torch.testing.assert_close(grad_act, slope)
    torch.testing.assert_close(grad_x, 3.0 * slope @ w0)
    with patch(net, {Site("0"): Scale(100.0)}):
        later = torch.autograd.grad(td["y"][:, 0].sum(), x)[0]
    assert later.equal(grad_x)


def test_43_gradients_captured_inside_arrive_detached():
    net, td = mlp(), batch()
    with capture(net, "1", gradients=Target("y", 0)) as m:
        m(td)
    assert td["gradient", "1"].equal(net.module[2].weight[0].detach().expand(5, 3))
    assert not any(td[k].requires_grad for k in td.keys(True, True))
    assert all(p.grad is None for p in net.parameters())
