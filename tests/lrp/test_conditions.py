"""Concept-conditional relevance: units of a site, one set for all or one for each row."""

import pytest
import torch
from lrp.nets import as_td
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target, anchor
from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import LRP, EpsilonPlus, EpsilonPlusFlat
from tdconcepts.lrp.conditions import Conditions


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2)
    return as_td(nn.Sequential(*layers).double())


@pytest.fixture
def td():
    return TensorDict(x=torch.randn(3, 1, 5, 5, dtype=torch.float64), batch_size=[3])


def explained(net, td, **options):
    return LRP(net, EpsilonPlus(), Target("logits", 1), **options)(td.copy())["attribution", "x"]


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_the_parts_sum_to_the_whole(net, td, convention):
    parts = [explained(net, td, condition={Site("0"): [unit]}, convention=convention) for unit in range(4)]
    assert torch.stack(parts).sum(0).allclose(explained(net, td, convention=convention))
    assert explained(net, td, condition={"0": range(4)}).allclose(explained(net, td))


def test_units_for_each_row(net, td):
    td["unit"] = torch.tensor([3, 0, 2])
    td["mask"] = nn.functional.one_hot(td["unit"], 4).bool()
    found = explained(net, td, condition={Site("0"): "unit"})
    assert found.equal(explained(net, td, condition={Site("0"): "mask"}))
    for row, unit in enumerate((3, 0, 2)):
        assert found[row].allclose(explained(net, td, condition={Site("0"): [unit]})[row])


def test_its_own_site_is_not_masked_but_what_is_in_front(net, td):
    out = LRP(net, EpsilonPlus(), Target("logits", 1), [Site("0"), "x"], condition={Site("0"): [1]})(td)
    assert out["attribution", "0"].shape == (3, 4, 3, 3)
    assert (out["attribution", "x"] != 0).any()


def several(w, units):
    return {Site("0"): units[0]}, {Site("0"): units[1], w: [0, 3]}, {w: 5}, {}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"start": "ones"}, {"check": True}])
def test_many_conditions_are_each_condition(net, td, convention, options):
    td["unit"] = torch.tensor([3, 0, 2])
    conditions = list(several(Site("2"), ([1, 2], "unit")))
    together = explained(net, td, condition=conditions, convention=convention, **options)
    assert together.shape == (3, 4, 1, 5, 5)
    for n, condition in enumerate(conditions):
        alone = explained(net, td, condition=condition, convention=convention, **options)
        assert together[:, n].allclose(alone, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_conditions_under_other_batch_dims(net, td):
    conditions = [{Site("0"): [0]}, {Site("0"): [1, 2]}]
    found = explained(net, td, condition=conditions)
    wide = TensorDict(x=torch.stack([td["x"], td["x"] * 2]), batch_size=[2, 3])
    flat = TensorDictModule(_Flat(net.module), ["x"], ["logits"])
    assert explained(flat, wide, condition=[{Site("net.0"): [0]}, {Site("net.0"): [1, 2]}])[0].allclose(found)


class _Flat(nn.Module):
    """As torchrl's networks do: batch dims are merged into one, and parted again."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.flatten(0, -4)).unflatten(0, x.shape[:-3])


def test_deltas(net, td):
    options = {"convergence_delta": True}
    conditions = [{Site("0"): [unit]} for unit in range(4)]
    out = LRP(net, EpsilonPlus(), Target("logits", 1), condition=conditions, **options)(td.copy())
    assert out["convergence_delta", "x"].shape == (3, 4)
    added = out["attribution", "x"].flatten(2).sum(-1) - net(td.copy())["logits"][:, 1:]
    assert out["convergence_delta", "x"].allclose(added)


def test_masks_in_the_shape_of_a_row(net, td):
    channel = torch.zeros(4, 3, 3)
    channel[2] = 1
    wanted = explained(net, td, condition={Site("0"): [2]})
    assert explained(net, td, condition={Site("0"): channel}).equal(wanted)
    td["mask"] = channel.bool().expand(3, 4, 3, 3)
    assert explained(net, td, condition={Site("0"): "mask"}).equal(wanted)
    pixels = torch.rand(4, 3, 3).round()
    parts = [explained(net, td, condition={Site("0"): mask}) for mask in (pixels, 1 - pixels)]
    assert (parts[0] + parts[1]).allclose(explained(net, td))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_in_front_of_a_flat_layer(net, td, convention):
    whole = LRP(net, EpsilonPlusFlat(), Target("logits", 1), convention=convention)(td.copy())["attribution", "x"]
    for condition in ({Site("0", "input"): [0]}, [{Site("0", "input"): [0]}]):
        explainer = LRP(net, EpsilonPlusFlat(), Target("logits", 1), condition=condition, convention=convention)
        assert explainer(td.copy())["attribution", "x"].reshape(whole.shape).allclose(whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_in_a_compiled_graph(net, td, convention):
    """A condition has a tap at its site, which must be there before; several conditions follow one after the other."""
    td["unit"] = torch.tensor([3, 0, 2])
    for condition in ({Site("0"): "unit"}, [{Site("0"): "unit"}, {Site("0"): [1, 2]}, {}]):
        torch._dynamo.reset()
        options = {"condition": condition, "convention": convention, "convergence_delta": True}
        explainer = LRP(net, EpsilonPlus(), Target("logits", 1), **options)
        expected = explainer(td.copy())
        with anchor(net, "0"):
            found = torch.compile(explainer, fullgraph=True, backend="eager")(td.copy())
        for key in explainer.out_keys:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    checked = LRP(net, EpsilonPlus(), Target("logits", 1), check=True)
    with pytest.raises(RuntimeError, match="check=True reports numbers"):
        torch.compile(checked, fullgraph=True, backend="eager")(td.copy())
    torch._dynamo.reset()


def test_bad_input(net, td):
    with pytest.raises(BadType, match="not units of"):
        explained(net, td, condition={Site("0"): [[0], [1]]})
    with pytest.raises(BadType, match="not a condition"):
        explained(net, td, condition=[])
    with pytest.raises(BadValue, match="a part of a site"):
        explained(net, td, condition={"0[1]": [0]})
    with pytest.raises(BadValue, match="several targets under several conditions"):
        LRP(net, EpsilonPlus(), Target("logits", [0, 1]), condition=[{"0": 1}, {"0": 2}])(td.copy())
    td["unit"], td["wide"] = torch.tensor([4, 0, 0]), torch.ones(3, 7)
    with pytest.raises(BadValue, match=r"no such unit at '0'"):
        explained(net, td, condition={Site("0"): "unit"})
    with pytest.raises(BadValue, match=r"no mask of the units of '0'"):
        explained(net, td, condition={Site("0"): "wide"})
    with pytest.raises(BadValue, match=r"no such unit at '0'"):
        explained(net, td, condition={Site("0"): [9]})
    with pytest.raises(BadType, match="not a condition"):
        explained(net, td, condition=[1])
    assert len(Conditions(EpsilonPlus().rules_for(net), None).bind(net)) == 1
