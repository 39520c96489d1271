"""The conformance scenarios of hooks: copies, pickles, threads and processes."""

import contextlib
import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hooks.nets import batch, hook_count, mlp

from tdconcepts.hooks import Add, Replace, Scale, Site, Target, capture, patch

# ---------------------------------------------------------------------------------------------------- copies


def clones(net):
    yield copy.deepcopy(net)
    yield pickle.loads(pickle.dumps(net))


def computes_alone(net, plain):
    """``net`` computes with its own weights, obeys no context, and can be hooked."""
    assert net(batch())["y"].equal(plain)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert not net(batch())["y"].any()
    assert patch(net, {Site("2"): Replace(3.0)})(batch())["y"].eq(3).all()
    assert not net(batch())["y"].any()


def test_21_22_copies_and_pickles_taken_inside_are_unhooked():
    net = mlp()
    plain = net(batch())["y"]
    with patch(net, {Site("0"): lambda value, td: value * 0}) as m, capture(net, "1"):
        edited = m(batch())["y"]
        for clone in clones(net):
            computes_alone(clone, plain)
        assert net(batch())["y"].equal(edited)
    assert net(batch())["y"].equal(plain)


def test_23_copies_and_pickles_taken_afterwards():
    net = mlp()
    plain = net(batch())["y"]
    with patch(net, {Site("0"): lambda value, td: value * 0}) as m:
        m(batch())
    for clone in clones(net):
        assert not hook_count(clone)
        computes_alone(clone, plain)


@pytest.mark.parametrize("inside", [False, True])
def test_23_the_context_itself_copies_and_pickles(inside):
    """A copy of m works on a copy of the model; the original is not touched by it."""
    net = mlp()
    expected = patch(net, {Site("0"): Scale(2.0)})(batch())["y"]
    m = capture(net, "1").program.on(net)
    with m if inside else contextlib.nullcontext():
        for clone in clones((patch(net, {Site("0"): Scale(2.0)}).program + m.program).on(net)):
            with clone as c:
                td = c(batch())
            assert td["y"].equal(expected)
            assert td["activation", "1"].shape == (5, 3)
            with torch.no_grad():
                clone.module.module[2].weight.zero_()
            assert not clone(batch())["y"].equal(expected)
    assert patch(net, {Site("0"): Scale(2.0)})(batch())["y"].equal(expected)
    assert not hook_count(net)


# ---------------------------------------------------------------------------------------------------- other threads


def in_threads(count, work):
    wrong = []
    barrier = threading.Barrier(count)

    def run(i):
        try:
            barrier.wait(30)
            work(i)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong


def test_24_threads_with_different_edits_are_isolated():
    net = mlp()
    expected = [patch(net, {Site("0"): Add(float(i))})(batch())["y"] for i in range(4)]

    def work(i):
        for _ in range(40):
            with patch(net, {Site("0"): Add(float(i))}) as m, capture(net, "0") as c:
                assert m(batch())["y"].equal(expected[i])
                assert net(batch())["y"].equal(expected[i])
                assert c(batch())["activation", "0"].equal(
                    net.module[0].__class__.forward(net.module[0], batch()["x"]) + i
                )

    in_threads(4, work)
    assert not hook_count(net)


def test_24_one_context_used_by_many_threads():
    net = mlp()
    m = capture(net, "0", gradients=Target("y", 1))
    expected = [m(batch(seed=i)) for i in range(4)]

    def work(i):
        for _ in range(20):
            td = m(batch(seed=i))
            for key in (("activation", "0"), ("gradient", "0"), "y"):
                assert td[key].equal(expected[i][key])

    in_threads(4, work)


def test_24_another_thread_does_not_see_the_context():
    net = mlp()
    plain = net(batch())["y"]

    def work(i):
        assert net(batch())["y"].equal(plain)

    with patch(net, {Site("0"): Replace(0.0)}) as m:
        in_threads(1, work)
        edited = m(batch())["y"]
        in_threads(1, lambda i: None if m(batch())["y"].equal(edited) else pytest.fail("m is edited on every thread"))


def test_41_a_fork_inside_the_context_inherits_the_edits():
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    net = mlp()
    with patch(net, {Site("2"): Replace(5.0)}):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # never raises, never returns into pytest
            try:
                os.write(writing, b"edited" if bool(net(batch())["y"].eq(5).all()) else b"plain")
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            answer = stream.read()
        assert os.waitpid(child, 0)[1] == 0
    assert answer == b"edited"


LOADED = """
import pickle, sys
sys.path.insert(0, {tests!r})
from hooks.nets import batch
net, plain = pickle.loads(open({file!r}, "rb").read())
assert net(batch())["y"].equal(plain), "unhooked"
seen = []
for layer in net.module:  # hooks of the new process, whose ids start from 0 again
    layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
assert net(batch())["y"].equal(plain)
assert len(seen) == 6, len(seen)
"""


def test_41_a_spawned_process_starts_clean(tmp_path):
    net, file = mlp(), tmp_path / "net.pkl"
    plain = net(batch())["y"]
    torch.utils.hooks.RemovableHandle.next_id, before = 0, torch.utils.hooks.RemovableHandle.next_id
    try:  # as if this process had been fresh, too
        with patch(net, {Site("0"): Replace(5.0), Site("1", "input"): Replace(1.0), Site("2"): Replace(0.0)}):
            file.write_bytes(pickle.dumps((net, plain)))
    finally:
        torch.utils.hooks.RemovableHandle.next_id = before
    code = LOADED.format(file=str(file), tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
