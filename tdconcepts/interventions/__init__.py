"""Interventions: decide which concepts change, and to what."""

from __future__ import annotations

from tdconcepts.interventions.directions import RemoveDirection, random_directions
from tdconcepts.interventions.draws import FromDistribution, Resample
from tdconcepts.interventions.influence import ExpectedInfluencePolicy, GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import LearnedPolicy, OrderPolicy, RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.positive import PositiveWeights
from tdconcepts.interventions.program import Intervention
from tdconcepts.interventions.selection import Selection, SelectStage
from tdconcepts.interventions.sequential import GreedyStage
from tdconcepts.interventions.spaces import to_logits
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.stages import ConceptStage, ReplaceStage
from tdconcepts.interventions.strategies import Do, GroundTruth

__all__ = [
    "ConceptStage",
    "Do",
    "ExpectedInfluencePolicy",
    "FromDistribution",
    "GradientPolicy",
    "GreedyStage",
    "GroundTruth",
    "Intervention",
    "InterventionPipeline",
    "LearnedPolicy",
    "OrderPolicy",
    "PositiveWeights",
    "RandomPolicy",
    "RemoveDirection",
    "ReplaceStage",
    "Resample",
    "SelectStage",
    "Selection",
    "Splice",
    "UncertaintyPolicy",
    "UniformPolicy",
    "intervene",
    "random_directions",
    "to_logits",
]
