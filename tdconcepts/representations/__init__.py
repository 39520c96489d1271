"""What a representation holds: probes. A probe says what can be read from a latent, never that the model uses it."""

from tdconcepts.representations.probes import RidgeProbe, ridge_direction

__all__ = ["RidgeProbe", "ridge_direction"]
