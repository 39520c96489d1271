"""Many interventions at once: hundreds of hook experiments in a few forwards."""

from __future__ import annotations

from tdconcepts.experiments.sweep import Sweep, SweepPlan
from tdconcepts.experiments.table import Experiments, each, every, grid, product

__all__ = ["Experiments", "Sweep", "SweepPlan", "each", "every", "grid", "product"]
