"""Principal axes of entries, and whitening, over data that doesn't fit."""

from __future__ import annotations

from typing import ClassVar, Self

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.keys import NestedKey, as_key, as_keys, check_writable, join, key_text
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, batches, check_keys, features, finite

__all__ = ["PCA"]


class PCA(Learned, TensorDictModuleBase):
    r"""Entries along their principal axes: :math:`(x - \bar x) V`, over :math:`\sqrt{\lambda}` where whitened.

    ======  =================  =============
    reads   ``keys``           ``[*B, F]``
    writes  ``("pca", *key)``  ``[*B, k]``
    ======  =================  =============

    Fitted in one pass over a TensorDict or a stream of them, from covariances in float64.

    Args:
        keys: an entry, or a list of them.
        components: how many axes; a share in (0, 1) for the fewest that explain it; default: all.
        whiten: unit variance along each axis.
        out_key: the first name of what is written.

    Raises:
        BadValue: at the fit: fewer than two rows, more components than features, whitening an axis without variance.

    Source: Pearson 1901; the sign of an axis makes its largest element positive.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict(x=torch.tensor([[1.0, 2], [2, 4], [4, 8]]), batch_size=[3])
        >>> PCA("x", 1).fit(td)(td)["pca", "x"].shape
        torch.Size([3, 1])
    """

    learns: ClassVar[tuple[str, ...]] = ("mean", "axes", "variance")

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        components: int | float | None = None,
        whiten: bool = False,
        out_key: NestedKey = "pca",
    ) -> None:
        super().__init__()
        whole = type(components) is int and components >= 1
        if not (components is None or whole or (isinstance(components, float) and 0.0 < components < 1.0)):
            raise BadValue("not a number of axes", got=repr(components), needed="1 or more, a share in (0, 1), or None")
        self.in_keys = check_keys(as_keys(keys))
        self.out_keys = [as_key(join(out_key, key)) for key in self.in_keys]
        self._written = list(self.out_keys)  # select_out_keys changes those
        check_writable(self.out_keys, self.in_keys)
        self.components, self.whiten = components, whiten

    def fit(self, data: Data) -> Self:
        """Find the axes, in one pass; returns the stage."""
        parts: dict[NestedKey, Moments] = {}
        for td in batches(data):
            for key in self.in_keys:
                part = Moments.of(finite(features(td, key), key))
                parts[key] = merged([*([parts[key]] if key in parts else []), part])
        if not parts:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        for i, key in enumerate(self.in_keys):
            values, axes = parts[key].principal()
            k = self._count(values, key)
            if self.whiten and not bool((values[:k] > values[0] * 1e-12).all()):
                least = int((values > values[0] * 1e-12).sum())
                raise BadValue(f"{key_text(key)} has axes without variance", got=f"{k} axes", needed=f"{least} at most")
            self.keep(i, (parts[key].mean, axes[:, :k], values[:k]))
        return self

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the components."""
        check_td(tensordict)
        self.check_fitted()
        missing = [key for key in self.in_keys if tensordict.get(key) is None]
        if missing:
            raise missing_entries(missing, tensordict)
        found = {}
        for i, (key, out_key) in enumerate(zip(self.in_keys, self._written, strict=True)):
            x = tensordict.get(key)
            mean, axes, variance = (tensor.to(x) for tensor in self.kept(i))
            if x.shape[-1:] != mean.shape:
                got, needed = list(x.shape), f"[*B, {len(mean)}]"
                raise BadValue(f"{key_text(key)} has another width than was fitted", got=got, needed=needed)
            z = (x - mean) @ axes
            found[out_key] = z * variance.rsqrt() if self.whiten else z
        for out_key, value in found.items():
            tensordict.set(out_key, value)
        return tensordict

    def _count(self, values: Tensor, key: NestedKey) -> int:
        if isinstance(self.components, float):
            return int((values.cumsum(0) < self.components * values.sum() * (1 - 1e-12)).sum()) + 1
        if self.components is not None and self.components > len(values):
            got, needed = f"{self.components} components", f"{len(values)} at most"
            raise BadValue(f"{key_text(key)} has fewer features", got=got, needed=needed)
        return len(values) if self.components is None else self.components
