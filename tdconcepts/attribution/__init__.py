"""Explain by gradients."""

from tdconcepts.attribution.cam import GradCAM
from tdconcepts.attribution.conductance import Conductance, InternalInfluence, NeuronConductance
from tdconcepts.attribution.deeplift import DeepLift, DeepLiftShap
from tdconcepts.attribution.expected import ExpectedGradients
from tdconcepts.attribution.fullgrad import FullGrad
from tdconcepts.attribution.gradient import Gradient, InputXGradient, Saliency
from tdconcepts.attribution.guided import Deconvolution, GuidedBackprop, GuidedGradCAM
from tdconcepts.attribution.layers import (
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronIntegratedGradients,
)
from tdconcepts.attribution.neuron import NeuronGradient
from tdconcepts.attribution.noise import NoiseTunnel, SmoothGrad, SmoothGradSquared, VarGrad
from tdconcepts.attribution.paths import IntegratedGradients
from tdconcepts.attribution.rollout import AttentionRollout, TransformerAttribution
from tdconcepts.attribution.wrappers import Absolute, Normalised, Summed, TimesInput

__all__ = [
    "Absolute",
    "AttentionRollout",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "ExpectedGradients",
    "FullGrad",
    "GradCAM",
    "Gradient",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerGradCam",
    "LayerIntegratedGradients",
    "NeuronConductance",
    "NeuronGradient",
    "NeuronIntegratedGradients",
    "NoiseTunnel",
    "Normalised",
    "Saliency",
    "SmoothGrad",
    "SmoothGradSquared",
    "Summed",
    "TimesInput",
    "TransformerAttribution",
    "VarGrad",
]
