"""Rows: batch dims at a site, copies of a batch in one forward, and chunks that bound the rows in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor, is_inference_mode_enabled
from torch.compiler import is_compiling

from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey

__all__ = ["align", "check_chunk_size", "expand", "groups", "rows_of", "slices", "spread"]

_BUDGET = {"cpu": 2**18, "cuda": 2**24}  # input elements in flight: 1 MB of float32 on a CPU, 64 MB on a GPU
_MOST_ROWS = 2**14


def align(value: Tensor, batch: torch.Size, name: str) -> Tensor:
    """``value`` as ``[*batch, ...]``: as it is, or unflattened where a network has merged the batch dims into one.

    Merging is taken to be row-major, as ``flatten`` does and torchrl's networks do.

    Raises:
        BadValue: when ``value`` does not have the batch in front.

    Examples:
        >>> align(torch.zeros(6, 5), torch.Size([2, 3]), "conv").shape
        torch.Size([2, 3, 5])
    """
    if value.shape[: len(batch)] == batch:
        return value
    if len(batch) > 1 and value.ndim and value.shape[0] == batch.numel():
        return value.reshape(*batch, *value.shape[1:])
    raise BadValue(
        f"{name} does not have the batch in front",
        got=f"shape {list(value.shape)} for a TensorDict of batch size {list(batch)}",
        needed=f"{[*batch, '...']}, or the batch dims merged into one",
        fix="give the TensorDict the batch size that the model keeps apart, or choose another site",
    )


def check_chunk_size(chunk_size: int | None) -> int | None:
    """``chunk_size`` if it is one: a number of rows, 1 or more, or None.

    Raises:
        BadValue: otherwise.
    """
    if chunk_size is None or (type(chunk_size) is int and chunk_size >= 1):
        return chunk_size
    raise BadValue("not a chunk size", got=repr(chunk_size), needed="a number of rows >= 1, or None to choose one")


def rows_of(td: TensorDictBase, chunk_size: int | None, keys: Iterable[NestedKey]) -> int:
    """How many rows may be in flight: ``chunk_size``, or a number chosen from the size of a row of the entries
    ``keys``.

    The choice keeps the input in flight near 1 MB on a CPU (64 MB on a GPU) and never goes below the caller's own
    batch.
    """
    if chunk_size is not None:
        return chunk_size
    size, budget = 0, _BUDGET["cpu"]
    for key in keys:
        value = td.get(key)
        if isinstance(value, Tensor):
            size, budget = size + value.numel(), budget if value.is_cpu else _BUDGET["cuda"]
    rows = max(1, td.numel())
    return max(rows, min(_MOST_ROWS, budget * rows // max(rows, size)))


def slices(td: TensorDictBase, rows: int) -> Iterator[tuple[Any, TensorDictBase]]:
    """The batch in pieces of at most ``rows`` rows along its first dim, each with the index it was cut by.

    One piece, the TensorDict itself, where that is enough, or where it has no batch dim.
    """
    if not td.batch_dims or td.numel() <= rows:
        yield ..., td
        return
    step = max(1, rows // max(1, td.numel() // td.batch_size[0]))
    for start in range(0, td.batch_size[0], step):
        index = slice(start, start + step)
        yield index, td[index]


def groups(n: int, rows: int, batch: int) -> Iterator[range]:
    """``range(n)`` in pieces whose copies of a batch of ``batch`` rows stay within ``rows``; a piece has one at least.

    Examples:
        >>> list(groups(5, rows=16, batch=8))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    step = max(1, rows // max(1, batch))
    for start in range(0, n, step):
        yield range(start, min(n, start + step))


def expand(td: TensorDictBase, n: int, keys: Iterable[NestedKey]) -> TensorDict:
    """``n`` copies of the entries ``keys`` as one batch, copy after copy: ``[B, ...]`` becomes ``[n * B, ...]``.

    The number of dims stays, because many networks take exactly one batch dim; only ``[]`` becomes ``[n]``.

    Examples:
        >>> expand(TensorDict(x=torch.zeros(3, 4), batch_size=[3]), 2, ["x"])["x"].shape
        torch.Size([6, 4])
    """
    if n == 1:
        return dense(td, keys)
    batch = td.batch_size
    many = TensorDict({}, batch_size=_merged(batch, n), device=td.device)
    for key in keys:
        value = td.get(key)
        if isinstance(value, Tensor):
            many.set(key, spread(value.expand(n, *value.shape), n, batch))
        elif isinstance(value, NonTensorData):  # one for the whole batch
            many.set_non_tensor(key, value.data)
        elif value is not None:
            many.update(td.select(key).expand(n, *batch).reshape(*_merged(batch, n)))
    return many


def spread(value: Tensor, n: int, batch: torch.Size) -> Tensor:
    """``[n, *batch, ...]`` as the rows of :func:`expand`: ``[n * B, ...]``; back is ``unflatten(0, (n, -1))``."""
    if n == 1:
        return value.reshape(*batch, *value.shape[1 + len(batch) :])
    return value.reshape(*_merged(batch, n), *value.shape[1 + len(batch) :])


def gather(value: Tensor, n: int, batch: torch.Size) -> Tensor:
    """What :func:`spread` did, undone: ``[n, *batch, ...]``."""
    return value.reshape(n, *batch, *value.shape[max(1, len(batch)) if n > 1 else len(batch) :])


def _merged(batch: torch.Size, n: int) -> tuple[int, ...]:
    return (n * batch[0], *batch[1:]) if batch else (n,)


def usable(value: Any) -> Any:
    """``value``, or a copy where autograd can't use it: of an inference tensor, outside inference mode."""
    frozen = (
        not is_compiling() and isinstance(value, Tensor) and value.is_inference() and not is_inference_mode_enabled()
    )
    return value.clone() if frozen else value


def dense(td: TensorDictBase, keys: Iterable[NestedKey]) -> TensorDict:
    """A new TensorDict with the entries ``keys`` of ``td`` that are there, the same tensors under the same batch."""
    new = TensorDict({}, batch_size=td.batch_size, device=td.device)
    for key in keys:
        value = td.get(key)
        if value is not None:
            new.set(key, usable(value))
    return new
