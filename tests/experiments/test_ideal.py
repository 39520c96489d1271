"""How close a plan comes to what the arithmetic asks for."""

import torch
from experiments.models import mlp, residual
from torch import nn

from tdconcepts.experiments import Sweep, SweepPlan, every
from tdconcepts.experiments.ideal import operations
from tdconcepts.hooks import Ablate, Site


def test_operations_are_multiplications_and_additions():
    net, x = nn.Linear(5, 7), torch.zeros(3, 5)
    assert operations(lambda: net(x)) == 2 * 3 * 5 * 7


def test_the_ideal_is_one_forward_and_what_follows_each_change():
    model, td = mlp(3)  # 4-5-6-2
    sweep = Sweep(model, every(Site("2.0"), Ablate()))
    forward, after = 2 * 3 * (4 * 5 + 5 * 6 + 6 * 2), 6 * 2 * 3 * (6 * 2)
    assert sweep.plan(td).ideal == (forward + after) / operations(lambda: sweep(td.copy()))
    sequential = Sweep(model, every(Site("2.0"), Ablate()))
    sequential._candidates = lambda *args: []
    assert sequential.plan(td).ideal == (forward + after) / (6 * forward)


def test_early_stop_counts_in_both():
    model, td = residual(2)
    assert Sweep(model, every(Site("join.0"), Ablate()), outputs=Site("join.1")).plan(td).ideal > 0.99


def test_text():
    plan = SweepPlan("batch", 7, 2, 0.5, {"grow": "no"})
    assert str(plan) == "7 experiments by batch in 2 chunks: 50% of the ideal\n  not grow: no"
