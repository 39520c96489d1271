"""Many interventions at once: hundreds of hook experiments in a few forwards."""

from __future__ import annotations

from tdconcepts.experiments.effects import ablation_effects, attribution_patching
from tdconcepts.experiments.ideal import SweepPlan
from tdconcepts.experiments.interchange import ReplaceWithin, interchange
from tdconcepts.experiments.patching import activation_patching, causal_trace
from tdconcepts.experiments.paths import path_patching
from tdconcepts.experiments.sweep import Sweep
from tdconcepts.experiments.table import Experiments, each, every, grid, product, together

__all__ = [
    "Experiments",
    "ReplaceWithin",
    "Sweep",
    "SweepPlan",
    "ablation_effects",
    "activation_patching",
    "attribution_patching",
    "causal_trace",
    "each",
    "every",
    "grid",
    "interchange",
    "path_patching",
    "product",
    "together",
]
