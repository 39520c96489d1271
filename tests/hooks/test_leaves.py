"""Leaves: finding one tensor in a structure, and putting a part back out of place."""

import dataclasses

import pytest
import torch
from hooks.nets import batch, pipeline
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Site
from tdconcepts.hooks.leaves import get_leaf, pick, put, set_leaf
from tdconcepts.hooks.sites import places

a, b, c = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.0)


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: torch.Tensor
    rest: tuple


def place(leaf=None, side="output", module=None):
    module = nn.Identity() if module is None else module
    return places(nn.ModuleDict({"m": module}), Site("m", side, leaf=leaf))[0]


# ---------------------------------------------------------------------------------------------------- parts of a row

ROW = (3, 4)
one_index = (
    st.integers(-3, 2)
    | st.builds(slice, st.none() | st.integers(-3, 3), st.none() | st.integers(-3, 3), st.sampled_from([None, 1, 2]))
    | st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda i: i % 3)
    | st.just(...)
)


@given(one_index, st.integers(0, 2))
def test_put_replaces_the_part_that_pick_takes(index, lead):
    value = torch.arange(float(2**lead * 12)).reshape(*[2] * lead, *ROW)
    part = pick(value, (index,), lead)
    expected = value.clone()
    expected[(slice(None),) * lead + (index,)] = -part - 1
    before = value.clone()
    assert put(value, (index,), lead, -part - 1).equal(expected)
    assert value.equal(before), "out of place"
    assert put(value, (index,), lead, part).equal(value)


@pytest.mark.parametrize("index", [(1, 2), (slice(0, 2), [0, 3]), (..., -1), ([0, 2], [1, 3]), (0, ...)])
@pytest.mark.parametrize("lead", [0, 1, 2])
def test_put_several_dims(index, lead):
    value = torch.randn(*[2] * lead, *ROW)
    part = pick(value, index, lead)
    expected = value.clone()
    expected[(slice(None),) * lead + index] = 7.0
    assert put(value, index, lead, torch.full_like(part, 7.0)).equal(expected)


def test_no_index_is_all_of_it():
    assert pick(a, None, 1) is a
    assert put(a, None, 1, b) is b


def test_put_of_an_empty_batch():
    value = torch.zeros(0, 3)
    assert put(value, (1,), 1, pick(value, (1,), 1)).shape == (0, 3)


def test_put_keeps_the_gradient_of_both():
    value, new = torch.zeros(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    put(value, (1,), 1, new).sum().backward()
    assert value.grad.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert new.grad.tolist() == [1, 1]


def test_put_under_vmap():
    values = torch.randn(5, 2)
    found = torch.vmap(lambda new: put(a, (1,), 1, new))(values)
    assert found[:, :, 1].equal(values)
    assert not found[:, :, [0, 2]].any()


def test_put_leaves_nan_alone():
    value = torch.tensor([[torch.nan, 1.0], [2.0, torch.nan]])
    found = put(value, (0,), 1, torch.tensor([5.0, 6.0]))
    assert found[:, 0].tolist() == [5, 6]
    assert found[0, 1] == 1
    assert found[1, 1].isnan()


@pytest.mark.parametrize("index", [(3,), (-4,), (0, 0), ([0, 5],), (slice(None), slice(None))])
def test_an_index_that_is_out_of_range(index):
    with pytest.raises(BadValue, match="the index of a site is out of range") as error:
        pick(a, index, 1)
    assert "rows of shape [3]" in str(error.value)


# ---------------------------------------------------------------------------------------------------- structures


@pytest.mark.parametrize(
    ("tree", "leaf", "expected"),
    [
        (a, None, a),
        ((a,), None, a),
        ({"k": [(a,)]}, None, a),
        ((a, "text", 3, None), None, a),
        ((a, b), 1, b),
        ((a, b), -1, b),
        ([a, (b, c)], (1, 0), b),
        ({"x": a, "y": b}, "y", b),
        ({"x": {"y": (a, b)}}, ("x", "y", 1), b),
        (Frozen(a, (b, c)), "first", a),
        (Frozen(a, (b, c)), ("rest", 1), c),
        (TensorDict(x=a, y=TensorDict(z=b)), ("y", "z"), b),
        (TensorDict(x=a, y=b), "y", b),
        ({"td": TensorDict(x=a, y=b)}, ("td", "x"), a),
    ],
)
def test_get_and_set(tree, leaf, expected):
    where, new = place(leaf), torch.full((2, 3), 9.0)
    assert get_leaf(where, tree) is expected
    changed = set_leaf(where, tree, new)
    assert type(changed) is type(tree)
    assert get_leaf(where, changed) is new
    if not isinstance(tree, TensorDict) and not (isinstance(tree, dict) and "td" in tree):
        assert get_leaf(where, tree) is expected, "the structure that was given stays as it was"


@pytest.mark.parametrize(
    ("tree", "leaf", "text"),
    [
        ((a, b), None, "2 tensors at [0, 1]"),
        ({"x": a, "y": (b, c)}, None, "3 tensors at ['x', ('y', 0), ('y', 1)]"),
        ((1, "text"), None, "a tuple without tensors"),
        (None, None, "a NoneType without tensors"),
        ((a, b), 2, "has no tensor 2"),
        ((a, b), "x", "has no tensor 'x'"),
        (a, "x", "has no tensor 'x'"),
        ({"first": a}, "frist", "did you mean 'first'?"),
        (Frozen(a, ()), "frist", "did you mean 'first'?"),
        (TensorDict(first=a), "frist", "did you mean 'first'?"),
    ],
)
def test_a_leaf_that_is_not_there(tree, leaf, text):
    with pytest.raises(BadKey) as error:
        get_leaf(place(leaf), tree)
    assert text in str(error.value)
    assert "'m" in str(error.value)


def test_the_way_out_names_a_leaf_that_works():
    tree = {"x": a, "y": (b, c)}
    with pytest.raises(BadKey) as error:
        get_leaf(place(), tree)
    assert "Site('m', 'output', leaf='x')" in str(error.value)
    assert get_leaf(place("x"), tree) is a


@pytest.mark.parametrize("leaf", ["scale", 1])
@pytest.mark.parametrize("by_name", [False, True])
def test_inputs_by_name_and_by_place(leaf, by_name):
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    given = ((a,), {"scale": b}) if by_name else ((a, b), {})
    where = place(leaf, "input", Scaled())
    if by_name and leaf == 1:
        with pytest.raises(BadKey, match="has no tensor 1"):
            get_leaf(where, given)
        return
    assert get_leaf(where, given) is b
    args, kwargs = set_leaf(where, given, c)
    assert all(x is y for x, y in zip([*args, *kwargs.values()], [a, c], strict=True))


def test_the_only_input_needs_no_name():
    assert get_leaf(place(None, "input"), ((a,), {})) is a
    assert get_leaf(place(None, "input"), ((), {"x": a, "flag": True})) is a
    with pytest.raises(BadKey, match="does not say which tensor") as error:
        get_leaf(place(None, "input"), ((a,), {"mask": b}))
    assert "leaf=0" in str(error.value)


def stage(in_keys, out_keys):
    return TensorDictModule(lambda *args: args if len(out_keys) > 1 else args[0], in_keys, out_keys)


def test_entries_of_a_stage():
    td = TensorDict(x=a, y=b)
    one, two = stage(["x"], ["y"]), stage(["x", "y"], ["y", "z"])
    assert get_leaf(place(None, "input", one), ((td,), {})) is td["x"]
    assert get_leaf(place(None, "output", one), td) is td["y"]
    assert get_leaf(place(None, "output", one), a) is a, "called by dispatch"
    assert get_leaf(place("z", "output", two), (a, b)) is b, "called by dispatch"
    assert get_leaf(place("y", "input", two), ((td,), {})) is td["y"]
    assert get_leaf(place("x", "output", two), td) is td["x"], "any entry can be named"
    changed = set_leaf(place(None, "output", one), td, c)
    assert changed is td, "a TensorDict flows on"
    assert td["y"] is c


@pytest.mark.parametrize(("side", "keys"), [("input", "in_keys ['x', 'y']"), ("output", "out_keys ['y', 'z']")])
def test_a_stage_with_several_entries_wants_a_name(side, keys):
    where = place(None, side, stage(["x", "y"], ["y", "z"]))
    td = TensorDict(x=a, y=b, z=c)
    with pytest.raises(BadKey, match="has several entries") as error:
        get_leaf(where, td if side == "output" else ((td,), {}))
    assert keys in str(error.value)
    assert "leaf=" in str(error.value)


def test_a_stage_in_a_pipeline():
    net = pipeline()
    td = net(batch())
    assert get_leaf(places(net, Site("1"))[0], td) is td["z"]
    assert get_leaf(places(net, Site("1", "input"))[0], ((td,), {})) is td["h"]
