"""Values that a formula keeps without a copy, until an operation in place is about to overwrite them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by, depends, is_inplace, tensors, untransformed

__all__ = ["Kept", "Scale", "overwrites", "spare"]

_References = dict[int, list[Any]]


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_storage: _References = {}


_HELD = _Held()


class Kept:
    """A value as it is now: whoever sees an operation that will overwrite it calls :func:`spare` first.

    Args:
        value: a tensor, of which no graph is kept.

    Examples:
        >>> import torch
        >>> x = torch.ones(2)
        >>> kept = Kept(x)
        >>> spare(x)
        >>> _ = x.zero_()
        >>> kept.get()
        tensor([1., 1.])
    """

    __slots__ = ("__weakref__", "value", "version")

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()  # which shares the count of its versions
        self.version = value._version
        storage, held = value.untyped_storage().data_ptr(), _HELD.by_storage
        held.setdefault(storage, []).append(weakref.ref(self, functools.partial(_forget, held, storage)))

    @staticmethod
    def can(value: Tensor) -> bool:
        """Whether a value can be kept like this: no transform is at work, and its versions are counted."""
        return untransformed(value) and not value.is_inference()

    def get(self) -> Tensor:
        """The value.

        Raises:
            BadValue: where it was overwritten out of sight.
        """
        if self.value._version != self.version:
            raise BadValue(
                "an activation that a rule needs was overwritten where no rule could see it",
                got=f"shape {list(self.value.shape)}",
                needed="operations in place that are torch functions, with gradients enabled",
                fix="the same operation, not in place",
            )
        return self.value

    def copy(self) -> None:
        """Go on with a copy, if it is not too late."""
        if self.value._version == self.version:
            self.value = self.value.clone()
            self.version = self.value._version


class Scale:
    """Each flow times the value that it belongs to: from ratios to relevance.

    Args:
        how: how the rules of one binding are carried out.
        seen: whether operations in place are seen while the value is used.
    """

    def __init__(self, how: Any, seen: bool) -> None:
        self.safe, self.keeps = how.safe, how.keeps and seen

    def __call__(self, value: Any) -> Any:
        if not depends(value):
            return value
        can = not self.safe and self.keeps and Kept.can(value)
        factor = value if self.safe else Kept(value) if can else value.clone()
        return backward_by(_times, value, [value], factor, keep=False)


def _times(flow: Tensor, factor: Tensor) -> tuple[Tensor]:
    return (flow * factor,)


def _forget(held: _References, storage: int, reference: Any) -> None:
    references = held.get(storage, [])
    if reference in references:
        references.remove(reference)
    if not references:
        held.pop(storage, None)


def overwrites(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes over its first argument, or ``out``.

    Examples:
        >>> import torch
        >>> overwrites(torch.Tensor.__setitem__, {}), overwrites(torch.relu, {}), overwrites(torch.dropout_, {})
        (True, False, True)
    """
    if kwargs and (kwargs.get("inplace") is True or kwargs.get("out") is not None):
        return True
    name: str = getattr(function, "__name__", "")
    if name[-1:] != "_":
        return False
    return name[-2:] != "__" or name == "__setitem__" or is_inplace(function)


def spare(*trees: Any) -> None:
    """Copy what is kept of these tensors: they are about to be overwritten."""
    held = _HELD.by_storage
    for value in tensors(trees) if held else ():
        for reference in held.pop(value.untyped_storage().data_ptr(), ()):
            kept = reference()
            if kept is not None:
                kept.copy()
