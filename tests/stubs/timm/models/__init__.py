"""Stand-in for timm.models."""

from timm.models import vision_transformer

__all__ = ["vision_transformer"]
