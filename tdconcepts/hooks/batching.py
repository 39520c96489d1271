"""Rows: batch dims at a site, copies of a batch in one forward, and chunks that bound the rows in flight."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor, is_inference_mode_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules.conv import _ConvNd

from tdconcepts.errors import BadValue, import_extra
from tdconcepts.hooks.calling import check_dense
from tdconcepts.keys import NestedKey

__all__ = ["align", "check_chunk_size", "expand", "groups", "joined", "rows_of", "slices", "tracked"]

T = TypeVar("T")

# Numbers of the widest layer in flight, times 64 on a GPU: for copies of rows; and more than these go in pieces.
_COPIES, _LARGE = 2**18, 2**21
_FEWEST_ROWS, _MOST_ROWS, _PIECE_ROWS = 4, 2**14, 8
_KEPT = 3  # copies of a batch whose layers are all kept, so that all is within four times that of the batch; but for
_SMALL = 2**13  # rows with fewer numbers in their widest layer, which may take half a MB there
_POOLS = {1: (nn.MaxPool1d, nn.AvgPool1d), 2: (nn.MaxPool2d, nn.AvgPool2d), 3: (nn.MaxPool3d, nn.AvgPool3d)}


class Widths(NamedTuple):
    """What a network makes of a row, see :func:`widths`: numbers for each token, for each number of an image, and for
    ``features_in`` numbers of anything else.
    """

    token: int = 1
    image: float = 1.0
    features_in: int = 1
    features: int = 1


def align(value: Tensor, batch: torch.Size, name: str) -> Tensor:
    """``value`` as ``[*batch, ...]``: as it is, or unflattened where a network has merged the batch dims into one.

    Merging is taken to be row-major, as ``flatten`` does and torchrl's networks do.

    Raises:
        BadValue: when ``value`` does not have the batch in front. BadType: for a nested tensor.

    Examples:
        >>> align(torch.zeros(6, 5), torch.Size([2, 3]), "conv").shape
        torch.Size([2, 3, 5])
    """
    check_dense(value, name)
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


def widths(module: nn.Module) -> Widths:
    """How much larger than a row the output of the widest layer is, as far as its layers tell without being run.

    Examples:
        >>> widths(nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 48, 3))).image
        5.333333333333333
    """
    token, image, size, channels, features_in, features = 1, 1.0, 1.0, 0, 0, 1
    layer: Any
    for layer in module.modules():  # in the order of their registration, which mostly is that of execution
        if isinstance(layer, nn.Embedding):
            token = max(token, layer.embedding_dim)
        elif isinstance(layer, _ConvNd):
            step = math.prod(layer.stride)
            size = size * step if layer.transposed else size / step
            channels = channels or layer.in_channels
            image = max(image, layer.out_channels * size / channels)
        elif pool := next((dims for dims, kinds in _POOLS.items() if isinstance(layer, kinds)), 0):
            size /= math.prod(layer.stride) if isinstance(layer.stride, tuple) else layer.stride**pool
        elif isinstance(layer, nn.Linear):
            features_in, features = features_in or layer.in_features, max(features, layer.out_features)
    token = max(token, features) if token > 1 else 1  # a score for each word, say
    return Widths(token, image, *((1, 1) if channels or not features_in else (features_in, features)))


def rows_of(
    td: TensorDictBase,
    chunk_size: int | None,
    keys: Iterable[NestedKey],
    inside: Iterable[Tensor] = (),
    wide: Widths = Widths(),  # noqa: B008 (it is a constant)
    kept: int = 0,
) -> int:
    """How many rows may be in flight: ``chunk_size``, or a number chosen from the size of a row.

    The choice keeps the output of the widest layer near 1 MB of float32 on a CPU (64 MB on a GPU), but for the batch
    itself, or four rows: so the memory is at most four times that of the batch alone, or small. What is computed of 1
    MB still fits into the cache of a core, and is not given back to the system after each call, which takes longer than
    the network itself (on a CPU a convolution of 32 rows took 4.8 ms, of 16 rows 0.9 ms).

    Args:
        td: the caller's batch.
        chunk_size: the caller's choice.
        keys: the entries that a row is made of.
        inside: values at sites that are put into the module, which count where they are larger.
        wide: what the network makes of a row.
        kept: for how many targets all layers of these rows are kept, 1 or more (2 for any number of them), 0 for none.
            For one a choice is at most three copies of the batch, so that everything stays within four times the memory
            of one pass through it (and a copy that torch makes of a layer's weights for two rows or more). Rows whose
            widest layer is below 32 kB may make half a MB there, which is some 2 MB in all: three of them at a time
            would take twenty times as long, and save nothing that counts. So may any rows for several targets.
            (Three images of 32x32 pixels at a time take twice as long as eight: that is ``chunk_size=8``.)
    """
    if chunk_size is not None:
        return chunk_size
    size, scale = _elements(td, keys, wide)
    size = max(size, *(value.numel() for value in inside), 1)
    rows = max(1, td.numel())
    most = min(_MOST_ROWS, max(_FEWEST_ROWS, scale * _COPIES * rows // max(rows, size)))
    if kept and scale == 1:
        most = min(most, max(_KEPT * rows, most // 2 if kept > 1 or size < _SMALL * rows else 0))
    return max(rows, most)


def pieces_of(
    td: TensorDictBase, chunk_size: int | None, keys: Iterable[NestedKey], module: nn.Module, wide: Widths
) -> int | None:
    """How many rows of the caller's batch are explained at a time; None for all of them.

    Without a ``chunk_size`` that is all of them, but for a batch for which the output of the widest layer takes more
    than 8 MB of float32 (512 MB on a GPU), which goes in pieces of 1 MB and of 8 rows or more: not slower, and the
    memory is bounded. One index of the first batch dim is cut only by a ``chunk_size``, and never where a recurrent
    layer reads the dims after it as time. Who cuts has refused layers that mix rows: see ``check_norms``.
    """
    batch = td.batch_size
    rows = batch.numel()
    if not rows or not batch or (chunk_size is not None and chunk_size >= rows):
        return None
    whole = rows // batch[0]
    if chunk_size is not None:
        recurrent = chunk_size < whole and any(isinstance(one, nn.RNNBase) for one in module.modules())
        return whole if recurrent else chunk_size
    if is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return None
    if rows <= _PIECE_ROWS:
        return None
    size, scale = _elements(td, keys, wide)
    if size <= scale * _LARGE:
        return None
    return max(_PIECE_ROWS, scale * _COPIES * rows // size, whole)


def _elements(td: TensorDictBase, keys: Iterable[NestedKey], wide: Widths) -> tuple[int, int]:
    """How many numbers the widest layer makes of a batch, and how many times more there may be where it is."""
    tokens, numbers, scale = 0, 0, 1
    for key in keys:
        value = td.get(key)
        if isinstance(value, Tensor):
            if value.dtype in (torch.int64, torch.int32):
                tokens += value.numel()
            else:
                numbers += value.numel()
            scale = scale if value.is_cpu else 64
    dense = max(int(numbers * wide.image), numbers // wide.features_in * wide.features)
    return max(dense, tokens * wide.token, numbers + tokens), scale


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


def dense(td: TensorDictBase, keys: Iterable[NestedKey], given: Mapping[Any, Tensor] | None = None) -> TensorDict:
    """A new TensorDict with the entries ``keys`` of ``td`` that are there, the same tensors under the same batch.

    Args:
        td: where they are.
        keys: their keys.
        given: entries to put in, among them some in the place of those.
    """
    found: dict[Any, Any] = {}
    batch, device, whole = td.batch_size, td.device, is_compiling()
    for key in keys:
        if (given is None or key not in given) and (value := td.get(key)) is not None:
            found[key] = value = usable(value)
            whole = whole or type(value) is not Tensor or type(key) is not str
    for key, value in (given or {}).items():
        found[key] = value
        fits = (
            type(value) is Tensor and value.shape[: len(batch)] == batch and (device is None or value.device == device)
        )
        whole = whole or type(key) is not str or not fits
    if not whole:  # nothing that tensordict would have to check or to change
        plain: TensorDict = TensorDict._new_unsafe(source=found, batch_size=batch, device=device)
        return plain
    new = TensorDict({}, batch_size=batch, device=device)
    for key, value in found.items():
        new.set(key, value)
    return new
