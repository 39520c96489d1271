"""Concept-conditional relevance: units of a site, one set for all or one for each row."""

import pytest
import torch
from lrp.nets import as_td
from tensordict import TensorDict
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import LRP, EpsilonPlus
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


def test_bad_input(net, td):
    with pytest.raises(BadValue, match=r"no such unit at '0'"):
        explained(net, td, condition={Site("0"): [9]})
    with pytest.raises(BadType, match="not a condition"):
        explained(net, td, condition=[1])
    assert len(Conditions(EpsilonPlus().rules_for(net), None).bind(net)) == 1
