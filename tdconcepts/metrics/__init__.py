"""Numbers that compare an explanation or a concept model with what is true."""

from __future__ import annotations

from tdconcepts.metrics.accuracy import ConceptAccuracy, concept_hits, task_hits
from tdconcepts.metrics.corrections import correction_curve, curve_area
from tdconcepts.metrics.faithfulness import AIM, AUM, PGI, PGU
from tdconcepts.metrics.randomisation import Randomised, parameter_randomisation
from tdconcepts.metrics.robustness import RIS

__all__ = [
    "AIM",
    "AUM",
    "PGI",
    "PGU",
    "RIS",
    "ConceptAccuracy",
    "Randomised",
    "concept_hits",
    "correction_curve",
    "curve_area",
    "parameter_randomisation",
    "task_hits",
]
