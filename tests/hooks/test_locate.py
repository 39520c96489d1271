"""From sites and entries to places, and anchors."""

import pytest
import torch
from hooks.nets import batch, hook_count, mlp, pipeline, snapshot
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey
from tdconcepts.hooks import Replace, Scale, Site, anchor, capture, locate, patch


def test_sites_and_entries():
    net = pipeline()
    assert [place.module for place in locate(net, Site("*"))] == list(net)
    (place,) = locate(net, "z")
    assert (place.module, place.name, place.leaf, place.side) == (net[1], "'z'", "z", "output")
    assert locate(net, ("z",)) == [place]


def test_an_entry_is_where_it_is_written_last():
    again = TensorDictModule(lambda h: h + 1, ["h"], ["h"])
    net = TensorDictSequential(pipeline()[0], again)
    assert locate(net, "h")[0].module is again
    nested = TensorDictSequential(TensorDictSequential(net), pipeline()[1])
    assert locate(nested, "h")[0].module is again


def test_entries_that_are_not_written():
    net = pipeline()
    with pytest.raises(BadKey, match="the model writes no entry 'zz'") as error:
        locate(net, "zz")
    assert "did you mean 'z'?" in str(error.value)
    with pytest.raises(BadKey, match="writes no entry '1'") as error:
        locate(net, "1")
    assert "Site('1') names a module" in str(error.value)
    with pytest.raises(BadKey, match=r"Site\('\*'\) names a module"):  # globs too
        locate(net, "*")
    with pytest.raises(BadKey, match="writes no entry 'x'"):
        locate(net, "x")
    with pytest.raises(BadKey, match="writes no entry 'y'"):
        locate(nn.Linear(2, 2), "y")


# ---------------------------------------------------------------------------------------------------- anchors


def test_an_anchor_is_inert():
    net = mlp()
    expected, before = net(batch())["y"], snapshot(net)
    with anchor(net, "*", "1:in") as held:
        assert isinstance(held, anchor)
        assert hook_count(net)
        assert net(batch())["y"].equal(expected)
        assert net(x=batch()["x"]).equal(expected)
    assert snapshot(net) == before


def test_anchors_of_entries():
    net = pipeline()
    with anchor(net, entries=["z"]):
        assert len(net[1]._forward_hooks) == 1
        assert not net[0]._forward_hooks
    assert not hook_count(net)


def test_anchors_are_counted():
    net = mlp()
    one, two = anchor(net, "0"), anchor(net, "0", "1")
    count = hook_count(net)
    one.remove()
    one.remove()
    assert hook_count(net) == count, "the other one still holds them"
    with patch(net, {Site("0"): Scale(2.0)}) as m:
        two.remove()
        assert m(batch())["y"].shape == (5, 2)
    assert not hook_count(net)


def test_an_anchor_of_nothing_anchors_the_model():
    net = mlp()
    with anchor(net):
        assert len(net._forward_hooks) == len(net._forward_pre_hooks) == 1
    assert not hook_count(net)


def test_an_anchor_under_a_bare_module():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x = torch.ones(2, 4)
    expected = net(x)
    with anchor(net, "0"):
        assert net(x).equal(expected)
        wrapped = TensorDictModule(net, ["x"], ["y"])
        assert capture(wrapped, "0")(x=x)[1].equal(net[0](x))
        with patch(wrapped, {Site("1"): Replace(0.0)}):
            assert not net(x).any()
    assert not hook_count(net)


@pytest.mark.parametrize("arguments", [("nope",), ("0", "nope"), ("0:in", Site("n*"))])
def test_anchors_of_what_is_not_there(arguments):
    net = mlp()
    with pytest.raises(BadKey, match="no module at path"):
        anchor(net, *arguments)
    with pytest.raises(BadKey, match="writes no entry"):
        anchor(net, "0", entries=["nope"])
    assert not hook_count(net)
