"""Stand-in for timm."""

from timm import models

__all__ = ["models"]
