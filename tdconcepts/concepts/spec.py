"""What the columns of a concept block mean: names, cardinalities, slices by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest

__all__ = ["ConceptSpec"]


@dataclasses.dataclass(frozen=True)
class ConceptSpec:
    """The names and cardinalities of the concepts in one block ``[*B, C]``.

    A concept of cardinality 1 is binary and owns one column. A concept of cardinality n > 1 is categorical and owns n
    columns, one for each state. ``C`` (:attr:`size`) is the sum of the cardinalities. The spec is plain, hashable data:
    the numbers themselves live in a TensorDict entry.

    Args:
        names: one name for each concept, all different; an int n names them ``"0"`` to ``"n-1"``.
        cardinalities: columns of each concept. Default: all binary.

    Raises:
        BadValue: for repeated names, a cardinality below 1, or a number of cardinalities that is not that of the names.

    Examples:
        >>> spec = ConceptSpec(["wing", "colour", "beak"], cardinalities=[1, 3, 1])
        >>> len(spec), spec.size, spec.slice("colour"), spec.columns(["beak", "wing"])
        (3, 5, slice(1, 4, None), [4, 0])
        >>> ConceptSpec(2).names
        ('0', '1')
    """

    names: tuple[str, ...]
    cardinalities: tuple[int, ...] = ()

    def __init__(self, names: int | Iterable[str], cardinalities: Iterable[int] | None = None) -> None:
        listed = tuple(map(str, range(names))) if type(names) is int else _as_names(names)
        counts = (1,) * len(listed) if cardinalities is None else tuple(cardinalities)
        if not listed:
            raise BadValue("no concepts", got="no names", needed="one name or more")
        if len(set(listed)) < len(listed):
            twice = sorted({name for name in listed if listed.count(name) > 1})
            raise BadValue("two concepts have one name", got=repr(twice), needed="different names")
        if len(counts) != len(listed):
            got = f"{len(listed)} names, {len(counts)} cardinalities"
            raise BadValue("names and cardinalities differ in number", got=got, needed="as many of each")
        wrong = [(name, n) for name, n in zip(listed, counts, strict=True) if type(n) is not int or n < 1]
        if wrong:
            raise BadValue("not a cardinality", got=repr(dict(wrong)), needed="an int: 1 for binary, n for n states")
        object.__setattr__(self, "names", listed)
        object.__setattr__(self, "cardinalities", counts)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """The number of columns, C."""
        return sum(self.cardinalities)

    @property
    def binary(self) -> bool:
        """Whether every concept is binary, so that concept i is column i."""
        return self.size == len(self.names)

    def index(self, name: str) -> int:
        """The position of a concept among the names.

        Raises:
            BadKey: for a name that is none, with the nearest ones.
        """
        if name not in self.names:
            raise BadKey(f"no concept {name!r}", got=repr(name), needed=nearest(name, self.names))
        return self.names.index(name)

    def slice(self, name: str) -> slice:
        """The columns of a concept."""
        position = self.index(name)
        start = sum(self.cardinalities[:position])
        return slice(start, start + self.cardinalities[position])

    def columns(self, names: Iterable[str]) -> list[int]:
        """The columns of several concepts, in the order of ``names``."""
        return [column for name in names for column in range(self.size)[self.slice(name)]]

    def probs(self, logits: Tensor) -> Tensor:
        """``logits [*B, C] -> probs [*B, C]``: a sigmoid for binary concepts, a softmax over the states of others.

        Raises:
            BadValue: when the last dim is not C.

        Examples:
            >>> ConceptSpec(["wing", "colour"], [1, 2]).probs(torch.zeros(3)).tolist()
            [0.5, 0.5, 0.5]
        """
        if logits.shape[-1:] != (self.size,):
            raise BadValue("not a block of these concepts", got=list(logits.shape), needed=f"[*B, {self.size}]")
        if self.binary:
            return logits.sigmoid()
        parts = logits.split(self.cardinalities, dim=-1)
        pairs = zip(parts, self.cardinalities, strict=True)
        return torch.cat([part.sigmoid() if n == 1 else part.softmax(-1) for part, n in pairs], dim=-1)


def _as_names(names: object) -> tuple[str, ...]:
    if isinstance(names, Iterable) and not isinstance(names, (str, bytes)):
        listed = tuple(names)
        if all(isinstance(name, str) for name in listed):
            return listed
    raise BadType("not the names of concepts", got=repr(names), needed='a list such as ["wing", "beak"], or an int')
