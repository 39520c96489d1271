"""TensorDict-native hooks for interpretability: explain, intervene, experiment."""

from tdconcepts import concepts, rl
from tdconcepts.attribution import (
    Gradient,
    InputXGradient,
    IntegratedGradients,
    NeuronGradient,
    Saliency,
    SmoothGrad,
    VarGrad,
)
from tdconcepts.concepts import ConceptBottleneck, MemorySelector, SelectorZU
from tdconcepts.errors import TdConceptsError
from tdconcepts.hooks import Ablate, Add, Capture, Patch, Replace, Scale, Site, Target, anchor, capture, patch
from tdconcepts.interventions import (
    Do,
    GradientPolicy,
    GroundTruth,
    InterventionPipeline,
    RandomPolicy,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Add",
    "Capture",
    "ConceptBottleneck",
    "Do",
    "Gradient",
    "GradientPolicy",
    "GroundTruth",
    "InputXGradient",
    "IntegratedGradients",
    "InterventionPipeline",
    "MemorySelector",
    "NeuronGradient",
    "Patch",
    "RandomPolicy",
    "Replace",
    "Saliency",
    "Scale",
    "SelectorZU",
    "Site",
    "SmoothGrad",
    "Target",
    "TdConceptsError",
    "UncertaintyPolicy",
    "UniformPolicy",
    "VarGrad",
    "anchor",
    "capture",
    "concepts",
    "intervene",
    "patch",
    "rl",
]
