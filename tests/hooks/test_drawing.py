"""Sources: the same state means the same draws, through copies and pickles too."""

import copy
import pickle

import pytest
import torch

from tdconcepts.errors import BadType
from tdconcepts.hooks.drawing import Source


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_from_the_same_state(travel):
    one = Source(torch.Generator().manual_seed(3))
    one.uniform(5)
    other = travel(one)
    assert torch.equal(one.uniform(4), other.uniform(4))
    assert torch.equal(one.normal(4), other.normal(4))
    assert travel(Source()).generator is None


def test_the_global_generator_is_left_alone_when_one_is_given():
    before = torch.random.get_rng_state()
    source = Source(torch.Generator().manual_seed(3))
    source.permutations(3, 4), source.choices(torch.ones(3), 5), source.normal(2)
    assert torch.equal(before, torch.random.get_rng_state())
    Source().uniform(1)
    assert not torch.equal(before, torch.random.get_rng_state())


def test_permutations_are_orders_and_all_of_them_come():
    orders = Source(torch.Generator().manual_seed(0)).permutations(600, 3)
    assert torch.equal(orders.sort(-1).values, torch.arange(3).expand(600, 3))
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 60  # 100 are expected


def test_choices_follow_their_weights():
    drawn = Source(torch.Generator().manual_seed(0)).choices(torch.tensor([1.0, 0.0, 3.0]), 4000)
    counts = drawn.bincount(minlength=3)
    assert counts[1] == 0
    assert abs(counts[0] - 1000) < 120  # four standard deviations


def test_what_is_no_generator():
    with pytest.raises(BadType, match="manual_seed"):
        Source(0)
