"""Explain by forward passes."""

from tdconcepts.perturbation.ablation import FeatureAblation, Occlusion
from tdconcepts.perturbation.baselines import Blur, Mean
from tdconcepts.perturbation.masks import Along, Grid
from tdconcepts.perturbation.permutation import FeaturePermutation
from tdconcepts.perturbation.perturbing import Perturbed
from tdconcepts.perturbation.shapley import ShapleyExact, ShapleySampling
from tdconcepts.perturbation.surrogate import Fitted, KernelShap, Lime

__all__ = [
    "Along",
    "Blur",
    "FeatureAblation",
    "FeaturePermutation",
    "Fitted",
    "Grid",
    "KernelShap",
    "Lime",
    "Mean",
    "Occlusion",
    "Perturbed",
    "ShapleyExact",
    "ShapleySampling",
]
