"""Calls with a TensorDict and with tensors."""

import contextlib

import pytest
import torch
from hooks.nets import batch, mlp
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, set_skip_existing
from torch import nn

from tdconcepts import Gradient, IntegratedGradients
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Add, Replace, Scale, Site, Target, capture, dispatch_rows, patch, set_entries


class Adds(TensorDictModuleBase):
    """("n", "sum") = x + ("n", "y"); remembers the TensorDict."""

    def __init__(self, *out_keys):
        super().__init__()
        self.in_keys, self.out_keys = ["x", ("n", "y")], list(out_keys or [("n", "sum")])

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict):
        """Adds."""
        self.seen = tensordict
        for key in self.out_keys:
            tensordict.set(key, tensordict.get("x") + tensordict.get(("n", "y")))
        return tensordict


x, y = torch.randn(3, 4), torch.randn(3, 4)


def test_a_tensordict_comes_back_itself():
    module, td = Adds(), TensorDict({"x": x, ("n", "y"): y}, batch_size=[3])
    assert module(td) is td
    assert module(tensordict=td) is td
    assert td["n", "sum"].equal(x + y)


def test_tensors_by_position_and_by_name():
    module = Adds()
    for found in (module(x, y), module(x, n_y=y), module(x=x, n_y=y), module(n_y=y, x=x)):
        assert found.equal(x + y)
    both = Adds("a", "b")(x, y)
    assert isinstance(both, tuple)
    assert [value.equal(x + y) for value in both] == [True, True]


@pytest.mark.parametrize(
    ("shapes", "batch_size"),
    [
        (((3, 4), (3, 4)), (3,)),
        (((3, 4), (3,)), (3,)),
        (((3,), (3,)), ()),
        (((), ()), ()),
        (((3, 2, 4), (3, 1)), (3,)),
        (((3, 4), (4,)), ()),
    ],
)
def test_the_batch_is_the_first_dim_that_all_share(shapes, batch_size):
    module = Adds()
    tensors = [torch.zeros(shape) for shape in shapes]
    with contextlib.suppress(RuntimeError):  # they need not add
        module(*tensors)
    assert module.seen.batch_size == batch_size


def test_too_many_tensors_and_names_that_are_none():
    module = Adds()
    with pytest.raises(BadType, match="too many tensors") as error:
        module(x, y, x)
    assert "3 for in_keys" in str(error.value)
    with pytest.raises(BadKey, match="no input 'y'") as error:
        module(x, y=y)
    assert "'n_y'" in str(error.value)
    with pytest.raises(BadType, match="given twice"):
        module(x, y, x=x)


def test_a_dict_is_no_tensordict():
    with pytest.raises(BadType, match="not a TensorDict"):
        capture(mlp(), "0")({"x": x})


@pytest.mark.parametrize("edit", [Replace(7.0), Scale(2.0), Add(1.0)])
def test_parts_of_rows_are_the_same_by_tensors(edit):
    """The batch is known, so an index counts from the row's first dim."""
    net = mlp()
    m = patch(net, {Site("0", index=1): edit})
    assert m(x=batch()["x"]).equal(m(batch())["y"])
    assert m(batch()["x"][0]).equal(m(batch())["y"][0])


def test_explanations_are_the_same_by_tensors():
    m = capture(mlp(), "0", gradients=Target("y", 1))
    td = m(batch())
    for key, found in zip(m.out_keys, m(batch()["x"]), strict=True):
        assert found.equal(td[key])


def test_statistics_of_the_batch_are_refused():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model, td = TensorDictModule(net, ["x"], ["y"]), TensorDict(x=torch.randn(5, 4), batch_size=[5])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for method in Gradient, IntegratedGradients:
        explain = method(model.train(), Target("y", 0))
        with pytest.raises(BadValue, match="BatchNorm1d in training mode"):
            explain(td.copy())
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        model.eval()  # it is looked at at each call
        assert explain(td.copy())["attribution", "x"].shape == (5, 4)
    net[1] = nn.BatchNorm1d(3, track_running_stats=False).eval()
    with pytest.raises(BadValue, match="without running statistics"):
        Gradient(model, Target("y", 0))(td)


def test_an_entry_that_is_missing_is_what_is_needed():
    model = TensorDictModule(nn.Linear(4, 2), ["observation"], ["y"])
    for name, words in ("obs", "needed:  'observation'"), ("observatoin", "did you mean 'observatoin'"):
        with pytest.raises(BadKey, match=f"(?s)no entry 'observation'.*{words}"):
            Gradient(model, Target("y", 0))(TensorDict({name: torch.randn(3, 4)}, batch_size=[3]))


ENTRIES = {("n", "sum"): x + y, ("n", "more", "z"): y, ("made", "a"): x, "whole": y, ("made", "b"): y}
PLACES = {
    "plain": lambda: TensorDict({"x": x}, [3]),
    "with the group": lambda: TensorDict({"x": x, "n": {"y": y}}, [3]),
    "with a device": lambda: TensorDict({"x": x}, [3], device="cpu"),
    "with names": lambda: TensorDict({"x": x}, [3], names=["row"]),
    "without a batch": lambda: TensorDict({"x": x}),
    "lazy": lambda: LazyStackedTensorDict(*TensorDict({"x": x}, [3]).unbind(0)),
}


@pytest.mark.parametrize("place", PLACES)
def test_entries_at_once_are_entries_one_by_one(place):
    td, expected = PLACES[place](), PLACES[place]()
    for key, value in {**ENTRIES, ("whole group", "a"): y, ("n", "late"): x, ("made", "late"): y}.items():
        expected.set(key, value)
    groups = {"whole group": {"a": y}, "n": {"late": x}, "made": {"late": y}}
    assert set_entries(td, {**ENTRIES, **groups}) is td
    assert groups == {"whole group": {"a": y}, "n": {"late": x}, "made": {"late": y}}
    assert set(td.keys(True)) == set(expected.keys(True))
    assert (td == expected).all()
    for group in ("n", "made", "whole group", ("n", "more")):
        assert td[group].batch_size == expected[group].batch_size
        assert td[group].device == expected[group].device
        assert td[group].names == expected[group].names
    with pytest.raises(RuntimeError, match="locked"):
        set_entries(td.lock_(), {"late": x})
