"""Interventions: decide which concepts change, and to what."""

from __future__ import annotations

from tdconcepts.interventions.directions import RemoveDirection, random_directions
from tdconcepts.interventions.pipeline import InterventionPipeline, intervene
from tdconcepts.interventions.policies import GradientPolicy, RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.selection import SelectStage
from tdconcepts.interventions.stages import ConceptStage, ReplaceStage, Splice
from tdconcepts.interventions.strategies import Do, GroundTruth

__all__ = [
    "ConceptStage",
    "Do",
    "GradientPolicy",
    "GroundTruth",
    "InterventionPipeline",
    "RandomPolicy",
    "RemoveDirection",
    "ReplaceStage",
    "SelectStage",
    "Splice",
    "UncertaintyPolicy",
    "UniformPolicy",
    "intervene",
    "random_directions",
]
