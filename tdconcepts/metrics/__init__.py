"""Numbers that compare an explanation or a concept model with what is true."""

from __future__ import annotations

from tdconcepts.metrics.accuracy import ConceptAccuracy, concept_hits, task_hits
from tdconcepts.metrics.corrections import correction_curve, curve_area
from tdconcepts.metrics.effects import (
    causal_concept_effect,
    completeness_score,
    contributing_concepts,
    effective_concepts,
    leakage_score,
)
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
    "causal_concept_effect",
    "completeness_score",
    "concept_hits",
    "contributing_concepts",
    "correction_curve",
    "curve_area",
    "effective_concepts",
    "leakage_score",
    "parameter_randomisation",
    "task_hits",
]
