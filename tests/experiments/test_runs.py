"""What one run wrote, and how it comes into another."""

import pytest
import torch
from experiments.models import data, mlp, residual
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments.runs import (
    DONOR,
    check_target,
    concrete,
    donors,
    entry_of,
    input_of,
    measured,
    place_all,
    runs_of,
)
from tdconcepts.hooks import Site, Target


def test_donors():
    model, td = residual(3)
    taken, out = donors(model, td, concrete(model, [Site("shared"), Site("join.*"), "x"]))
    assert [len(values) for values in taken.values()] == [2, 1, 1, 1, 1]
    torch.testing.assert_close(taken[Site("shared")][1], out["y"])
    torch.testing.assert_close(taken["x"][0], td["x"])


def test_place_all_and_where_it_lies():
    td = data(x=(3, 2))
    one, two = torch.zeros(3, 2), torch.ones(3, 2)
    place_all(td, DONOR, {Site("0"): [one], Site("1"): [one, two], "x": [two]})
    assert td[entry_of(DONOR, Site("0"))] is one
    assert td[entry_of(DONOR, Site("1"), 1, 2)] is two
    assert td[entry_of(DONOR, "x")] is two
    with pytest.raises(BadValue, match="several times"):
        place_all(td, DONOR, {Site("1"): [one, two]}, once=True)


def test_input_of():
    model, td = mlp(3)
    both = TensorDict(clean=td, y=torch.zeros(3), batch_size=[3])
    for found in (input_of(model, both, "clean"), input_of(model, td)):
        assert list(found.keys()) == ["x"]
        assert found["x"] is td["x"]
    with pytest.raises(BadKey, match=r"no entry \('corrupt', 'x'\)"):
        input_of(model, both, "corrupt")


def test_runs_of():
    assert runs_of("denoise") == ("corrupt", "clean")
    assert runs_of("noise") == ("clean", "corrupt")
    with pytest.raises(BadValue, match="direction"):
        runs_of("up")


def test_measured_follows_the_logged_index():
    td = data(y=(3, 2)).set("a", torch.tensor([0, 1, 0]))
    target = Target("y", by="a")
    y = measured(target, td, td, 1, None)
    torch.testing.assert_close(y, td["y"].gather(1, td["a"][:, None])[:, 0])
    several = torch.stack([td["y"], 2 * td["y"]], 1)
    torch.testing.assert_close(
        measured(target, {"y": several}, td, 1, None, experiments=True), torch.stack([y, 2 * y], 1)
    )


def test_check_target():
    model, _ = mlp(2)
    check_target(model, Target("y", 0))
    with pytest.raises(BadType, match="not a Target"):
        check_target(model, "y")
    with pytest.raises(BadKey, match="no entry"):
        check_target(model, Target(Site("0"), 0))
