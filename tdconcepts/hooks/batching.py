"""Rows: batch dims at a site, copies of a batch in one forward, and chunks that bound the rows in flight."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor, is_inference_mode_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from tdconcepts.errors import BadValue, import_extra
from tdconcepts.keys import NestedKey

__all__ = ["align", "check_chunk_size", "expand", "groups", "joined", "rows_of", "slices", "tracked"]

T = TypeVar("T")

# Elements of input in flight, times 64 on a GPU. What a network makes of them should stay in the cache of a core, and
# the memory near that of the caller's own batch: measured on convolutions, transformers and MLPs, see `rows_of`.
_FREE, _FEW, _LARGE, _PIECE = 3 * 2**14, 2**17, 2**20, 2**18
_FEWEST_ROWS, _MOST_ROWS, _PIECE_ROWS, _TIMES = 4, 2**14, 32, 4


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


def rows_of(
    td: TensorDictBase,
    chunk_size: int | None,
    keys: Iterable[NestedKey],
    inside: Iterable[Tensor] = (),
    module: nn.Module | None = None,
) -> int:
    """How many rows may be in flight: ``chunk_size``, or a number chosen from the size of a row.

    The choice keeps the input in flight below 192 KB of float32 on a CPU (64 times that on a GPU), or below 512 KB
    where that is no more than four times the caller's batch; so the memory is at most four times that of the batch
    alone, or small. It is never less than the batch, nor than four rows.

    Args:
        td: the caller's batch.
        chunk_size: the caller's choice.
        keys: the entries that a row is made of. An integer counts as the embedding or the output that a token becomes.
        inside: values at sites that are put into the module, which count where they are larger.
        module: where the size of an embedding is looked up.
    """
    if chunk_size is not None:
        return chunk_size
    size, scale = _elements(td, keys, inside, module)
    rows = max(1, td.numel())
    free, few = (scale * budget * rows // max(rows, size) for budget in (_FREE, _FEW))
    return max(rows, min(_MOST_ROWS, max(_FEWEST_ROWS, free, min(_TIMES * rows, few))))


def pieces_of(td: TensorDictBase, chunk_size: int | None, keys: Iterable[NestedKey], module: nn.Module) -> int | None:
    """How many rows of the caller's batch are explained at a time; None for all of them.

    Without a ``chunk_size`` that is all of them, but for a batch of more than 4 MB of float32 (256 MB on a GPU), which
    goes in pieces of about 1 MB and of 32 rows or more: not slower, and the memory is bounded. One index of the first
    batch dim is cut only by a ``chunk_size``, and never where a recurrent layer reads the dims after it as time. A
    batch norm in training mode sees the whole batch, but for a ``chunk_size``.
    """
    if not td.batch_size.numel() or not td.batch_dims or (chunk_size is not None and chunk_size >= td.numel()):
        return None
    whole = td.numel() // td.batch_size[0]
    if chunk_size is not None:
        recurrent = chunk_size < whole and any(isinstance(one, nn.RNNBase) for one in module.modules())
        return whole if recurrent else chunk_size
    if is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return None
    size, scale = _elements(td, keys)
    rows = td.numel()
    if size <= scale * _LARGE or rows <= _PIECE_ROWS:
        return None
    mixing = (isinstance(one, _BatchNorm) and one.training for one in module.modules())
    return None if any(mixing) else max(_PIECE_ROWS, scale * _PIECE * rows // size, whole)


def _elements(
    td: TensorDictBase, keys: Iterable[NestedKey], inside: Iterable[Tensor] = (), module: nn.Module | None = None
) -> tuple[int, int]:
    """How many numbers a batch has, and how many times more there may be where it is."""
    size, scale = 0, 1
    for key in keys:
        value = td.get(key)
        if isinstance(value, Tensor):
            tokens = module is not None and value.dtype in (torch.int64, torch.int32)
            size += value.numel() * (_width(module) if tokens else 1)
            scale = scale if value.is_cpu else 64
    return max(size, sum(value.numel() for value in inside)), scale


def _width(module: nn.Module | None) -> int:
    """How many numbers a token becomes: those of its embedding, or of a score for each word."""
    inner = list(module.modules()) if module is not None else []
    embeddings = [one.embedding_dim for one in inner if isinstance(one, nn.Embedding)]
    return max([*embeddings, *(one.out_features for one in inner if isinstance(one, nn.Linear))]) if embeddings else 1


def slices(td: TensorDictBase, rows: int | None) -> Iterator[tuple[Any, TensorDictBase]]:
    """The batch in pieces of at most ``rows`` rows, each with the index it was cut by; in order, see :func:`joined`.

    The batch dims stay, because a network may take them apart: a piece of ``[B, T]`` is ``[b, T]``, or ``[1, t]`` where
    one index of the first dim has too many rows. One piece, the TensorDict itself, where that is enough, or where it
    has no batch dim.

    Examples:
        >>> td = TensorDict(x=torch.zeros(2, 3), batch_size=[2, 3])
        >>> [list(part.batch_size) for _, part in slices(td, 2)]
        [[1, 2], [1, 1], [1, 2], [1, 1]]
    """
    if rows is None or not td.batch_dims or td.numel() <= rows:
        yield ..., td
        return
    steps = _steps(td.batch_size, rows)
    cuts = [[slice(i, i + step) for i in range(0, n, step)] for n, step in zip(td.batch_size, steps, strict=False)]
    for index in itertools.product(*cuts):
        yield index, td[index]


def joined(parts: Sequence[Tensor], batch: torch.Size, rows: int | None) -> Tensor:
    """What was found for each of the :func:`slices` of a batch, as one: ``[*batch, ...]``."""
    if len(parts) == 1:
        return parts[0]
    steps = _steps(batch, rows or 1)
    for dim, step in reversed(list(enumerate(steps))):
        n = -(-batch[dim] // step)
        parts = [torch.cat(list(parts[i : i + n]), dim) if n > 1 else parts[i] for i in range(0, len(parts), n)]
    return parts[0]


def _steps(batch: torch.Size, rows: int) -> list[int]:
    """For each batch dim that is cut how long its pieces are."""
    steps = []
    for dim in range(len(batch)):
        rest = batch[dim + 1 :].numel()
        steps.append(max(1, rows // max(1, rest)))
        if rest <= rows:
            break
    return steps


def tracked(pieces: Sequence[T], progress: bool | Callable[..., Iterable[T]], what: str) -> Iterable[T]:
    """``pieces``, shown by a progress bar while they are gone through; never in a worker process, nor for one piece.

    Args:
        pieces: what is gone through.
        progress: whether to show one (tqdm's), or what makes one: called as ``progress(pieces, desc=what)``.
        what: its title.
    """
    if not progress or len(pieces) < 2 or multiprocessing.parent_process() is not None or is_compiling():
        return pieces
    if callable(progress):
        return progress(pieces, desc=what)
    bar: Iterable[T] = import_extra("tqdm", "demo").tqdm(pieces, desc=what, leave=False)
    return bar


def groups(n: int, rows: int, batch: int) -> list[range]:
    """``range(n)`` in pieces whose copies of a batch of ``batch`` rows stay within ``rows``; a piece has one at least.

    Examples:
        >>> groups(5, rows=16, batch=8)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    step = max(1, rows // max(1, batch))
    return [range(start, min(n, start + step)) for start in range(0, n, step)]


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
