"""Models that speak in concepts."""

from __future__ import annotations

from tdconcepts.concepts.activation import ConceptActivation, harden
from tdconcepts.concepts.bottleneck import ConceptBottleneck
from tdconcepts.concepts.embedding import ConceptEmbedding
from tdconcepts.concepts.encoders import ConceptEncoder, ExogenousEncoder, StochasticEncoder
from tdconcepts.concepts.losses import CompletenessLoss, ConceptLoss, LeakageLoss, TotalLoss
from tdconcepts.concepts.memory import MemorySelector, SelectorZU
from tdconcepts.concepts.mixing import ConceptMixing, ConceptScore, vectors
from tdconcepts.concepts.predictors import HyperLinearPredictor, LinearPredictor, MixturePredictor
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.teaching import TeacherForcing, teach
from tdconcepts.concepts.toys import SEGMENTS, ToyData, digits_data, toy_data

__all__ = [
    "SEGMENTS",
    "CompletenessLoss",
    "ConceptActivation",
    "ConceptBottleneck",
    "ConceptEmbedding",
    "ConceptEncoder",
    "ConceptLoss",
    "ConceptMixing",
    "ConceptScore",
    "ConceptSpec",
    "ExogenousEncoder",
    "HyperLinearPredictor",
    "LeakageLoss",
    "LinearPredictor",
    "MemorySelector",
    "MixturePredictor",
    "SelectorZU",
    "StochasticEncoder",
    "TeacherForcing",
    "TotalLoss",
    "ToyData",
    "digits_data",
    "harden",
    "teach",
    "toy_data",
    "vectors",
]
