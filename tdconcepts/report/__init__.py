"""Figures and pages: what was measured, as one self-contained file. Drawing needs the extra ``report``."""

from tdconcepts.report.figures import interval_plot, intervention_curve, over_time
from tdconcepts.report.heatmaps import effect_map, heat_map
from tdconcepts.report.page import Section, page, write_page

__all__ = [
    "Section",
    "effect_map",
    "heat_map",
    "interval_plot",
    "intervention_curve",
    "over_time",
    "page",
    "write_page",
]
