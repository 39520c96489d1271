"""Figures and pages: what was measured, as one self-contained file. Drawing needs the extra ``report``."""

from tdconcepts.report.figures import interval_plot, intervention_curve, over_time
from tdconcepts.report.heatmaps import effect_map, heat_map
from tdconcepts.report.page import Section, page, write_page
from tdconcepts.report.rollouts import Shown, attribution_strip, frame_strip, rollout_sections, write_rollout_page

__all__ = [
    "Section",
    "Shown",
    "attribution_strip",
    "effect_map",
    "frame_strip",
    "heat_map",
    "interval_plot",
    "intervention_curve",
    "over_time",
    "page",
    "rollout_sections",
    "write_page",
    "write_rollout_page",
]
