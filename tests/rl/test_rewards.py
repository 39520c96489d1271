"""Reward differences and their minimal reasons, against a search over all subsets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.rl.rewards import RewardDifference, minimal_reasons


def subsets(items):
    return (set(some) for size in range(len(items) + 1) for some in itertools.combinations(items, size))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=5))
def test_minimal_reasons_by_search(gaps):
    plus, minus = (mask.nonzero().flatten().tolist() for mask in minimal_reasons(torch.tensor(gaps).double()))
    good, bad = [i for i, g in enumerate(gaps) if g > 0], [i for i, g in enumerate(gaps) if g < 0]
    cost = -sum(gaps[i] for i in bad)
    enough = [some for some in subsets(good) if sum(gaps[i] for i in some) > cost]
    if not enough:
        assert plus == minus == []
        return
    size = min(map(len, enough))
    best = max(sum(gaps[i] for i in some) for some in enough if len(some) == size)
    assert len(plus) == size
    assert sum(gaps[i] for i in plus) == best
    bar = best - min(gaps[i] for i in plus) if plus else 0
    needed = [some for some in subsets(bad) if -sum(gaps[i] for i in some) > bar]
    assert len(minus) == (min(map(len, needed)) if needed else 0)
    assert not set(minus) - set(bad)


def test_differences():
    torch.manual_seed(0)
    td = TensorDict(component_value=torch.randn(2, 3, 4, 3), action=torch.randint(0, 3, (2, 3)), batch_size=[2, 3])
    td["foil"] = (td["action"] + 1) % 3
    for other in ("second", 1, "foil"):
        found = RewardDifference(other=other)(td.copy())["rdx"]
        for i, j in itertools.product(range(2), range(3)):
            q, a = td["component_value"][i, j], int(td["action"][i, j])
            rest = [b for b in range(3) if b != a]
            b = {"second": max(rest, key=lambda b: q[:, b].sum()), 1: 1, "foil": int(td["foil"][i, j])}[other]
            torch.testing.assert_close(found["difference"][i, j], q[:, a] - q[:, b])


def test_a_table():
    td = TensorDict(q=torch.tensor([[5.0, 1.0], [2.0, 3.0]]), action=torch.tensor(0), batch_size=[])
    explain = RewardDifference("q", components=["crash", "fuel"])
    assert explain.rows(explain(td))[1] == [["crash", "+4", "MSX+"], ["fuel", "-1", "MSX-"]]


def test_bad_input():
    td = TensorDict(q=torch.zeros(2, 3), action=torch.zeros(2).long(), batch_size=[2])
    with pytest.raises(BadKey, match="component_value"):
        RewardDifference()(td)
    with pytest.raises(BadValue, match="two actions or more"):
        RewardDifference("q")(td)
    td["q"] = torch.zeros(2, 3, 2)
    with pytest.raises(BadValue, match="no such action"):
        RewardDifference("q", other=2)(td)
    with pytest.raises(BadValue, match="a name for each component"):
        RewardDifference("q", components=["one"])(td)
    with pytest.raises(BadValue, match="one state"):
        RewardDifference("q").rows(RewardDifference("q")(td))
