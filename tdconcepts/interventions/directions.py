"""Directions of a latent as interventions: the edits of the hook core, under the names that this room had them by."""

from tdconcepts.hooks import RemoveDirection, random_directions

__all__ = ["RemoveDirection", "random_directions"]
