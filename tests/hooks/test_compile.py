"""Compiled in one graph = eager: captures, edits and gradients, with the contexts entered before and after."""

import shutil

import pytest
import torch
from hooks.nets import Twice, batch, hook_count, mlp, pipeline, snapshot, twice
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import (
    Ablate,
    Add,
    Capture,
    Patch,
    Pullback,
    Replace,
    Scale,
    Site,
    Target,
    anchor,
    capture,
    patch,
)


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(module, backend="eager"):
    return torch.compile(module, backend=backend, fullgraph=True)


def same(td, expected):
    assert set(td.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        torch.testing.assert_close(td[key], expected[key])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Linear(3 * 9, 2)

    def forward(self, x):
        return self.head(self.body(x.unflatten(-1, (1, 8, 8))).flatten(1))


PROGRAMS = {
    "captures": (mlp, Capture("*", "1:in")),
    "captures of parts": (mlp, Capture(Site("0", index=slice(0, 2)), Site("1", index=[0, 2]))),
    "captures with the graph": (mlp, Capture("1", detach=False)),
    "captures of each call": (twice, Capture(Site("layer", call="all"), "layer@-1", "layer@0")),
    "edits": (mlp, Patch({Site("0"): Scale(2.0), Site("1", "input", index=1): Replace(0.5), Site("2"): Ablate([0])})),
    "an edit of one call": (twice, Patch({Site("layer", call=1): Add(torch.arange(3.0))})),
    "a callable": (mlp, Patch({Site("1"): lambda value, td: value.clamp(min=0) + td["x"].mean()})),
    "rows from keys": (mlp, Patch({Site("1"): Replace("donor")})),
    "means": (mlp, Patch({Site("1"): Ablate([0, 2], to="mean")})),
    "entries": (pipeline, Patch({"h": Scale(2.0), "x": Add(1.0)})),
    "edits and captures": (mlp, Capture("0") + Patch({Site("0"): Add(1.0)}) + Capture("1")),
    "gradients": (mlp, Capture("0", "1", gradients=Target("y", 1))),
    "gradients of several": (mlp, Capture("0", "2:in", gradients=Target("y", [0, 1]))),
    "gradients under an edit": (mlp, Patch({Site("0"): Scale(2.0)}) + Capture("0", gradients=Target("y", 1))),
    "gradients between stages": (pipeline, Capture("0", "1", gradients=Target("y", "argmax"))),
    "gradients of an activation": (mlp, Capture("0", gradients=Target(Site("1"), 2))),
    "convolutions": (
        lambda: TensorDictModule(Convolutions(), ["x"], ["y"]),
        Capture("body.0", gradients=Target("y", 0)),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_inside_the_context_is_eager(program):
    make, what = PROGRAMS[program]
    net, features = make(), {twice: 3}.get(make, 64 if program == "convolutions" else 4)
    tds = [batch(5, features=features, seed=seed, donor=torch.randn(5, 3)) for seed in (1, 2)]
    before = snapshot(net)
    expected = [what.on(net)(td.copy()) for td in tds]
    with what.on(net) as m:
        compiled = one_graph(m)
        for td, reference in zip(tds * 2, expected * 2, strict=True):
            same(compiled(td.copy()), reference)
    assert snapshot(net) == before


@pytest.mark.parametrize("program", ["edits and captures", "gradients", "gradients of several"])
def test_aot_eager(program):
    make, what = PROGRAMS[program]
    net = make()
    expected = what.on(net)(batch())
    with what.on(net) as m:
        same(one_graph(m, "aot_eager")(batch()), expected)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_inductor():
    net = mlp()
    what = Patch({Site("0"): Scale(2.0)}) + Capture("0", "1", gradients=Target("y", [0, 1]))
    expected = what.on(net)(batch())
    with torch._inductor.config.patch(compile_threads=1), what.on(net) as m:
        same(one_graph(m, "inductor")(batch()), expected)


def test_a_compiled_pullback_is_eager():
    net = pipeline()
    wrts = ["x", "z", Site("0"), Site("2", "input", index=1)]
    for target in (Target("y", 1), Target("y", [1, 0]), Target("y", by="action")):
        pull = Pullback(net, target, wrts)
        td = batch(action=torch.tensor([0, 1, 1, 0, 1]))
        anchored = anchor(net, "0", "2", entries=["z"])
        compiled = one_graph(lambda td, pull=pull: tuple(pull.gradients(td)))
        for mine, theirs in zip(compiled(td), pull.gradients(td), strict=True):
            torch.testing.assert_close(mine, theirs)
        anchored.remove()


def test_outside_of_with_a_compiled_context_needs_an_anchor():
    net = mlp()
    m = patch(net, {Site("1"): Scale(2.0)})
    expected = m(batch())["y"]
    with pytest.raises((BadValue, torch._dynamo.exc.Unsupported)):
        one_graph(m)(batch())
    torch._dynamo.reset()
    held = anchor(net, "1")
    assert one_graph(m)(batch())["y"].equal(expected)
    held.remove()
    assert not hook_count(net)


def test_entering_and_leaving_after_compiling_is_obeyed():
    net, reference = mlp(), mlp()
    anchor(net, "0", "1")
    compiled = one_graph(net)
    plain = reference(batch())["y"]
    scaled = patch(reference, {Site("0"): Scale(2.0)})(batch())["y"]
    moved = patch(reference, {Site("1"): Scale(0.5)})(batch())["y"]
    for _ in range(3):
        torch.testing.assert_close(compiled(batch())["y"], plain)
        with patch(net, {Site("0"): Scale(2.0)}):
            torch.testing.assert_close(compiled(batch())["y"], scaled)
        with patch(net, {Site("1"): Scale(0.5)}):
            torch.testing.assert_close(compiled(batch())["y"], moved)


def test_new_tensors_in_an_edit_need_no_new_graph():
    net, reference = mlp(), mlp()
    anchor(net, "1")
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = one_graph(net, graphs)
    for value in torch.randn(6, 3):
        with patch(net, {Site("1"): Replace(value)}):
            torch.testing.assert_close(compiled(batch())["y"], reference.module[2](value).expand(5, 2))
    assert graphs.frame_count <= 2


def test_errors_in_a_compiled_context():
    net = mlp()
    for program, error in (
        (Patch({Site("0"): Replace(torch.ones(7))}), BadValue),
        (Patch({Site("0"): Replace("nope")}), BadKey),
    ):
        before = snapshot(net)
        with program.on(net) as m, pytest.raises((error, torch._dynamo.exc.TorchDynamoException)):
            one_graph(m)(batch())
        assert snapshot(net) == before
        torch._dynamo.reset()


def test_a_glob_anchors_everything_and_goes_without_a_trace():
    net = TensorDictModule(Twice(), ["x"], ["y"])
    with anchor(net, "**"):
        assert hook_count(net) > 0
        plain = one_graph(net)(batch(features=3))["y"]
        with patch(net, {Site("layer", call=1): Scale(0.0)}):
            edited = one_graph(net)(batch(features=3))["y"]
    assert not hook_count(net)
    assert plain.equal(net(batch(features=3))["y"])
    assert edited.allclose(net.module.tail.bias.expand(5, 2))


def test_an_anchor_stays_while_contexts_come_and_go():
    net = mlp()
    held = anchor(net, "0")
    hooks = hook_count(net)
    with patch(net, {Site("0"): Scale(2.0)}), capture(net, "0"):
        pass
    assert hook_count(net) == hooks
    context = patch(net, {Site("0"): Replace(0.0)})
    with context as m:
        held.remove()
        assert m(batch())["y"].equal(net.module[2](torch.tanh(torch.zeros(5, 3))))
    assert not hook_count(net)
    held.remove()
    assert not hook_count(net)


def test_anchors_of_what_does_not_exist():
    net = pipeline()
    before = snapshot(net)
    with pytest.raises(BadKey, match="no module at path 'nope'"):
        anchor(net, "0", "nope")
    with pytest.raises(BadKey, match="writes no entry 'nope'"):
        anchor(net, "0", entries=["nope"])
    assert snapshot(net) == before
