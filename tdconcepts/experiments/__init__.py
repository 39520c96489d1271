"""Many interventions at once: hundreds of hook experiments in a few forwards."""

from __future__ import annotations

from tdconcepts.experiments.effects import ablation_effects, attribution_patching
from tdconcepts.experiments.patching import activation_patching, causal_trace
from tdconcepts.experiments.sweep import Sweep, SweepPlan
from tdconcepts.experiments.table import Experiments, each, every, grid, product, together

__all__ = [
    "Experiments",
    "Sweep",
    "SweepPlan",
    "ablation_effects",
    "activation_patching",
    "attribution_patching",
    "causal_trace",
    "each",
    "every",
    "grid",
    "product",
    "together",
]
