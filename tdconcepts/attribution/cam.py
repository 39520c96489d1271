"""Grad-CAM: which places of a layer speak for a target, all channels together."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Options, Site, Target, dispatch_rows
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.keys import NestedKey
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["GradCAM"]

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
        size: resize the map to this many rows and columns; the size of an image, for instance.
        mode: how to resize: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"area"``.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: a dim that the layer does not have, a size for something else than images, or no such mode.

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
        size: tuple[int, int] | None = None,
        mode: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear",
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise BadValue("no such way to resize", got=f"mode={mode!r}", needed=f"one of {list(_MODES)}")
        if size is not None and not (len(size) == 2 and all(type(n) is int and n >= 1 for n in size)):
            raise BadValue("not the size of an image", got=f"size={size!r}", needed="two ints >= 1")
        self._explaining = Explaining(module, target, Site.parse(site), options)
        self.module, self.channels, self.relu, self.size, self.mode = module, channels, bool(relu), size, mode
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, lead = self._explaining, td.batch_dims
        pulled = this.pullback(td, create_graph=this.create_graph, snapshot=True, held=held, width=this.width(td))
        (value,), (gradient,) = pulled.points, pulled.gradients
        row = value.ndim - lead
        if not -row <= self.channels < row:
            got = f"channels={self.channels} in rows of shape {list(value.shape[lead:])}"
            raise BadValue("the layer has no such dim", got=got, needed="the dim of the channels in a row")
        if pulled.values.ndim > lead:
            lead, value = lead + 1, value.unsqueeze(lead)
        channels = lead + self.channels % row
        places = [dim for dim in range(lead, lead + row) if dim != channels]
        weights = gradient.mean(places, keepdim=True) if places else gradient
        found = (weights * value).sum(channels, keepdim=True)
        found = found.relu() if self.relu else found
        if self.size is not None:
            found = self._resized(found.squeeze(channels), lead)
        return {this.attribution_keys[0]: found} | this.written(pulled.outputs)

    def _resized(self, found: Tensor, lead: int) -> Tensor:
        if found.ndim - lead != 2:
            got, needed = f"rows of shape {list(found.shape[lead:])}", "maps of two dims"
            raise BadValue("only maps can be resized", got=got, needed=needed, fix="size=None")
        assert self.size is not None
        if not found.numel():
            return found.new_zeros(*found.shape[:lead], *self.size)
        smooth = {"align_corners": False} if self.mode in ("bilinear", "bicubic") else {}
        flat = found.reshape(-1, 1, *found.shape[lead:])
        large = torch.nn.functional.interpolate(flat, size=self.size, mode=self.mode, **smooth)
        return large.reshape(*found.shape[:lead], *self.size)
