"""What is known of the sign of a tensor because of the operation that made it, so that nobody has to look."""

from __future__ import annotations

import collections
import threading
import weakref
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

__all__ = ["known_positive", "note_sign", "tells_sign"]

_MAKE = frozenset({"relu", "relu6", "abs", "square", "sigmoid", "softmax", "exp"})
_KEEP = frozenset(  # average pooling in two dims is not among them: its divisor may be any number
    {f"{kind}_pool{n}d" for kind in ("max", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)}
    | {"dropout", "flatten", "reshape", "view", "mean", "sum"}
)
_KNOWN = _MAKE | _KEEP
_LAST = 8  # a layer reads what was made shortly before


class _Noted(threading.local):
    """On each thread the last tensors that are not negative, with the number of their version then."""

    def __init__(self) -> None:
        self.last: collections.deque[tuple[weakref.ref[Tensor], int]] = collections.deque(maxlen=_LAST)


_NOTED = _Noted()


def tells_sign(name: str) -> bool:
    """Whether the output of an operation has no negative numbers, or none where its input has none.

    Args:
        name: of the operation, as :func:`~tdconcepts.hooks.flows.operation_name` gives it.

    Examples:
        >>> tells_sign("relu"), tells_sign("linear")
        (True, False)
    """
    return name in _KNOWN


def note_sign(name: str, args: tuple[Any, ...], output: Any) -> Any:
    """An operation's output; it is remembered that no number in it is negative, if that is so whatever they are.

    Args:
        name: of the operation, as :func:`~tdconcepts.hooks.flows.operation_name` gives it.
        args: what it was called with.
        output: what it wrote.

    Examples:
        >>> import torch
        >>> x = torch.randn(4).relu()
        >>> x = note_sign("relu", (x,), x)
        >>> known_positive(x), known_positive(x - 1), known_positive(x.sub_(1))
        (True, False, False)
    """
    if name in _KNOWN and not is_compiling() and isinstance(output, Tensor) and not output.is_inference():
        if name in _MAKE or known_positive(args[0] if args else None):
            _NOTED.last.append((weakref.ref(output), output._version))
    return output


def known_positive(value: Any) -> bool:
    """Whether it is known that no number of a tensor is negative, and nothing was written to it since.

    Examples:
        >>> import torch
        >>> known_positive(torch.ones(1))  # it is not negative, but nobody has said so
        False
    """
    if not isinstance(value, Tensor):
        return False
    return any([made() is value and value._version == version for made, version in _NOTED.last])  # noqa: C419 - faster
