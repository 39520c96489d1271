"""Growing rows: the part of a forward that experiments share runs once, and each gets rows of its own where it differs.

A value holds *slots*: slot 0 is the batch as it is, the others are experiments, in the order in which they begin. Where
all begin at one place nothing needs the batch as it is afterwards, and the experiments are all the slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.experiments.moves import Move, Unfit

__all__ = ["Event", "Schedule", "bring"]


class Event(NamedTuple):
    """What happens at one place: experiments that begin here, and others that are changed once more.

    ``slots``: of the latter; ``total``: how many slots there are afterwards.
    """

    begin: Move | None
    again: Move | None
    slots: Tensor
    total: int


class Schedule:
    """In which slot each of ``n`` experiments runs, for moves in the order of the forward."""

    def __init__(self, n: int, moves: Iterable[Move]) -> None:
        self.n, self.events = n, []
        slot = [-1] * n
        several = list(moves)
        one_start = n > 1 and len(several) > 0 and len(set(several[0].plain.members.tolist())) == n
        self.base = count = 0 if one_start else 1
        for move in several:
            members = move.plain.members.tolist()
            new = [i for i, member in enumerate(members) if slot[member] < 0]
            old = [i for i, member in enumerate(members) if slot[member] >= 0]
            slots = torch.tensor([slot[members[i]] for i in old], dtype=torch.long)
            for i in new:
                slot[members[i]] = count
                count += 1
            begin = move if not old else move.take(new, [members[i] for i in new]) if new else None
            again = move if not new else move.take(old, [members[i] for i in old]) if old else None
            self.events.append(Event(begin, again, slots, count))
        if -1 in slot:
            raise Unfit("an experiment changes nothing")
        self.count = count
        self._in_order = slot == list(range(self.base, n + self.base))
        self._slot = torch.tensor(slot, dtype=torch.long)

    def change(self, event: Event, value: Tensor, held: int, td: TensorDictBase, index: tuple | None) -> Tensor:
        """``value`` with ``held`` slots, ``[held * b, ...]``, after the event: ``[event.total * b, ...]``."""
        before = event.total - (event.begin.m if event.begin is not None else 0)
        rows = value.reshape(held, value.shape[0] // held, *value.shape[1:])
        if held < before:
            rows = _extended(rows, before)
        if event.again is not None:
            slots = event.slots.to(value.device)
            rows = rows.index_copy(0, slots, event.again.apply(rows[slots], td, True, index))
        if event.begin is not None:
            new = event.begin.apply(rows[0], td, False, index)
            rows = torch.cat([rows, new]) if self.base else new
        return rows.flatten(0, 1)

    def results(self, value: Tensor, held: int) -> Tensor:
        """The rows of the experiments, in their order: ``[n, b, ...]``."""
        rows = bring(value, held, self.count).reshape(self.count, value.shape[0] // held, *value.shape[1:])
        return rows[self.base :] if self._in_order else rows[self._slot.to(value.device)]


def bring(value: Tensor, held: int, count: int) -> Tensor:
    """A value with ``count`` slots: those that it does not hold yet are copies of slot 0."""
    if held == count:
        return value
    return _extended(value.reshape(held, value.shape[0] // held, *value.shape[1:]), count).flatten(0, 1)


def _extended(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(count - rows.shape[0], *rows.shape[1:])])
