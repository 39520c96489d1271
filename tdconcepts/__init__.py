"""TensorDict-native hooks for interpretability: explain, intervene, experiment."""

from tdconcepts.attribution import (
    Gradient,
    InputXGradient,
    IntegratedGradients,
    NeuronGradient,
    Saliency,
    SmoothGrad,
    VarGrad,
)
from tdconcepts.hooks import Ablate, Add, Capture, Patch, Replace, Scale, Site, Target, anchor, capture, patch

__all__ = [
    "Ablate",
    "Add",
    "Capture",
    "Gradient",
    "InputXGradient",
    "IntegratedGradients",
    "NeuronGradient",
    "Patch",
    "Replace",
    "Saliency",
    "Scale",
    "Site",
    "SmoothGrad",
    "Target",
    "VarGrad",
    "anchor",
    "capture",
    "patch",
]
