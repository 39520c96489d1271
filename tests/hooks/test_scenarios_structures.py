"""The conformance scenarios of hooks: what modules give and are given."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from hooks.nets import batch, linear, mlp
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey
from tdconcepts.hooks import Pullback, Replace, Site, Target, capture, patch

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Record:
    first: torch.Tensor
    second: object


class MyDict(dict):
    pass


class Gives(nn.Module):
    """Its part gives several tensors, in the structure that ``make`` builds."""

    class Part(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make, self.linear = make, linear(4, 3, 0)

        def forward(self, x):
            return self.make(self.linear(x), x)

    def __init__(self, make):
        super().__init__()
        self.part, self.seen = self.Part(make), None

    def forward(self, x):
        self.seen = self.part(x)
        return x


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), 0, lambda t: (t[0], t[1])),
    "list": (lambda a, b: [a, b], 0, lambda t: (t[0], t[1])),
    "namedtuple": (Pair, "first", lambda t: (t.first, t.second)),
    "namedtuple by position": (Pair, 0, lambda t: (t.first, t.second)),
    "dict": (lambda a, b: {"first": a, "second": b}, "first", lambda t: (t["first"], t["second"])),
    "subclass of dict": (lambda a, b: MyDict(first=a, second=b), "first", lambda t: (t["first"], t["second"])),
    "dataclass": (Record, "first", lambda t: (t.first, t.second)),
    "nested": (lambda a, b: {"deep": (b, [a])}, ("deep", 1, 0), lambda t: (t["deep"][1][0], t["deep"][0])),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_19_one_leaf_is_edited_and_the_structure_is_kept(structure):
    make, leaf, read = STRUCTURES[structure]
    net = TensorDictModule(Gives(make), ["x"], ["y"])
    td = batch()
    net(td)
    plain, kind = net.module.seen, type(net.module.seen)
    with patch(net, {Site("part", leaf=leaf): Replace(9.0)}) as m:
        m(td)
    edited = net.module.seen
    assert type(edited) is kind
    assert read(edited)[0].eq(9).all()
    assert read(edited)[1] is td["x"], "the other leaf is the same tensor"
    assert not read(plain)[0].eq(9).any()
    captured = capture(net, Site("part", leaf=leaf))(batch())
    assert captured["activation", Site("part", leaf=leaf).key].equal(read(plain)[0])


def test_19_a_model_output_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    net = TensorDictModule(
        Gives(lambda a, b: outputs.BaseModelOutput(last_hidden_state=a, hidden_states=(b, a))), ["x"], ["y"]
    )
    with patch(
        net,
        {Site("part", leaf="last_hidden_state"): Replace(9.0), Site("part", leaf=("hidden_states", 1)): Replace(3.0)},
    ) as m:
        td = m(batch())
    seen = net.module.seen
    assert type(seen) is outputs.BaseModelOutput
    assert seen.last_hidden_state.eq(9).all()
    assert seen["last_hidden_state"] is seen.last_hidden_state is seen[0]
    assert seen.hidden_states[0] is td["x"]
    assert seen.hidden_states[1].eq(3).all()


def test_19_a_leaf_that_is_not_named_or_not_there():
    make, _, _ = STRUCTURES["dict"]
    net = TensorDictModule(Gives(make), ["x"], ["y"])
    with pytest.raises(BadKey, match="does not say which tensor") as error:
        capture(net, "part")(batch())
    assert "leaf='first'" in str(error.value)
    with pytest.raises(BadKey, match="has no tensor 'frist'") as error:
        capture(net, Site("part", leaf="frist"))(batch())
    assert "did you mean 'first'" in str(error.value)
    one = TensorDictModule(Gives(lambda a, b: {"only": a, "text": "b"}), ["x"], ["y"])
    assert capture(one, "part")(batch())["activation", "part"].shape == (5, 3)


class ByName(nn.Module):
    class Part(nn.Module):
        def forward(self, *, a, b, note=None):
            return a - b

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        return self.part(a=2 * x, b=x, note="n")


def test_20_a_module_with_keywords_only():
    net = TensorDictModule(ByName(), ["x"], ["y"])
    x = batch()["x"]
    td = capture(net, Site("part", "input", leaf="a"), "part:in.b", "part")(batch())
    assert td["activation", "part:in.a"].equal(2 * x)
    assert td["activation", "part:in.b"].equal(x)
    assert td["activation", "part"].equal(2 * x - x)
    with patch(net, {Site("part", "input", leaf="b"): Replace(0.0)}) as m:
        assert m(batch())["y"].equal(2 * x)
    gradient = Pullback(net, Target("y", 0), Site.parse("part:in.b")).gradients(batch())[0]
    assert gradient.equal(torch.tensor([-1.0, 0, 0, 0]).expand(5, 4))


def test_20_a_positional_argument_by_its_name_and_its_place():
    net = mlp()
    by_name, by_place = (capture(net, Site("0", "input", leaf=leaf))(batch()) for leaf in ("input", 0))
    assert by_name["activation", "0:in.input"].equal(batch()["x"])
    assert by_place["activation", "0:in.0"].equal(batch()["x"])
