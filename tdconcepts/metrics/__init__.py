"""Numbers that compare an explanation or a concept model with what is true."""

from __future__ import annotations

from tdconcepts.metrics.accuracy import ConceptAccuracy, concept_hits, task_hits
from tdconcepts.metrics.corrections import correction_curve, curve_area

__all__ = ["ConceptAccuracy", "concept_hits", "correction_curve", "curve_area", "task_hits"]
