"""What all probes share: they are fitted to a stream of rows, and are then stages that write predictions."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple, Self

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.keys import NestedKey, as_key, as_keys, check_writable, join, key_text
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, Reader, Stream, check_keys, stacked

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
        self.keys = check_keys(as_keys(keys))
        self.label = as_key(label)
        self.in_keys = list(self.keys)
        self.out_keys = [as_key(join(out_key, key)) for key in self.keys]
        self._written = list(self.out_keys)  # select_out_keys changes those
        check_writable(self.out_keys, self.in_keys)

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
        self.check_fitted()
        if key is None and len(self.keys) == 1:
            return self._fitted(0)
        if key is None or as_key(key) not in self.keys:
            raise BadKey("which probe?", got=repr(key), needed=nearest(key, self.keys))
        return self._fitted(self.keys.index(as_key(key)))

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the prediction for each entry."""
        check_td(tensordict)
        self.check_fitted()
        missing = [key for key in self.in_keys if tensordict.get(key) is None]
        if missing:
            raise missing_entries(missing, tensordict)
        found = {}
        for i, out_key in enumerate(self._written):
            given = [tensordict.get(key) for key in self.sources(i)]
            one = self._fitted(i)
            for key, value, width in zip(self.sources(i), given, self.widths(one), strict=True):
                if value.shape[-1:] != (width,):
                    got, needed = list(value.shape), f"[*B, {width}]"
                    raise BadValue(f"{key_text(key)} has another width than was fitted", got=got, needed=needed)
            one = Fitted(*(tensor.to(given[0]) for tensor in one))
            found[out_key] = self.link(self.read(given, one))
        for out_key, value in found.items():
            tensordict.set(out_key, value)
        return tensordict

    # What a probe of several entries at once changes.

    passes: ClassVar[str | None] = None  # why it passes over the data several times
    _lead: ClassVar[int] = 1

    @property
    def keys_read(self) -> list[NestedKey]:
        """The entries that the rows are made of, in the order of :attr:`Rows.x`."""
        return self.keys

    def sources(self, i: int) -> list[NestedKey]:
        """The entries that the i-th probe reads."""
        return [self.keys[i]]

    def widths(self, one: Fitted) -> list[int]:
        """The width of each of the sources."""
        return [one.weight.shape[0]]

    def read(self, x: list[Tensor], one: Fitted) -> Tensor:
        """The outputs ``[*B]``, ``[*B, K]`` or ``[*B, K, C]``."""
        weight = one.weight.flatten(1) if one.weight.ndim > 1 else one.weight.unsqueeze(-1)
        z = (x[0] @ weight).reshape((*x[0].shape[:-1], *one.weight.shape[1:]))
        return z + one.bias

    def _fitted(self, i: int) -> Fitted:
        return Fitted(*self.kept(i))


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
