"""Models that speak in concepts."""

from __future__ import annotations

from tdconcepts.concepts.activation import ConceptActivation, harden
from tdconcepts.concepts.bottleneck import ConceptBottleneck
from tdconcepts.concepts.causal import CausalBottleneck, GraphBottleneck
from tdconcepts.concepts.cav import CavFit, ConceptActivationVectors
from tdconcepts.concepts.embedding import ConceptEmbedding
from tdconcepts.concepts.encoders import ConceptEncoder, ExogenousEncoder, StochasticEncoder
from tdconcepts.concepts.graphs import ConceptGraph, Dag, SetStage
from tdconcepts.concepts.losses import CompletenessLoss, ConceptLoss, LeakageLoss, TotalLoss
from tdconcepts.concepts.memory import MemorySelector, SelectorZU
from tdconcepts.concepts.mixing import ConceptMixing, ConceptScore, vectors
from tdconcepts.concepts.predictors import HyperLinearPredictor, LinearPredictor, MixturePredictor
from tdconcepts.concepts.priors import ConceptPrior
from tdconcepts.concepts.propagation import GraphPropagation, HyperEquations, LinearEquations, graph_layout
from tdconcepts.concepts.reasoner import ConceptMemoryReasoner
from tdconcepts.concepts.rules import LogicRules, RuleLikelihood, RuleSelector
from tdconcepts.concepts.solve import LinearFit, linear_fit
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.structure import LearnedGraph
from tdconcepts.concepts.teaching import LabelsAsDo, TeacherForcing, teach
from tdconcepts.concepts.toys import SEGMENTS, ToyData, digits_data, toy_data
from tdconcepts.concepts.whitening import ConceptWhitening

__all__ = [
    "SEGMENTS",
    "CausalBottleneck",
    "CavFit",
    "CompletenessLoss",
    "ConceptActivation",
    "ConceptActivationVectors",
    "ConceptBottleneck",
    "ConceptEmbedding",
    "ConceptEncoder",
    "ConceptGraph",
    "ConceptLoss",
    "ConceptMemoryReasoner",
    "ConceptMixing",
    "ConceptPrior",
    "ConceptScore",
    "ConceptSpec",
    "ConceptWhitening",
    "Dag",
    "ExogenousEncoder",
    "GraphBottleneck",
    "GraphPropagation",
    "HyperEquations",
    "HyperLinearPredictor",
    "LabelsAsDo",
    "LeakageLoss",
    "LearnedGraph",
    "LinearEquations",
    "LinearFit",
    "LinearPredictor",
    "LogicRules",
    "MemorySelector",
    "MixturePredictor",
    "RuleLikelihood",
    "RuleSelector",
    "SelectorZU",
    "SetStage",
    "StochasticEncoder",
    "TeacherForcing",
    "TotalLoss",
    "ToyData",
    "digits_data",
    "graph_layout",
    "harden",
    "linear_fit",
    "teach",
    "toy_data",
    "vectors",
]
