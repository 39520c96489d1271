"""Explain by gradients."""

from tdconcepts.attribution.conductance import Conductance, InternalInfluence, NeuronConductance
from tdconcepts.attribution.gradient import Gradient, InputXGradient, Saliency
from tdconcepts.attribution.neuron import NeuronGradient
from tdconcepts.attribution.noise import NoiseTunnel, SmoothGrad, SmoothGradSquared, VarGrad
from tdconcepts.attribution.paths import IntegratedGradients
from tdconcepts.attribution.wrappers import Absolute, Normalised, Summed, TimesInput

__all__ = [
    "Absolute",
    "Conductance",
    "Gradient",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "NeuronConductance",
    "NeuronGradient",
    "NoiseTunnel",
    "Normalised",
    "Saliency",
    "SmoothGrad",
    "SmoothGradSquared",
    "Summed",
    "TimesInput",
    "VarGrad",
]
