"""What the columns of a concept block mean: names, cardinalities, kinds, groups, slices by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["ConceptSpec", "Run"]

KINDS = ("binary", "categorical", "continuous")


class Run(NamedTuple):
    """Neighbouring concepts of one kind and one cardinality, which are computed at once: columns start to stop."""

    kind: str
    cardinality: int
    start: int
    stop: int
    first: int  # position of the first concept
    last: int  # position after the last one


@dataclasses.dataclass(frozen=True)
class ConceptSpec:
    """The names, cardinalities and kinds of the concepts in one block ``[*B, C]``.

    A binary concept owns one column, a categorical one a column for each of its n > 1 states, a continuous one as many
    as it has numbers. ``C`` (:attr:`size`) is the sum of the cardinalities. The spec is plain, hashable data: the
    numbers themselves live in a TensorDict entry.

    Args:
        names: one name for each concept, all different; an int n names them ``"0"`` to ``"n-1"``.
        cardinalities: columns of each concept. Default: all 1.
        kinds: ``"binary"``, ``"categorical"`` or ``"continuous"`` for each concept. Default: by the cardinality, binary
            for 1 and categorical for more.
        groups: names for sets of concepts, ``{"head": ["beak", "eye"]}``, or such pairs as the attribute ``groups``
            holds; :meth:`columns` takes these names too.

    Raises:
        BadValue: for repeated names, a cardinality below 1 or one that the kind can't have, numbers that differ.
        BadKey: for a group with a name that is no concept.

    Examples:
        >>> spec = ConceptSpec(["wing", "colour", "beak"], cardinalities=[1, 3, 1], groups={"head": ["beak"]})
        >>> len(spec), spec.size, spec.slice("colour"), spec.columns(["head", "wing"])
        (3, 5, slice(1, 4, None), [4, 0])
        >>> ConceptSpec(2).names, ConceptSpec(["age"], kinds=["continuous"]).kinds
        (('0', '1'), ('continuous',))
    """

    names: tuple[str, ...]
    cardinalities: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __init__(
        self,
        names: int | Iterable[str],
        cardinalities: Iterable[int] | None = None,
        kinds: Iterable[str] | None = None,
        groups: Mapping[str, Iterable[str]] | Iterable[tuple[str, Iterable[str]]] | None = None,
    ) -> None:
        listed = tuple(map(str, range(names))) if type(names) is int else _as_names(names)
        if not (cardinalities is None or isinstance(cardinalities, Iterable)):
            raise BadType("not cardinalities", got=repr(cardinalities), needed="a list with one int for each concept")
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
        object.__setattr__(self, "kinds", _as_kinds(kinds, listed, counts))
        object.__setattr__(self, "groups", _as_groups(groups, listed))
        object.__setattr__(self, "_size", sum(counts))
        object.__setattr__(self, "_runs", _as_runs(self.kinds, counts))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """The number of columns, C."""
        return self._size  # type: ignore[attr-defined]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The block cut into neighbouring concepts of one kind and cardinality."""
        return self._runs  # type: ignore[attr-defined]

    @property
    def binary(self) -> bool:
        """Whether every concept is binary, so that concept i is column i."""
        return len(self.runs) == 1 and self.runs[0].kind == "binary"

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

    def members(self, names: Iterable[str]) -> list[str]:
        """The concepts that ``names`` (of concepts and of groups) stand for, in this order."""
        groups = dict(self.groups)
        found = [groups.get(name, (name,)) for name in names]
        listed = [name for members in found for name in members]
        unknown = [name for name in listed if name not in self.names]
        if unknown:
            needed = nearest(unknown[0], [*self.names, *groups])
            raise BadKey(f"no concept or group {unknown[0]!r}", got=repr(unknown[0]), needed=needed)
        return listed

    def columns(self, names: Iterable[str]) -> list[int]:
        """The columns of several concepts or groups, in the order of ``names``."""
        return [column for name in self.members(names) for column in range(self.size)[self.slice(name)]]

    def probs(self, logits: Tensor) -> Tensor:
        """``logits [*B, C] -> probs [*B, C]``: a sigmoid for binary concepts, a softmax over the states of each
        categorical one, and continuous ones as they are.

        Raises:
            BadValue: when the last dim is not C.

        Examples:
            >>> ConceptSpec(["wing", "colour"], [1, 2]).probs(torch.zeros(3)).tolist()
            [0.5, 0.5, 0.5]
        """
        self.check(logits)
        parts = [_activated(run, logits[..., run.start : run.stop]) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def logits(self, probs: Tensor, eps: float = 1e-4) -> Tensor:
        """The logits that :meth:`probs` takes back, for probabilities kept ``eps`` away from 0 and 1: 1 becomes 9.21.

        Examples:
            >>> ConceptSpec(["wing"]).logits(torch.tensor([1.0])).tolist()
            [9.21...]
        """
        self.check(probs)
        wide = probs if probs.dtype.itemsize >= 4 else probs.float()  # in bfloat16, 1 - eps would be 1
        parts = [_deactivated(run, wide[..., run.start : run.stop], eps) for run in self.runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(probs.dtype)

    def targets(self, labels: Tensor, like: Tensor | None = None) -> Tensor:
        """Labels as columns ``[*B, C]``: from a number for each concept ``[*B, K]``, or from columns, which stay.

        The number is 0 or 1 for a binary concept, the index of the state for a categorical one, and the value itself
        for a continuous one. A label of NaN is a missing one: NaN in all columns of its concept.

        Args:
            labels: ``[*B, K]`` (``[*B]`` where there is one concept) or ``[*B, C]``, of any dtype.
            like: a block ``[*B, C]``, whose dtype, device and batch the result has. Default: the labels', in float32 if
                they are ints.

        Raises:
            BadValue: for another shape, a binary label outside [0, 1], or a state that a concept does not have (the
                numbers are not checked under ``torch.compile`` and ``vmap``).

        Examples:
            >>> spec = ConceptSpec(["wing", "colour"], [1, 3])
            >>> spec.targets(torch.tensor([1.0, 2.0])).tolist(), spec.targets(torch.tensor([0.0, torch.nan])).tolist()
            ([1.0, 0.0, 0.0, 1.0], [0.0, nan, nan, nan])
        """
        if like is not None and len(self) == 1 and labels.shape == like.shape[:-1]:
            labels = labels.unsqueeze(-1)
        width = labels.shape[-1:]
        if width not in ((len(self),), (self.size,)) or (like is not None and labels.shape[:-1] != like.shape[:-1]):
            batch = "*B" if like is None else ", ".join(map(str, like.shape[:-1]))
            needed = f"[{batch}, {len(self)}] numbers" + ("" if self.binary else f" or [{batch}, {self.size}] columns")
            raise BadValue("not the labels of these concepts", got=list(labels.shape), needed=needed)
        dtype = like.dtype if like is not None else labels.dtype if labels.is_floating_point() else torch.float32
        device = labels.device if like is None else like.device
        states = width != (self.size,)
        parts = [self._target(run, labels, states).to(device, dtype) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def split(self, td: TensorDictBase, key: NestedKey = "concepts") -> TensorDictBase:
        """A shallow copy of ``td`` in which the block at ``key`` is a group of entries, one for each concept.

        Raises:
            BadKey: when there is no block at ``key``. BadValue: when its last dim is not C. BadType: for no TensorDict.

        Examples:
            >>> spec = ConceptSpec(["wing", "colour"], [1, 3])
            >>> td = spec.split(TensorDict({"concepts": torch.rand(2, 4)}, [2]))
            >>> td["concepts", "colour"].shape, spec.pack(td)["concepts"].shape
            (torch.Size([2, 3]), torch.Size([2, 4]))
        """
        _check_td(td)
        block = td.get(as_key(key), None)
        if not isinstance(block, Tensor):
            have = list(td.keys(True, True))
            raise BadKey("no block of concepts in the TensorDict", got=key_text(key), needed=nearest(key, have))
        self.check(block)
        parts = dict(zip(self.names, block.split(self.cardinalities, dim=-1), strict=True))
        return td.exclude(as_key(key)).set(as_key(key), TensorDict(parts, td.batch_size, device=td.device))

    def pack(self, td: TensorDictBase, key: NestedKey = "concepts") -> TensorDictBase:
        """The way back: a shallow copy of ``td`` in which the entries below ``key`` are one block ``[*B, C]``.

        Raises:
            BadKey: when the entry of a concept is missing. BadValue: when it has another number of columns.
            BadType: for no TensorDict.
        """
        _check_td(td)
        found = {name: td.get(join(key, name), None) for name in self.names}
        missing = [name for name, part in found.items() if not isinstance(part, Tensor)]
        if missing:
            have = list(td.keys(True, True))
            got = key_text(join(key, missing[0]))
            raise BadKey(
                f"no entry of the concept {missing[0]!r}", got=got, needed=nearest(join(key, missing[0]), have)
            )
        for (name, part), n in zip(found.items(), self.cardinalities, strict=True):
            if part.shape != (*td.batch_size, n):
                needed = f"{[*td.batch_size, n]}: the batch, then the columns"
                raise BadValue(f"another cardinality of {name!r}", got=list(part.shape), needed=needed)
        return td.exclude(as_key(key)).set(as_key(key), torch.cat(list(found.values()), dim=-1))

    def check(self, block: Tensor) -> None:
        """Raise :class:`~tdconcepts.errors.BadValue` for a block whose last dim is not C."""
        if block.shape[-1:] != (self.size,):
            raise BadValue("not a block of these concepts", got=list(block.shape), needed=f"[*B, {self.size}]")

    def _target(self, run: Run, labels: Tensor, states: bool) -> Tensor:
        if not states:
            columns = labels[..., run.start : run.stop]
            if run.kind != "continuous":
                _check_range(columns, 0, 1, "a label is outside [0, 1]", self.names[run.first : run.last])
            return columns
        if run.kind == "continuous" and run.cardinality > 1:
            needed = f"[*B, {self.size}] columns: {self.names[run.first]!r} has {run.cardinality} numbers"
            raise BadValue("not the labels of these concepts", got=list(labels.shape), needed=needed)
        some = labels[..., run.first : run.last]
        if run.kind != "continuous":
            what = "a label is outside [0, 1]" if run.kind == "binary" else "a concept has no such state"
            _check_range(some, 0, max(1, run.cardinality - 1), what, self.names[run.first : run.last])
            if run.kind == "categorical":
                _check_whole(some, self.names[run.first : run.last])
        if run.kind != "categorical":
            return some
        position = torch.arange(run.cardinality, device=labels.device)
        columns = (some.unsqueeze(-1) == position).float()
        if some.is_floating_point():
            columns = columns.masked_fill(some.isnan().unsqueeze(-1), torch.nan)
        return columns.flatten(-2)


def _activated(run: Run, logits: Tensor) -> Tensor:
    if run.kind == "continuous":
        return logits
    if run.kind == "binary":
        return logits.sigmoid()
    return logits.unflatten(-1, (run.last - run.first, run.cardinality)).softmax(-1).flatten(-2)


def _deactivated(run: Run, probs: Tensor, eps: float) -> Tensor:
    if run.kind == "continuous":
        return probs
    return probs.logit(eps) if run.kind == "binary" else probs.clamp(min=eps).log()


def _as_names(names: object) -> tuple[str, ...]:
    if isinstance(names, Iterable) and not isinstance(names, (str, bytes)):
        listed = tuple(names)
        if all(isinstance(name, str) for name in listed):
            return listed
    raise BadType("not the names of concepts", got=repr(names), needed='a list such as ["wing", "beak"], or an int')


def _as_kinds(kinds: Iterable[str] | None, names: tuple[str, ...], counts: tuple[int, ...]) -> tuple[str, ...]:
    if kinds is None:
        return tuple("binary" if n == 1 else "categorical" for n in counts)
    listed = tuple(kinds)
    if len(listed) != len(names):
        got = f"{len(names)} names, {len(listed)} kinds"
        raise BadValue("names and kinds differ in number", got=got, needed="as many of each")
    for name, kind, n in zip(names, listed, counts, strict=True):
        if kind not in KINDS:
            raise BadValue(f"not a kind of concept: {name!r}", got=repr(kind), needed=", ".join(map(repr, KINDS)))
        if (kind == "binary" and n > 1) or (kind == "categorical" and n == 1):
            needed = "1 column for a binary concept, one for each state of a categorical one"
            raise BadValue(f"the concept {name!r} is {kind}", got=f"cardinality {n}", needed=needed)
    return listed


def _as_groups(groups: Any, names: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    given = () if groups is None else groups.items() if isinstance(groups, Mapping) else groups
    pairs = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise BadType("not groups of concepts", got=repr(groups), needed='a dict such as {"head": ["beak", "eye"]}')
    if len(dict(pairs)) < len(pairs):
        raise BadValue("two groups have one name", got=repr([name for name, _ in pairs]), needed="different names")
    found = tuple((name, _as_names(members)) for name, members in pairs)
    for name, members in found:
        unknown = [member for member in members if member not in names]
        if unknown:
            raise BadKey(f"no concept for the group {name!r}", got=repr(unknown[0]), needed=nearest(unknown[0], names))
        if name in names:
            raise BadValue("a group and a concept have one name", got=repr(name), needed="different names")
    return found


def _as_runs(kinds: tuple[str, ...], counts: tuple[int, ...]) -> tuple[Run, ...]:
    runs: list[Run] = []
    column = 0
    for i, (kind, n) in enumerate(zip(kinds, counts, strict=True)):
        if runs and runs[-1][:2] == (kind, n):
            runs[-1] = runs[-1]._replace(stop=column + n, last=i + 1)
        else:
            runs.append(Run(kind, n, column, column + n, i, i + 1))
        column += n
    return tuple(runs)


def _check_td(td: object) -> None:
    if not is_tensor_collection(td):
        needed = "a TensorDict with the block as an entry"
        raise BadType("concepts are entries of a TensorDict", got=type(td).__name__, needed=needed)


def _check_range(labels: Tensor, low: int, high: int, what: str, names: tuple[str, ...]) -> None:
    """Refuse numbers outside ``[low, high]`` (NaN passes), where the numbers can be looked at."""
    if _visible(labels) and labels.dtype is not torch.bool:
        known = labels.detach().nan_to_num(low) if labels.is_floating_point() else labels
        least, most = known.aminmax()
        if least < low or most > high:
            got = f"{least.item():g} to {most.item():g} for {_shown(names)}"
            raise BadValue(what, got=got, needed=f"{low} to {high}")


def _check_whole(states: Tensor, names: tuple[str, ...]) -> None:
    if _visible(states) and states.is_floating_point():
        part = states.detach().frac()
        if (part.nan_to_num() != 0).any():
            got = f"a state between two, for {_shown(names)}"
            raise BadValue("a state is a whole number", got=got, needed="0, 1, ...")


def _visible(labels: Tensor) -> bool:
    is_hidden = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(labels)
    return not is_hidden and labels.numel() > 0


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:4])) + (" and more" if len(names) > 4 else "")
