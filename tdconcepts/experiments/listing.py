"""Experiments as a TensorDict: a row for each change, to look at, to select from, and to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments.table import Experiments, Plain, Shapes, Table, Where, checked_edit_like, where_text
from tdconcepts.hooks import Replace, Site
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import as_key

__all__ = ["Listed", "as_experiments", "as_tensordict"]

Index: TypeAlias = tuple[Any, ...]
ENTRIES = ("site", "index", "value", "name", "experiment")


def as_tensordict(table: Table) -> TensorDict:
    """The experiments on one model as a TensorDict ``[C]``, a row for each change, in the order of the experiments.

    | entry | |
    |---|---|
    | ``"experiment"`` | which experiment the change belongs to: ``0 .. N - 1`` |
    | ``"name"`` | what the experiment is called |
    | ``"site"`` | the :class:`~tdconcepts.hooks.Site` or the key |
    | ``"index"`` | what is changed there, in the last dims: ``(slice(3, 4),)``; ``()`` for all |
    | ``"value"`` | the edit |
    """
    rows = []
    for order, move in enumerate(table.moves):
        for i, member in enumerate(move.members.tolist()):
            edit = move.edits[0 if len(move.edits) == 1 else i]
            rows.append((member, order, move.where, _index({d: span[i] for d, span in move.spans.items()}), edit))
    rows.sort(key=lambda row: row[:2])
    members = [row[0] for row in rows]
    found = TensorDict({"experiment": torch.tensor(members, dtype=torch.long)}, batch_size=[len(rows)])
    columns = {
        "name": [table.names[member] for member in members],
        "site": [row[2] for row in rows],
        "index": [row[3] for row in rows],
        "value": [row[4] for row in rows],
    }
    for name, column in columns.items():
        found.set(name, NonTensorStack(*[NonTensorData(one) for one in column]))
    return found


def as_experiments(td: TensorDictBase) -> Listed:
    """The experiments that a TensorDict lists: what :func:`as_tensordict` gives, or one made by hand.

    Args:
        td: ``"site"``: sites or keys; ``"value"``: edits, or what takes the place (a tensor ``[C, ...]``, numbers);
            ``"index"``, optional: ints ``[C]`` in the last dim, or tuples of ints and slices for the last dims;
            ``"name"``, optional; ``"experiment"``, optional: rows of the same number are one experiment, and the
            experiments run in the order of their numbers. An entry that is one thing for the whole batch holds for
            every row.

    Raises:
        BadKey: without sites or values, or with an entry that means nothing. BadValue: another batch than ``[C]``; at
        the call, an index outside. BadType: for what is no site, no index or no edit.

    Examples:
        >>> td = TensorDict({"site": Site("1"), "index": torch.arange(3), "value": torch.zeros(3)}, batch_size=[3])
        >>> as_experiments(td).resolve(lambda where: [(where, torch.Size([6]))]).names
        ('1[0]', '1[1]', '1[2]')
    """
    if len(td.batch_size) != 1 or not td.batch_size[0]:
        raise BadValue(
            "experiments are listed in rows", got=f"batch size {list(td.batch_size)}", needed="[C], 1 or more"
        )
    given = list(td.keys())
    for name in given:
        if name not in ENTRIES:
            raise BadKey(f"experiments have no entry {name!r}", needed=f"{list(ENTRIES)}")
    wheres = [_where(one) for one in _column(td, "site")]
    edits = [_edit(one) for one in _column(td, "value")]
    spans = [_spans(one) for one in _column(td, "index", ())]
    names = [None if one is None else str(one) for one in _column(td, "name", None)]
    numbers = [int(one) for one in _column(td, "experiment")] if "experiment" in given else list(range(len(names)))
    rank = {number: i for i, number in enumerate(sorted(set(numbers)))}  # a selection leaves gaps
    members = [rank[number] for number in numbers]
    return Listed(tuple(zip(wheres, edits, spans, names, members, strict=True)))


@dataclasses.dataclass(frozen=True)
class Listed(Experiments):
    """Experiments as rows; see :func:`as_experiments`."""

    rows: tuple[tuple[Where, EditLike, tuple[tuple[int | None, int | None], ...], str | None, int], ...]

    def __repr__(self) -> str:
        return f"<{len(self.rows)} changes in {max(row[-1] for row in self.rows) + 1} experiments>"

    def wheres(self) -> list[Where]:
        return [row[0] for row in self.rows]

    def edits(self) -> list[EditLike]:
        return [row[1] for row in self.rows]

    def resolve(self, shapes: Shapes) -> Table:
        groups: list[tuple[Any, list[tuple[EditLike, dict[int, Tensor], int]]]] = []
        texts: dict[int, list[str]] = {}
        names: dict[int, str] = {}
        begun: dict[int, int] = {}  # an experiment's changes keep their order: the next one is in a later group
        for where, edit, parts, name, member in self.rows:
            found = shapes(where)
            if len(found) != 1:
                raise BadValue("a row is about one site", got=f"{where_text(where)}, which matches {len(found)}")
            spans = _within(where, parts, found[0][1])
            kind = (found[0][0], tuple(spans))
            at = next((i for i in range(begun.get(member, -1) + 1, len(groups)) if groups[i][0] == kind), None)
            if at is None:
                at = len(groups)
                groups.append((kind, []))
            groups[at][1].append((edit, spans, member))
            begun[member] = at
            texts.setdefault(member, []).append(where_text(where) + _text(parts))
            if name is not None:
                names[member] = name
        moves = []
        for (where, dims), rows in groups:
            stacked = {dim: torch.stack([spans[dim] for _, spans, _ in rows]) for dim in dims}
            edits = tuple(edit for edit, _, _ in rows)
            same = all(edit is edits[0] or edit == edits[0] for edit in edits)
            members = torch.tensor([member for *_, member in rows])
            moves.append(Plain(where, edits[:1] if same else edits, stacked, members))
        called = tuple(names.get(member, " & ".join(texts[member])) for member in sorted(texts))
        return Table(len(texts), tuple(moves), called)


def _column(td: TensorDictBase, name: str, missing: Any = KeyError) -> list[Any]:
    value = td.get(name, None)
    if value is None:
        if missing is KeyError:
            raise BadKey(f"experiments without {name!r}", got=f"entries {list(td.keys())}", needed=f"{list(ENTRIES)}")
        return [missing] * td.batch_size[0]
    if isinstance(value, NonTensorStack):
        return list(value.tolist())
    if isinstance(value, NonTensorData):
        return [value.data] * td.batch_size[0]
    return list(value.unbind(0)) if isinstance(value, Tensor) else list(value)


def _where(given: Any) -> Where:
    if isinstance(given, (Site, str, tuple)):
        return given if isinstance(given, Site) else as_key(given)
    raise BadType("not a site", got=repr(given), needed='Site("blocks.3"), or the key of an entry')


def _edit(given: Any) -> EditLike:
    return Replace(given) if isinstance(given, (int, float, Tensor)) else checked_edit_like(given)


def _spans(given: Any) -> tuple[tuple[int | None, int | None], ...]:
    """First and last + 1 for each of the last dims; None where nothing bounds it."""
    if isinstance(given, Tensor):
        given = given.tolist()
    parts: Sequence[Any] = given if isinstance(given, tuple) else () if given is None else (given,)
    found: list[tuple[int | None, int | None]] = []
    for part in parts:
        if type(part) is int:
            found.append((part, part + 1 if part != -1 else None))
        elif isinstance(part, slice) and part.step in (None, 1):
            found.append((part.start, part.stop))
        else:
            raise BadType("not an index", got=repr(given), needed="an int, a slice without a step, or a tuple of these")
    return tuple(found)


def _within(where: Where, parts: tuple[tuple[int | None, int | None], ...], shape: torch.Size) -> dict[int, Tensor]:
    if len(parts) > len(shape):
        raise BadValue(f"{where_text(where)} has fewer dims than the index", got=f"rows of shape {list(shape)}")
    spans = {}
    for dim, (start, stop) in zip(range(-len(parts), 0), parts, strict=True):
        if (start, stop) == (None, None):
            continue
        first, last, _ = slice(start, stop).indices(shape[dim])
        bounds = [bound for bound in (start, stop) if bound is not None]
        if first >= last or not all(-shape[dim] <= bound <= shape[dim] for bound in bounds):
            raise BadValue(
                "experiments name units that do not exist",
                got=f"{where_text(where)}{_text(parts)}",
                needed=f"within [0, {shape[dim]})",
            )
        spans[dim] = torch.tensor([first, last])
    return spans


def _index(spans: dict[int, Tensor]) -> Index:
    if not spans:
        return ()
    found: list[Any] = [slice(None)] * -min(spans)
    for dim, span in spans.items():
        found[dim] = slice(*span.tolist())
    return tuple(found)


def _text(parts: tuple[tuple[int | None, int | None], ...]) -> str:
    def one(start: int | None, stop: int | None) -> str:
        if start is not None and (stop == start + 1 or (start == -1 and stop is None)):
            return str(start)
        return f"{'' if start is None else start}:{'' if stop is None else stop}"

    return f"[{', '.join(one(*part) for part in parts)}]" if parts else ""
