"""Rows of features and labels, from a TensorDict or from a stream of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.batching import usable
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Data", "Reader", "Rows", "Stream", "batches", "features", "finite", "stacked"]

Data: TypeAlias = TensorDictBase | Iterable[TensorDictBase]
_CHUNK, _LEAST = 2**24, 1024  # elements, and rows, of float64 that are made of a TensorDict at once


class Rows(NamedTuple):
    """Some rows: for each entry ``[N, F]`` in float64, and the label ``[N, K]``; ``fold`` and ``start`` say which."""

    x: list[Tensor]
    y: Tensor
    start: int
    fold: Tensor | None = None

    def only(self, keep: Tensor) -> Rows:
        """The rows where ``keep`` is True."""
        return Rows([x[keep] for x in self.x], self.y[keep], self.start)


def batches(data: Data, again: str | None = None) -> Iterator[TensorDictBase]:
    """The TensorDicts of ``data``: itself, or each of a stream.

    Args:
        data: a TensorDict, or an iterable of them.
        again: why several passes are needed; then an iterator, which ends after one, is refused.

    Raises:
        BadType: for something else.
    """
    if isinstance(data, TensorDictBase):
        yield data
        return
    if not isinstance(data, Iterable):
        raise BadType("not data", got=type(data).__name__, needed="a TensorDict, or an iterable of TensorDicts")
    if again and isinstance(data, Iterator):
        raise BadType(
            f"{again} takes several passes over the data",
            got=f"a {type(data).__name__}, which ends after one",
            needed="a TensorDict, or an iterable that starts anew: a list, a DataLoader",
            fix="list(data)",
        )
    for td in data:
        if not isinstance(td, TensorDictBase):
            raise BadType("the stream holds something else", got=type(td).__name__, needed="TensorDicts")
        yield td


def features(td: TensorDictBase, key: NestedKey) -> Tensor:
    """The entry ``key`` as rows ``[N, F]``.

    Raises:
        BadKey: it is missing. BadType: it is not floating point. BadValue: its rows are not vectors.
    """
    value = td.get(key)
    if value is None:
        raise missing_entries([key], td)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = getattr(value, "dtype", type(value).__name__)
        raise BadType(f"the entry {key_text(key)} holds no features", got=kind, needed="floating point, [*B, F]")
    if value.ndim != td.batch_dims + 1:
        raise BadValue(
            f"the rows of {key_text(key)} are no vectors",
            got=f"shape {list(value.shape)} in a TensorDict of batch size {list(td.batch_size)}",
            needed="[*B, F]",
            fix="td.batch_size = ... where further dims are samples too (tokens); value.flatten(k) where they are "
            "features",
        )
    return usable(value).detach().reshape(-1, value.shape[-1])


def finite(x: Tensor, key: NestedKey) -> Tensor:
    """``x``, if it is finite.

    Raises:
        BadValue: with the entry, how many rows are not, and the first of them.
    """
    fine = torch.isfinite(x).all(-1)
    if not bool(fine.all()):
        wrong = (~fine).nonzero()
        raise BadValue(
            f"the entry {key_text(key)} is not finite",
            got=f"NaN or infinity in {len(wrong)} of {fine.numel()} rows, first in row {wrong[0].tolist()}",
            needed="finite numbers",
            fix="mask= leaves rows out, where a probe is fitted",
        )
    return x


class Reader:
    """Reads rows of several entries, with their label, from TensorDicts.

    Args:
        keys: entries ``[*B, F]``.
        label: an entry ``[*B]`` or ``[*B, K]``.
        mask: an entry ``[*B]`` or ``[*B, 1]``, True where a row counts.
    """

    def __init__(self, keys: list[NestedKey], label: NestedKey, mask: NestedKey | None = None) -> None:
        self.keys, self.label, self.mask = keys, label, None if mask is None else as_key(mask)
        self.vector = True  # whether the label is [*B, K]

    def labels(self, td: TensorDictBase) -> Tensor:
        """The label of the rows that count, ``[N, K]`` in float64."""
        value = td.get(self.label)
        if value is None:
            raise missing_entries([self.label], td)
        lead = td.batch_dims
        if not isinstance(value, Tensor) or value.ndim not in (lead, lead + 1):
            raise BadValue(
                f"the label {key_text(self.label)} has another shape",
                got=list(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                needed=f"{list(td.batch_size)}, or one more dim of K labels",
            )
        self.vector = value.ndim > lead
        label = usable(value).detach().reshape(td.numel(), -1 if value.numel() else value.shape[-1]).double()
        return finite(self.counted(label, td), self.label)

    def rows(self, td: TensorDictBase, start: int = 0) -> Rows:
        """The rows of ``td`` that count."""
        y = self.labels(td)
        x = [finite(self.counted(features(td, key), td), key).double() for key in self.keys]
        return Rows(x, y, start)

    def parts(self, td: TensorDictBase) -> Iterator[TensorDictBase]:
        """``td`` in pieces that are not too large."""
        if not td.batch_dims:
            raise BadValue("one row can't be fitted to", got="batch size []", needed="a batch of rows, [N]")
        width = max(1, sum(features(td, key).shape[-1] for key in self.keys))
        step = max(1, max(_LEAST, _CHUNK // width) // max(1, td.numel() // max(1, td.batch_size[0])))
        for first in range(0, td.batch_size[0], step):
            yield td if step >= td.batch_size[0] else td[first : first + step]

    def counted(self, value: Tensor, td: TensorDictBase) -> Tensor:
        """Of one value for each row, those that count."""
        if self.mask is None:
            return value
        mask = td.get(self.mask)
        if mask is None:
            raise missing_entries([self.mask], td)
        if mask.dtype != torch.bool or mask.numel() != td.numel():
            got = f"{mask.dtype} of shape {list(mask.shape)}"
            raise BadValue(f"the entry {key_text(self.mask)} is no mask", got=got, needed="bool, [*B] or [*B, 1]")
        return value[mask.reshape(-1)]


class Stream:
    """The rows of all the data, each time it is called; a TensorDict is read once.

    Args:
        reader: which entries.
        data: a TensorDict, or an iterable of them.
        again: why several passes are needed, if they are.
        check: what looks at the labels.
        change: what is done to the rows, such as dealing them into folds.
    """

    def __init__(
        self,
        reader: Reader,
        data: Data,
        again: str | None = None,
        check: Callable[[Tensor], None] | None = None,
        change: Callable[[Rows], Rows] | None = None,
    ) -> None:
        self.reader, self.data, self.again, self.check, self.change = reader, data, again, check, change
        self.in_memory = isinstance(data, TensorDictBase)
        self._kept: list[Rows] = []

    def changed(self, change: Callable[[Rows], Rows]) -> Stream:
        """The same rows, changed."""
        other = Stream(self.reader, self.data, self.again, self.check, change)
        other._kept = self._kept
        return other

    def __call__(self) -> Iterator[Rows]:
        for rows in self._kept if self._kept else self._read():
            yield rows if self.change is None else self.change(rows)

    def _read(self) -> Iterator[Rows]:
        start = 0
        kept = []
        for td in batches(self.data, self.again):
            for part in self.reader.parts(td):
                rows = self.reader.rows(part, start)
                start += len(rows.y)
                if self.check is not None:
                    self.check(rows.y)
                if self.in_memory:
                    kept.append(rows)
                yield rows
        if not start:
            raise BadValue("no rows", got="none that count", needed="one or more")
        self._kept.extend(kept)


def stacked(x: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Entries of one width as one stack: their positions, and ``[S, N, F]``."""
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(x):
        groups.setdefault(value.shape[-1], []).append(i)
    return [(group, torch.stack([x[i] for i in group])) for group in groups.values()]


def check_keys(keys: list[NestedKey]) -> list[NestedKey]:
    """``keys``, if there are some, each once.

    Raises:
        BadKey: otherwise.
    """
    if not keys or len(set(keys)) != len(keys):
        raise BadKey("no entries, or one twice", got=keys, needed="one entry or more, each once")
    return keys
