"""Explain by gradients."""

from tdconcepts.attribution.gradient import Gradient, InputXGradient, Saliency
from tdconcepts.attribution.neuron import NeuronGradient
from tdconcepts.attribution.noise import SmoothGrad, VarGrad
from tdconcepts.attribution.paths import IntegratedGradients

__all__ = ["Gradient", "InputXGradient", "IntegratedGradients", "NeuronGradient", "Saliency", "SmoothGrad", "VarGrad"]
