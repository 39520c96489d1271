"""TensorDict-native hooks for interpretability: explain, intervene, experiment."""

from tdconcepts.hooks import Ablate, Add, Capture, Patch, Replace, Scale, Site, Target, anchor, capture, patch

__all__ = ["Ablate", "Add", "Capture", "Patch", "Replace", "Scale", "Site", "Target", "anchor", "capture", "patch"]
