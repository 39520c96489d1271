"""Where the numbers of an image lie in memory: with the channels last, pooling of many small images is far faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from tdconcepts.hooks.pullback import Wrt

__all__ = ["Layout"]

T = TypeVar("T")

_PLANES = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)


class Layout:
    """How the rows that a module is run on lie in memory; no number depends on it.

    Images ``[..., C, H, W]`` of float32 on a CPU lie with their channels last where the module convolves them: torch's
    poolings then take an eighth of the time and its convolutions half of it or all of it. A module that can't have it,
    because it takes a ``view`` of what does not lie in order, gets rows that do, from its first such forward on.

    Args:
        module: what is run.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
        >>> images = Layout(net).of(torch.zeros(2, 3, 5, 5))
        >>> images.shape, images.stride()
        (torch.Size([2, 3, 5, 5]), (75, 1, 15, 3))
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [one for one in module.modules() if isinstance(one, _PLANES)]
        self.channels = {one.in_channels for one in layers if isinstance(one, nn.Conv2d) and len(layers) > 1}
        self.refused = False  # by the module, in a forward

    def takes(self, value: Tensor) -> bool:
        """Whether ``value`` is to lie with its channels last."""
        return (
            bool(self.channels and not self.refused)
            and value.ndim >= 3
            and value.shape[-3] in self.channels
            and value.dtype == torch.float32
            and value.is_cpu
            and not torch.compiler.is_compiling()
            and torch._C._functorch.maybe_current_level() is None
        )

    def of(self, value: Tensor) -> Tensor:
        """``value``, lying as it is to lie."""
        return self.back(self.turned(value)) if self.takes(value) else value

    @staticmethod
    def turned(value: Tensor) -> Tensor:
        """``[..., C, H, W]`` as ``[..., H, W, C]``, in order."""
        return value.movedim(-3, -1).contiguous()

    @staticmethod
    def back(value: Tensor) -> Tensor:
        """``[..., H, W, C]`` as ``[..., C, H, W]``; nothing is moved."""
        return value.movedim(-1, -3)

    def run(self, evaluate: Callable[[Mapping[Wrt, Tensor]], T], points: Mapping[Wrt, Tensor]) -> T:
        """``evaluate(points)``, for points in order where the module has to have them."""
        if self.refused:
            return evaluate(_in_order(points))
        before = torch.get_rng_state()
        try:
            return evaluate(points)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
        self.refused = True
        torch.set_rng_state(before)  # as if nothing had been tried
        return evaluate(_in_order(points))


def _in_order(points: Mapping[Wrt, Tensor]) -> dict[Wrt, Tensor]:
    return {key: value.contiguous() for key, value in points.items()}
