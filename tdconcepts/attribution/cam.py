"""Grad-CAM: which places of a layer speak for a target, all channels together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Options, Site, Target, dispatch_rows
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.keys import NestedKey
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["GradCAM", "resized", "weighted"]

_MODES = ("nearest", "bilinear", "bicubic", "area")


class GradCAM(Replaceable, TensorDictModuleBase):
    r"""The activation of a layer, weighted by each channel's mean gradient: :math:`\mathrm{relu}(\sum_c \bar g_c A_c)`.

    | reads | writes |
    |---|---|
    | what the target depends on | ``("attribution", site)`` ``[*B, 1, H, W]``, or ``[*B, *size]`` for a size |

    The dim of the channels stays, with size 1. For tokens ``[T, C]`` say ``channels=-1``; then it is ``[*B, T, 1]``.
    With several targets one more dim of size T follows the batch.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        site: the layer, as a Site or its text.
        channels: the dim of the channels in a row of the layer: 0 for images and series, -1 for tokens.
        relu: keep only what speaks for the target, as in the paper (Captum's default is False).
        size: resize the map: to the rows and columns of an image, the length of a series (or of tokens), the three
            sides of a volume.
        mode: how to resize: ``"nearest"``, ``"bilinear"`` (linear in each dim), ``"bicubic"`` (images only) or
            ``"area"``.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: a dim that the layer does not have, a size of another number of dims than the map, or no such mode.

    Source: Selvaraju et al., *Grad-CAM: visual explanations from deep networks*, 2017 (equations 1 and 2).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2))
        >>> explain = GradCAM(TensorDictModule(net, ["image"], ["y"]), Target("y", 0), "0", size=(8, 8))
        >>> explain(TensorDict(image=torch.randn(4, 3, 8, 8), batch_size=[4]))["attribution", "0"].shape
        torch.Size([4, 8, 8])
    """

    tunables = (Tunable("mode", choices=_MODES),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        site: Site | str,
        *,
        channels: int = 0,
        relu: bool = True,
        size: tuple[int, ...] | None = None,
        mode: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear",
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise BadValue("no such way to resize", got=f"mode={mode!r}", needed=f"one of {list(_MODES)}")
        if size is not None and not (1 <= len(size) <= 3 and all(type(n) is int and n >= 1 for n in size)):
            raise BadValue("not the size of a map", got=f"size={size!r}", needed="one to three ints >= 1")
        self._explaining = Explaining(module, target, Site.parse(site), options)
        self.module, self.channels, self.relu, self.size, self.mode = module, channels, bool(relu), size, mode
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this = self._explaining
        found, lead, channels, outputs = weighted(this, td, held, self.channels)
        found = found.relu() if self.relu else found
        if self.size is not None:
            found = resized(found.squeeze(channels), lead, self.size, self.mode)
        return {this.attribution_keys[0]: found} | this.written(outputs)


def weighted(
    this: Explaining, td: TensorDictBase, held: Tensor | None, channels: int
) -> tuple[Tensor, int, int, TensorDictBase]:
    """The sum of a layer's channels, each weighted by its mean gradient; how many dims are in front of a map, where the
    channels were, and what the module wrote.
    """
    lead = td.batch_dims
    pulled = this.pullback(td, create_graph=this.create_graph, snapshot=True, held=held, width=this.width(td))
    (value,), (gradient,) = pulled.points, pulled.gradients
    row = value.ndim - lead
    if not -row <= channels < row:
        got = f"channels={channels} in rows of shape {list(value.shape[lead:])}"
        raise BadValue("the layer has no such dim", got=got, needed="the dim of the channels in a row")
    if pulled.values.ndim > lead:
        lead, value = lead + 1, value.unsqueeze(lead)
    at = lead + channels % row
    places = [dim for dim in range(lead, lead + row) if dim != at]
    weights = gradient.mean(places, keepdim=True) if places else gradient
    return (weights * value).sum(at, keepdim=True), lead, at, pulled.outputs


def resized(found: Tensor, lead: int, size: Sequence[int], mode: str) -> Tensor:
    """Maps ``[*lead, *places]`` in another size.

    Raises:
        BadValue: a size of another number of dims than the map.
    """
    here = found.shape[lead:]
    if len(here) != len(size) or not 1 <= len(here) <= 3 or (mode == "bicubic" and len(here) != 2):
        got, needed = f"maps of shape {list(here)}, size={tuple(size)}, mode={mode!r}", "as many dims in both"
        raise BadValue("a map can't be resized so", got=got, needed=needed, fix='size=None; mode="nearest"')
    if not found.numel():
        return found.new_zeros(*found.shape[:lead], *size)
    smooth = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    mode = ("linear", "bilinear", "trilinear")[len(here) - 1] if mode == "bilinear" else mode
    large = torch.nn.functional.interpolate(found.reshape(-1, 1, *here), size=tuple(size), mode=mode, **smooth)
    return large.reshape(*found.shape[:lead], *size)
