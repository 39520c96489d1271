"""Stand-in for torchvision.transforms."""

from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode"]
