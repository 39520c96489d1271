"""Plans: each gives what single forwards give, or says why it can't."""

import pytest
import torch
from experiments.models import CASES, mlp

from tdconcepts.experiments import Sweep, every, product
from tdconcepts.experiments.moves import Unfit
from tdconcepts.experiments.plans import PLANS, restricted, run_one
from tdconcepts.hooks import Ablate, Scale, Site

EXACT = [name for name in CASES if name != "rows that see each other"]
SEVERAL = "mlp: edits of several kinds"


def case(name, rows=3):
    make, experiments = CASES[name]
    model, td = make(rows)
    sweep = Sweep(model, experiments)
    work = sweep._work(td)
    return sweep._decide(work)[0].chunks[0][1], work


@pytest.mark.parametrize("plan", ["batch", "vmap"])
@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_for_any_model(name, plan):
    made, td = case(name)
    if (name, plan) == (SEVERAL, "vmap"):
        with pytest.raises(Unfit):
            PLANS[plan](made, td)
        return
    expected = PLANS["sequential"](made, td)
    for key, value in PLANS[plan](made, td).items():
        torch.testing.assert_close(value, expected[key], atol=1e-10, rtol=0)


@pytest.mark.parametrize("plan", ["resume", "grow"])
@torch.no_grad()
def test_for_some_models(plan):
    done = 0
    for name in EXACT:
        made, td = case(name)
        try:
            found = PLANS[plan](made, td)
        except (Unfit, RuntimeError):
            continue
        done += 1
        for key, value in PLANS["sequential"](made, td).items():
            torch.testing.assert_close(found[key], value, atol=1e-10, rtol=0)
    assert done >= 15


def test_one_alone():
    made, td = case("mlp: units of a layer")
    assert run_one(made, td, 0)["y"].shape == (3, 2)


def test_restricted():
    model, td = mlp(2)
    sweep = Sweep(model, product(every(Site("0"), Ablate()), every(Site("2"), Scale(2.0))))
    table = sweep._decide(sweep._work(td))[0].table
    first, second = restricted(table, [7, 29, 0])
    units = [
        dict(zip(move.plain.members.tolist(), move.plain.spans[-1][:, 0].tolist(), strict=True))
        for move in (first, second)
    ]
    assert units == [{0: 1, 1: 4, 2: 0}, {0: 1, 1: 5, 2: 0}]
