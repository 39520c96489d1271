"""Stand-in for torchvision.transforms.functional: names only, a call says that it is one."""

import enum


class InterpolationMode(enum.Enum):
    """The modes that PnPXAI names when it is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


def _missing(*args, **kwargs):
    raise NotImplementedError("this is the tests' stand-in for torchvision: install torchvision to call it")


resize = gaussian_blur = invert = rgb_to_grayscale = _missing
