"""Taps and the runs of a thread: counted, inert, in the right order, and put back whatever happens."""

import copy
import pickle
import threading

import pytest
import torch
from hooks.nets import batch, hook_count, mlp, pipeline, snapshot
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Add, Capture, Patch, Pullback, Replace, Scale, Site, Target, capture, patch
from tdconcepts.hooks.contexts import enter, hold, install, installed, leave, outside, release, remove, run_under
from tdconcepts.hooks.plans import Plan, Run, Step
from tdconcepts.hooks.sites import places


def run_of(net, text, act, every=True, **keywords):
    return Run(Plan(net, [Step(places(net, Site.parse(text))[0], act, every)]), **keywords)


def double(value, run):
    return value * 2


# ---------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("side", ["input", "output"])
def test_taps_are_counted_and_removed_at_zero(side):
    layer = nn.Linear(2, 2)
    expected = layer(torch.ones(2))
    for _ in range(3):
        hold(layer, side)
    hooks = layer._forward_hooks if side == "output" else layer._forward_pre_hooks
    assert len(hooks) == 1
    assert layer(torch.ones(2)).equal(expected), "inert"
    for count in (1, 1, 0):
        release(layer, side)
        assert len(hooks) == count
    release(layer, side)
    assert not hook_count(layer)


def test_taps_leave_the_hooks_of_others_alone():
    layer = nn.Linear(2, 2)
    other = layer.register_forward_hook(lambda module, args, out: out + 1)
    expected = layer(torch.ones(2))
    hold(layer, "output")
    later = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert layer(torch.ones(2)).equal(layer.weight.sum(1) * 2 + layer.bias + 1)
    release(layer, "output")
    later.remove()
    assert layer(torch.ones(2)).equal(expected)
    other.remove()
    assert not hook_count(layer)


def test_a_tap_that_was_cleared_by_others_is_no_trouble():
    net = mlp()
    with patch(net, {Site("0"): Scale(2.0)}) as m:
        net.module[0]._forward_hooks.clear()
        with pytest.raises(BadValue, match="the site '0' never ran"):
            m(batch())
    net.module[0]._forward_hooks_with_kwargs.clear()
    assert not hook_count(net)


def test_copies_of_taps_know_nothing():
    layer = nn.Linear(2, 2)
    hold(layer, "output")
    hold(layer, "output")
    (tap,) = layer._forward_hooks.values()
    for clone in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        assert type(clone) is type(tap)
        assert clone.holders == 1
        assert clone.token != tap.token
    release(layer, "output")
    release(layer, "output")
    assert not hook_count(layer)


def test_hooks_of_a_fresh_process_do_not_take_the_number_of_a_tap():
    """Hooks keep their numbers in a pickle, and torch gives out numbers from 0 up."""
    net, seen = mlp(), []
    plain = net(batch())["y"]
    with patch(net, {Site("0"): Scale(2.0), Site("0", "input"): Scale(1.0)}):
        data = pickle.dumps(net)
    handles = torch.utils.hooks.RemovableHandle
    handles.next_id, before = 0, handles.next_id
    try:
        clone = pickle.loads(data)
        for _ in range(5):
            clone.module[0].register_forward_hook(lambda module, args, out: seen.append(out))
            clone.module[0].register_forward_pre_hook(lambda module, args: seen.append(args))
        assert clone(batch())["y"].equal(plain)
        assert len(seen) == 10
    finally:
        handles.next_id = max(before, handles.next_id)


def test_install_and_remove():
    net = mlp()
    plan = run_of(net, "0", double).plan
    before = snapshot(net)
    assert not installed(plan)
    install(plan)
    install(plan)
    assert installed(plan)
    remove(plan)
    assert installed(plan)
    remove(plan)
    assert not installed(plan)
    assert snapshot(net) == before


# ---------------------------------------------------------------------------------------------------- runs


def test_a_run_acts_for_the_time_of_a_call():
    net = mlp()
    plain, scaled = net(batch())["y"], patch(net, {Site("2"): Scale(2.0)})(batch())["y"]
    assert run_under(run_of(net, "2", double), net, batch())["y"].equal(scaled)
    assert net(batch())["y"].equal(plain)
    assert not hook_count(net)


def test_a_standing_run_acts_until_it_leaves():
    net, owner = mlp(), object()
    scaled = patch(net, {Site("2"): Scale(2.0)})(batch())["y"]
    run = run_of(net, "2", double, owner=owner, standing=True)
    enter(run)
    assert net(batch())["y"].equal(scaled)
    with pytest.raises(BadValue, match="entered on this thread already"):
        enter(run_of(net, "2", double, owner=owner, standing=True))
    assert leave(owner) is run
    with pytest.raises(BadValue, match="not entered on this thread"):
        leave(owner)
    assert not hook_count(net)


def test_a_call_takes_the_place_of_its_owners_standing_run():
    """Not behind the contexts that were entered later: the order is that of the entries."""
    net, log = mlp(), []

    def logs(name):
        return lambda value, run: log.append(name) or value

    owners = [object(), object(), object()]
    for name, owner in zip("abc", owners, strict=True):
        enter(run_of(net, "0", logs(name), owner=owner, standing=True))
    run_under(run_of(net, "0", logs("B"), owner=owners[1]), net, batch())
    assert log == ["a", "B", "c"]
    log.clear()
    run_under(run_of(net, "0", logs("new")), net, batch())
    assert log == ["a", "b", "c", "new"]
    for owner in (owners[1], owners[0], owners[2]):
        leave(owner)
    assert not hook_count(net)


def test_outside_suspends_one_run():
    net, found = mlp(), []
    plain = net(batch())["y"]

    def act(value, run):
        found.append(outside(run, net, batch())["y"])
        return value * 2

    run_under(run_of(net, "0", act), net, batch())
    assert len(found) == 1
    assert found[0].equal(plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_put_everything_back(error):
    net = mlp()
    before = snapshot(net)

    def act(value, run):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        run_under(run_of(net, "0", act), net, batch())
    assert snapshot(net) == before
    plain = net(batch())["y"]
    assert patch(net, {Site("0"): Scale(1.0)})(batch())["y"].equal(plain)


def test_our_errors_come_out_as_they_are():
    """A TensorDictSequential wraps errors of its parts into others."""
    net = pipeline()
    for m in (patch(net, {Site("1"): Replace("nope")}), patch(net, {"h": Replace(torch.ones(7))})):
        with pytest.raises((BadKey, BadValue)) as error:
            m(batch())
        assert error.value.__cause__ is None


def test_runs_belong_to_their_thread():
    net, found = mlp(), []
    plain = net(batch())["y"]
    with patch(net, {Site("0"): Scale(2.0)}) as context:
        thread = threading.Thread(target=lambda: found.append(net(batch())["y"]))
        thread.start()
        thread.join()
        assert found[0].equal(plain)
        raised = []

        def leaves():
            try:
                context.__exit__(None, None, None)
            except BadValue as error:
                raised.append(str(error))

        thread = threading.Thread(target=leaves)
        thread.start()
        thread.join()
        assert "not entered on this thread" in raised[0]
        assert not net(batch())["y"].equal(plain)
    assert not hook_count(net)


def test_a_thread_may_end_inside_a_context_of_another():
    net = mlp()
    plain = net(batch())["y"]
    inside, go = threading.Event(), threading.Event()

    def work():
        with patch(net, {Site("0"): Replace(0.0)}):
            inside.set()
            go.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    with patch(net, {Site("0"): Scale(1.0)}) as m:
        go.set()
        thread.join()
        assert m(batch())["y"].equal(plain), "its taps are still there"
    assert not hook_count(net)


# ---------------------------------------------------------------------------------------------------- wrapped contexts


@pytest.mark.parametrize("entered", [False, True])
def test_what_wraps_a_context_sees_its_edits(entered):
    net = mlp()
    edited = patch(net, {Site("0"): Scale(2.0)})
    h = 2 * net.module[0](batch()["x"])
    if entered:
        edited.__enter__()
    try:
        td = capture(edited, "0", gradients=Target("y", 0))(batch())
        gradient = Pullback(edited, Target("y", 0), Site("0")).gradients(batch())[0]
        twice_edited = patch(edited, {Site("0"): Add(1.0)})(batch())["y"]
    finally:
        if entered:
            edited.__exit__(None, None, None)
    torch.testing.assert_close(td["activation", "0"], h)
    expected = (1 - torch.tanh(h) ** 2) * net.module[2].weight[0]
    torch.testing.assert_close(td["gradient", "0"], expected)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(twice_edited, net.module[2](torch.tanh(h + 1)))


@pytest.mark.parametrize("direct", [False, True])
def test_an_edit_that_calls_the_model_leaves_outer_contexts_alone(direct):
    net = mlp()

    def edit(value, td):
        net(batch(donor=torch.zeros(5, 2)))
        return value

    donor = torch.ones(5, 2)
    with patch(net, {Site("2"): Replace("donor")}), patch(net, {Site("0"): edit}) as m:
        assert (net if direct else m)(batch(donor=donor))["y"].equal(donor)


def test_a_failed_call_leaves_nothing_for_the_next():
    net = pipeline()
    with patch(net, {"h": Replace("donor")}):
        for donor in (torch.zeros(5, 3), torch.ones(5, 3)):
            with pytest.raises((RuntimeError, KeyError)):
                net(batch(features=5, donor=torch.full((5, 3), 7.0)))
            td = net.select_subsequence(out_keys=["h"])(batch(donor=donor))
            assert td["h"].equal(donor)


def test_contexts_of_two_models_do_not_meet():
    one, two = mlp(), mlp()
    expected = patch(one, {Site("0"): Scale(2.0)})(batch())["y"], two(batch())["y"]
    with patch(one, {Site("0"): Scale(2.0)}), patch(two, {Site("2"): Scale(1.0)}) as m:
        assert one(batch())["y"].equal(expected[0])
        assert m(batch())["y"].equal(expected[1])


def test_models_that_share_a_layer():
    net = mlp()
    other = TensorDictModule(nn.Sequential(net.module[0], nn.ReLU()), ["x"], ["w"])
    plain = other(batch())["w"]
    with patch(net, {Site("0"): Replace(-1.0)}) as m:
        m(batch())
        assert not other(batch())["w"].any(), "it is the same layer"
        assert (Capture("0") + Patch({Site("1"): Scale(1.0)})).on(other)(batch())["activation", "0"].eq(-1).all()
    assert other(batch())["w"].equal(plain)
