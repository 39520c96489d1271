"""What all probes share: they are fitted to a stream of rows, and are then stages that write predictions."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple, Self

from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, as_key
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, Reader, Stream, stacked

__all__ = ["Fitted", "Probe", "moments_of"]


class Fitted(NamedTuple):
    """One probe of one entry: ``z = x @ weight + bias``, and the mean of ``x`` over the rows it was fitted to."""

    weight: Tensor
    bias: Tensor
    mean: Tensor


class Probe(Learned, TensorDictModuleBase):
    """A readout of entries: fitted once, then a stage. The base of the probes; it has no method of its own.

    ======  =======================  ==============================================
    reads   ``keys``                 ``[*B, F]`` each
    writes  ``("probe", *key)``      the prediction, in the shape of the label
    ======  =======================  ==============================================

    A subclass says how it is solved (:meth:`solve`) and what its outputs mean (:meth:`link`). The parameters are
    buffers: ``state_dict`` has them, and an unfitted probe loads them.
    """

    classifies: ClassVar[bool] = False
    learns: ClassVar[tuple[str, ...]] = Fitted._fields

    def __init__(self, keys: NestedKey | list[NestedKey], label: NestedKey, out_key: NestedKey = "probe") -> None:
        super().__init__()
        self.about(keys, out_key)
        self.label = as_key(label)

    @abstractmethod
    def solve(self, stream: Stream, folds: int = 0) -> list[list[Fitted]]:
        """The probes of each training set, one for each entry: all rows, or, with folds, all but those of a fold."""

    def link(self, z: Tensor) -> Tensor:
        """From a probe's outputs to the prediction."""
        return z

    def check_labels(self, y: Tensor) -> None:
        """Raise for labels that this probe can't learn."""

    def fit(self, data: Data, *, mask: NestedKey | None = None) -> Self:
        """Fit to all rows of the data, and return the probe.

        Args:
            data: a TensorDict ``[*B]``, or an iterable of them for data that doesn't fit.
            mask: an entry ``[*B]``, True where a row counts (ragged trajectories).

        Raises:
            BadKey, BadType, BadValue: entries that are missing, not finite, of other shapes, or labels that can't be
                learned.
        """
        reader = Reader(self.keys_read, self.label, mask)
        [found] = self.solve(Stream(reader, data, self.passes, self.check_labels))
        for i, one in enumerate(found):
            squeeze = not reader.vector
            self.keep(i, Fitted(_without(one.weight, squeeze, self._lead), _without(one.bias, squeeze, 0), one.mean))
        return self

    def direction(self, key: NestedKey | None = None) -> Tensor:
        """The weight of an entry at length one, ``[F]`` (``[K, F]`` for K labels): what a steering vector takes.

        Raises:
            BadValue: the probe is not fitted, or found nothing (a weight of zeros).
        """
        weight = self.of(key).weight
        weight = weight.unsqueeze(0) if weight.ndim == 1 else weight.movedim(0, -1)
        length = weight.norm(dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise BadValue("the probe found no direction", got="a weight of zeros", needed="labels that vary with it")
        found = weight / length
        return found[0] if self.of(key).weight.ndim == 1 else found

    def of(self, key: NestedKey | None = None) -> Fitted:
        """The parameters of one entry's probe; without a key of the only one."""
        return Fitted(*self.kept(self.place(key)))

    def readout(self, x: list[Tensor], kept: list[Tensor]) -> Tensor:
        """The prediction."""
        return self.link(self.read(x, Fitted(*kept)))

    # What a probe of several entries at once changes.

    passes: ClassVar[str | None] = None  # why it passes over the data several times
    _lead: ClassVar[int] = 1

    @property
    def keys_read(self) -> list[NestedKey]:
        """The entries that the rows are made of, in the order of :attr:`Rows.x`."""
        return self.keys

    def read(self, x: list[Tensor], one: Fitted) -> Tensor:
        """The outputs ``[*B]``, ``[*B, K]`` or ``[*B, K, C]``."""
        weight = one.weight.flatten(1) if one.weight.ndim > 1 else one.weight.unsqueeze(-1)
        z = (x[0] @ weight).reshape((*x[0].shape[:-1], *one.weight.shape[1:]))
        return z + one.bias


def moments_of(stream: Stream, folds: int = 0) -> list[tuple[list[int], list[Moments]]]:
    """One pass: for each stack of entries its moments with the label, of all rows or of all but those of each fold."""
    held: list[dict[int, list[Moments]]] = []
    groups: list[list[int]] = []
    for rows in stream():
        stacks = stacked(rows.x)
        groups, held = [group for group, _ in stacks], held or [{} for _ in stacks]
        for parts, (_, x) in zip(held, stacks, strict=True):
            for fold in range(max(1, folds)):
                chosen = rows.fold == fold if folds else None
                part = Moments.of(x, rows.y) if chosen is None else Moments.of(x[:, chosen], rows.y[chosen])
                parts[fold] = [merged([*parts.get(fold, []), part])]
    found = []
    for group, parts in zip(groups, held, strict=True):
        if folds:
            sets = [merged(m for f, [m] in parts.items() if f != fold) for fold in range(folds)]
        else:
            sets = parts[0]
        found.append((group, sets))
    return found


def _without(value: Tensor, squeeze: bool, dim: int) -> Tensor:
    return value.squeeze(dim) if squeeze else value
