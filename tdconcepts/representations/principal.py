"""Principal axes of entries, and whitening, over data that doesn't fit."""

from __future__ import annotations

from typing import ClassVar, Self

from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, key_text
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, batches, features, finite

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
        self.about(keys, out_key)
        self.components, self.whiten = components, whiten

    def fit(self, data: Data) -> Self:
        """Find the axes, in one pass; returns the stage."""
        parts: dict[NestedKey, Moments] = {}
        for td in batches(data):
            for key in self.keys:
                part = Moments.of(finite(features(td, key), key))
                parts[key] = merged([*([parts[key]] if key in parts else []), part])
        if not parts:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        for i, key in enumerate(self.keys):
            values, axes = parts[key].principal()
            k = self._count(values, key)
            if self.whiten and not bool((values[:k] > values[0] * 1e-12).all()):
                least = int((values > values[0] * 1e-12).sum())
                raise BadValue(f"{key_text(key)} has axes without variance", got=f"{k} axes", needed=f"{least} at most")
            self.keep(i, (parts[key].mean, axes[:, :k], values[:k]))
        return self

    def readout(self, x: list[Tensor], kept: list[Tensor]) -> Tensor:
        """The components."""
        mean, axes, variance = kept
        z = (x[0] - mean) @ axes
        return z * variance.rsqrt() if self.whiten else z

    def _count(self, values: Tensor, key: NestedKey) -> int:
        if isinstance(self.components, float):
            return int((values.cumsum(0) < self.components * values.sum() * (1 - 1e-12)).sum()) + 1
        if self.components is not None and self.components > len(values):
            got, needed = f"{self.components} components", f"{len(values)} at most"
            raise BadValue(f"{key_text(key)} has fewer features", got=got, needed=needed)
        return len(values) if self.components is None else self.components
