"""Graphs of concepts: which depends on which, and a pipeline that runs them in that order."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import check_module
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["ConceptGraph", "Dag", "SetStage"]


@dataclasses.dataclass(frozen=True)
class Dag:
    """A directed graph without cycles between named concepts: plain, hashable data.

    Args:
        names: the concepts.
        edges: pairs (from, to) of their names.

    Raises:
        BadType: for an edge that is no pair of names. BadKey: for one of an unknown name, with the nearest.
        BadValue: for a cycle, which is shown.

    Examples:
        >>> dag = Dag(["season", "rain", "sprinkler", "wet"], [
        ...     ("season", "rain"), ("season", "sprinkler"), ("rain", "wet"), ("sprinkler", "wet")])
        >>> dag.levels
        (('season',), ('rain', 'sprinkler'), ('wet',))
        >>> dag.parents("wet"), dag.ancestors("rain"), dag.do(["rain"]).parents("rain")
        (('rain', 'sprinkler'), ('season',), ())
    """

    names: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]

    def __init__(self, names: Iterable[str], edges: Iterable[tuple[str, str]]) -> None:
        listed = tuple(names)
        known = set(listed)
        if len(known) < len(listed):
            raise BadValue("two concepts have one name", got=repr(listed), needed="different names")
        pairs = tuple(dict.fromkeys(_pairs(edges)))
        for name in (end for pair in pairs for end in pair):
            if name not in known:
                raise BadKey(f"no concept {name!r} for an edge", got=repr(name), needed=nearest(name, listed))
        object.__setattr__(self, "names", listed)
        object.__setattr__(self, "edges", pairs)
        object.__setattr__(self, "_levels", self._sorted())

    @classmethod
    def from_adjacency(cls, adjacency: Tensor, names: Sequence[str]) -> Dag:
        """The graph with an edge i -> j where ``adjacency[i, j]`` is not 0.

        Examples:
            >>> Dag.from_adjacency(torch.tensor([[0, 1], [0, 0]]), ["a", "b"]).edges
            (('a', 'b'),)
        """
        if not isinstance(adjacency, Tensor):
            raise BadType("not an adjacency matrix", got=repr(adjacency), needed="a tensor [n, n]")
        if adjacency.shape != (len(names), len(names)):
            needed = f"[{len(names)}, {len(names)}], as there are {len(names)} names"
            raise BadValue("not an adjacency matrix of these concepts", got=list(adjacency.shape), needed=needed)
        return cls(names, [(names[i], names[j]) for i, j in adjacency.nonzero().tolist()])

    @property
    def adjacency(self) -> Tensor:
        """``[n, n]``, True at (i, j) for an edge from i to j."""
        place = {name: i for i, name in enumerate(self.names)}
        matrix = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        for one, other in self.edges:
            matrix[place[one], place[other]] = True
        return matrix

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """The concepts by depth, the longest way from a root; those of one level don't depend on each other."""
        return self._levels  # type: ignore[attr-defined]

    @property
    def order(self) -> tuple[str, ...]:
        """The concepts so that each comes after its parents."""
        return tuple(name for level in self.levels for name in level)

    @property
    def roots(self) -> tuple[str, ...]:
        """The concepts without parents."""
        return self.levels[0] if self.levels else ()

    def parents(self, name: str) -> tuple[str, ...]:
        """What a concept depends on directly."""
        self._check([name])
        return tuple(one for one, other in self.edges if other == name)

    def children(self, name: str) -> tuple[str, ...]:
        """What depends on a concept directly."""
        self._check([name])
        return tuple(other for one, other in self.edges if one == name)

    def ancestors(self, name: str) -> tuple[str, ...]:
        """All that a concept depends on, in order."""
        found, rest = set(), list(self.parents(name))
        while rest:
            if (one := rest.pop()) not in found:
                found.add(one)
                rest += self.parents(one)
        return tuple(one for one in self.order if one in found)

    def descendants(self, name: str) -> tuple[str, ...]:
        """All that depends on a concept, in order."""
        found, rest = set(), list(self.children(name))
        while rest:
            if (one := rest.pop()) not in found:
                found.add(one)
                rest += self.children(one)
        return tuple(one for one in self.order if one in found)

    def do(self, names: Iterable[str]) -> Dag:
        """The graph in which these concepts are set from outside: the edges into them are cut."""
        cut = set(self._check(names))
        return Dag(self.names, [(one, other) for one, other in self.edges if other not in cut])

    def _check(self, names: Iterable[str]) -> list[str]:
        listed = list(names)
        for name in listed:
            if name not in self.names:
                raise BadKey(f"no concept {name!r}", got=repr(name), needed=nearest(name, self.names))
        return listed

    def _sorted(self) -> tuple[tuple[str, ...], ...]:
        parents: dict[str, set[str]] = {name: set() for name in self.names}
        for one, other in self.edges:
            parents[other].add(one)
        levels: list[tuple[str, ...]] = []
        done: set[str] = set()
        while len(done) < len(self.names):
            level = tuple(name for name in self.names if name not in done and parents[name] <= done)
            if not level:
                raise BadValue("the graph has a cycle", got=" -> ".join(_cycle(parents, done)), needed="no cycle")
            levels.append(level)
            done.update(level)
        return tuple(levels)


class ConceptGraph(TensorDictSequential):
    """A graph of concepts as a pipeline: one stage for each entry, run so that each comes after those that it reads.

    The edges are the keys: a stage depends on the stages that write its ``in_keys``. The stages are named, so
    ``graph["rain"]`` is the equation of rain. An intervention right after a stage, ``intervene(graph, at="rain")``,
    reaches all that depends on it; :meth:`do` also leaves out what no longer matters.

    =======  ==================================  ======================
    reads    what no stage writes                as the stages
    writes   what the stages write               as the stages
    =======  ==================================  ======================

    Args:
        stages: a TensorDictModule for each name, in any order. It writes the entry of that name (or, nested, one that
            ends in it), so that :attr:`dag` and ``at=`` speak of the same things.

    Raises:
        BadType: for a stage that is no TensorDictModule.
        BadKey: for a stage that writes no entry of its name.
        BadValue: for a cycle, which is shown, and for an entry that two stages write.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> graph = ConceptGraph({
        ...     "wet": Mod(lambda rain, sprinkler: torch.maximum(rain, sprinkler), ["rain", "sprinkler"], ["wet"]),
        ...     "rain": Mod(lambda cloud: 0.8 * cloud, ["cloud"], ["rain"]),
        ...     "sprinkler": Mod(lambda cloud: 1 - cloud, ["cloud"], ["sprinkler"])})
        >>> list(graph.module), graph.dag.parents("wet")
        (['rain', 'sprinkler', 'wet'], ('rain', 'sprinkler'))
        >>> dry = graph.do({"rain": 0.0})
        >>> dry.dag.parents("rain"), dry(cloud=torch.ones(2, 1))[-1].tolist()
        ((), [[0.0], [0.0]])
    """

    def __init__(self, stages: Mapping[str, TensorDictModuleBase]) -> None:
        if not isinstance(stages, Mapping) or not stages:
            raise BadType("not the stages of a graph", got=repr(stages), needed="{name: TensorDictModule}")
        writers: dict[NestedKey, str] = {}
        for name, stage in stages.items():
            for key in check_module(stage, f"the stage {name!r}").out_keys:
                if key in writers:
                    got = f"{writers[key]!r} and {name!r}"
                    raise BadValue(f"two stages write {key_text(key)}", got=got, needed="one writer of each entry")
                writers[key] = name
        for name, stage in stages.items():
            if all(join(key)[-1] != name for key in stage.out_keys):
                got, fix = f"out_keys {list(stage.out_keys)}", None
                if len(stage.out_keys) == 1:
                    fix = f"name it after its entry: {{{join(stage.out_keys[0])[-1]!r}: stage}}"
                raise BadKey(f"the stage {name!r} writes no entry of its name", got=got, needed=repr(name), fix=fix)
        edges = [(writers[key], name) for name, stage in stages.items() for key in stage.in_keys if key in writers]
        dag = Dag(stages, edges)
        super().__init__(OrderedDict((name, stages[name]) for name in dag.order))
        self.dag = dag

    def do(self, values: Mapping[str, float | Tensor]) -> ConceptGraph:
        """The graph in which the entries of these stages are set: the edges into them are cut, the rest is shared.

        Args:
            values: for each stage (of one entry) a number, or the values of a row.

        Raises:
            BadKey: for a name that is none. BadValue: for a stage of several entries.
            BadType: for what is no mapping, and for what is no value.
        """
        if not isinstance(values, Mapping):
            raise BadType("not the values of stages", got=repr(values), needed="{name: number or tensor}")
        self.dag.do(values)
        replaced = dict(self.module.items())
        for name, value in values.items():
            keys = list(self.module[name].out_keys)
            if len(keys) > 1:
                raise BadValue(f"the stage {name!r} writes several entries", got=repr(keys), needed="one")
            like = next((key for key in self.in_keys), None)
            replaced[name] = SetStage(keys[0], value, like)
        return ConceptGraph(replaced)

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        """The stages that lead from ``in_keys`` to ``out_keys``, as a plain :class:`TensorDictSequential`."""
        return TensorDictSequential(OrderedDict(self.module.items())).select_subsequence(in_keys, out_keys)


class SetStage(TensorDictModuleBase):
    """Writes the same value into each row, whatever else there is: an equation without parents.

    =======  =============  ===================================================
    reads    ``like``       ``[*B, ...]``: dtype and device, where there is one
    writes   ``key``        ``[*B, n]``
    =======  =============  ===================================================

    Args:
        key: the entry to write.
        value: a number, or the n numbers of a row.
        like: an entry that every call has.

    Raises:
        BadType: for a value that is no number.
        BadValue: for a value that is not finite, or has more than one dim.
        BadKey: when ``like`` is missing.

    Examples:
        >>> SetStage("rain", 1.0, "cloud")(cloud=torch.zeros(2, 1)).tolist()
        [[1.0], [1.0]]
    """

    def __init__(self, key: NestedKey, value: float | Tensor, like: NestedKey | None = None) -> None:
        super().__init__()
        try:
            row = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError) as error:
            needed = "a number, or a tensor [n] of them"
            raise BadType("not the value of a row", got=repr(value), needed=needed) from error
        if row.ndim > 1 or not bool(row.isfinite().all()):
            raise BadValue("not the value of a row", got=repr(value), needed="a number, or a tensor [n] of them")
        self.register_buffer("value", row.reshape(-1), persistent=False)
        self.in_keys, self.out_keys = [] if like is None else [as_key(like)], [as_key(key)]
        self._like, self._key = None if like is None else as_key(like), self.out_keys[0]

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        value, batch = self.value, tensordict.batch_size
        if self._like is not None:
            like = tensordict.get(self._like, None)
            if not isinstance(like, Tensor):
                have = list(tensordict.keys(True, True))
                raise BadKey("no such entry", got=key_text(self._like), needed=nearest(self._like, have))
            value = value.to(like.device, like.dtype if like.is_floating_point() else value.dtype)
            batch = batch or like.shape[:-1]
        if tensordict.is_locked:
            raise BadValue("the TensorDict is locked", got=f"{key_text(self._key)} to write", fix="pass td.copy()")
        return tensordict.set(self._key, value.expand(*batch, len(value)).clone())


def _pairs(edges: object) -> list[tuple[str, str]]:
    """The edges as pairs of names; a string is none, also not one of two letters."""
    needed, fix = "pairs of names", '[("rain", "wet"), ...]'
    if isinstance(edges, str) or not isinstance(edges, Iterable):
        raise BadType("not the edges of a graph", got=repr(edges), needed=needed, fix=fix)
    pairs = []
    for edge in edges:
        ends = edge if isinstance(edge, tuple | list) else ()
        if len(ends) != 2 or not all(isinstance(end, str) for end in ends):
            raise BadType("not an edge", got=repr(edge), needed=needed, fix=fix)
        pairs.append((ends[0], ends[1]))
    return pairs


def _cycle(parents: Mapping[str, set[str]], done: set[str]) -> list[str]:
    """One cycle among the concepts that are not done, along the arrows."""
    path = [next(name for name in parents if name not in done)]
    while True:
        path.append(min(parents[path[-1]] - done))
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]) :][::-1]
