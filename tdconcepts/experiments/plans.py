"""Five ways to run the same experiments: resume, grow, vmap, batch, and one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.experiments.chains import Chain
from tdconcepts.experiments.growth import Schedule
from tdconcepts.experiments.moves import Move, Unfit, within
from tdconcepts.experiments.table import Table, Where, made
from tdconcepts.hooks import Bound, Capture, Hooked, Patch
from tdconcepts.hooks.batching import expand
from tdconcepts.hooks.plans import Run, Step
from tdconcepts.hooks.programs import checked_edit
from tdconcepts.hooks.sites import Place
from tdconcepts.keys import NestedKey

__all__ = ["PLANS", "Case", "Reach", "Results", "Steps", "observed", "restricted"]

Results = dict[NestedKey, Tensor]


class Reach(NamedTuple):
    """One time that a forward reaches a changed place, in the order of the forward.

    ``place`` is None for an entry that the model reads; ``rows`` is the size of the value's first dim.
    """

    where: Where
    place: Place | None
    rows: int


class Steps:
    """A program of bare steps, which may change the number of rows."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """The steps as they are."""
        return [Bound(self.steps)]


class Case:
    """Experiments ``0 .. n - 1`` on one model, ready to be run by any plan.

    Args:
        module: the model.
        moves: what is changed, in the order of description.
        n: how many experiments there are.
        order: the places, in the order in which a forward reaches them.
        outputs: the entries that are wanted.
        seen: captures that are wanted; their entries are among the outputs.
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        moves: Sequence[Move],
        n: int,
        order: Sequence[Reach],
        outputs: Sequence[NestedKey],
        seen: Capture | None = None,
    ) -> None:
        self.module, self.moves, self.n, self.order, self.outputs = module, tuple(moves), n, tuple(order), outputs
        self.seen = seen
        self.kept: dict[Any, Any] = {}  # what a plan prepares once

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made at the first call."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def hooked(self, program: Any) -> Hooked:
        """The model under a program; what is captured is what the program has made."""
        return observed(Hooked(self.module, program), self.seen)

    def at(self, where: Where) -> list[Move]:
        """The moves at one place."""
        return [move for move in self.moves if move.plain.where == where]

    def patch(self, n: int) -> Patch:
        """One experiment as the patch that it is."""
        edits: dict[Where, list[Any]] = {}
        for move in self.moves:
            for i in (move.plain.members == n).nonzero().flatten().tolist():
                edits.setdefault(move.plain.where, []).append(move.part(i))
        return Patch({where: _InTurn(parts) if len(parts) > 1 else parts[0] for where, parts in edits.items()})


def observed(model: Hooked, seen: Capture | None) -> Hooked:
    """A model with captures around it, if there are any."""
    return model if seen is None else Hooked(model, seen)


class _InTurn:
    """Several edits of one value, one after the other."""

    def __init__(self, edits: Sequence[Any]) -> None:
        self.edits = edits

    @property
    def in_keys(self) -> list[NestedKey]:
        return [key for edit in self.edits for key in edit.in_keys]

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        for edit in self.edits:
            value = edit(value, td)
        return value


def run_one(case: Case, td: TensorDictBase, n: int) -> Results:
    """Experiment ``n`` by itself: the reference for every plan."""
    hooked = case.once(("one", n), lambda: case.hooked(case.patch(n)))
    out = hooked(td.copy())
    return {key: out.get(key) for key in case.outputs}


def run_sequential(case: Case, td: TensorDictBase) -> Results:
    """One hooked forward for each experiment."""
    found = [run_one(case, td, n) for n in range(case.n)]
    return {key: torch.stack([one[key] for one in found]) for key in case.outputs}


def run_batch(case: Case, td: TensorDictBase) -> Results:
    """One forward on ``n`` copies of the batch, each changed in its own way."""
    current: dict[str, Any] = {"td": td}
    wheres = dict.fromkeys(reach.where for reach in case.order)
    hooked = case.hooked(Patch({where: _Batched(case.at(where), case.n, current) for where in wheres}))
    out = hooked(expand(td, case.n, td.keys(True, True)))
    return {key: _split(out.get(key), case.n, td) for key in case.outputs}


class _Batched:
    in_keys: Sequence[NestedKey] = ()

    def __init__(self, moves: Sequence[Move], n: int, current: Mapping[str, Any]) -> None:
        self.moves, self.n, self.current = moves, n, current

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        rows = value.reshape(self.n, value.shape[0] // self.n, *value.shape[1:])
        for move in self.moves:
            members = move.plain.members.to(value.device)
            rows = rows.index_copy(0, members, move.apply(rows[members], self.current["td"], True))
        return rows.reshape(value.shape)


def run_vmap(case: Case, td: TensorDictBase) -> Results:
    """One ``vmap`` for each group of experiments that change the same places: what lies before them is shared."""
    groups = case.once("groups", lambda: _grouped(case))
    if len(groups) == 1:
        return _vmapped(case, td, groups[0][0], case.n)
    found: dict[NestedKey, Tensor] = {}
    for moves, members in groups:
        for key, value in _vmapped(case, td, moves, len(members)).items():
            if key not in found:
                found[key] = value.new_empty(case.n, *value.shape[1:])
            found[key][torch.tensor(members, device=value.device)] = value
    return found


def _grouped(case: Case) -> list[tuple[list[Move], list[int]]]:
    touching: list[list[tuple[int, int]]] = [[] for _ in range(case.n)]
    for j, move in enumerate(case.moves):
        for i, member in enumerate(move.plain.members.tolist()):
            touching[member].append((j, i))
    groups: dict[Any, list[int]] = {}
    for n, pairs in enumerate(touching):
        groups.setdefault(tuple(j for j, _ in pairs), []).append(n)
    found = []
    for which, members in groups.items():
        moves = []
        for position, j in enumerate(which):
            moves.append(case.moves[j].take([touching[n][position][1] for n in members], list(range(len(members)))))
        found.append((moves, members))
    return found


def _vmapped(case: Case, td: TensorDictBase, moves: Sequence[Move], m: int) -> Results:
    current: dict[int, Any] = {}
    edits: dict[Where, list[_Mapped]] = {}
    for j, move in enumerate(moves):
        edits.setdefault(move.plain.where, []).append(_Mapped(move, td, current, j))
    hooked = case.hooked(Patch({where: _InTurn(several) for where, several in edits.items()}))

    def one(_: Tensor, mapped: Any) -> tuple[Tensor, ...]:
        current.update(enumerate(mapped))
        out = hooked(td.copy())
        return tuple(out.get(key) for key in case.outputs)

    mapped = [move.mapped() for move in moves]
    found = torch.vmap(one)(torch.arange(m), mapped)
    return dict(zip(case.outputs, found, strict=True))


class _Mapped:
    in_keys: Sequence[NestedKey] = ()

    def __init__(self, move: Move, td: TensorDictBase, current: Mapping[int, Any], number: int) -> None:
        self.move, self.td, self.current, self.number = move, td, current, number

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        mapped = self.current[self.number]
        edit = self.move.plain.edits[0]
        operand = mapped.get("operand")
        if operand is not None:
            edit = self.move.with_operand(operand)
        new = checked_edit(made(edit, value, self.td), value, "an experiment")
        spans = {
            dim: (mapped[dim][0].to(value.device), mapped[dim][1].to(value.device)) for dim in self.move.plain.spans
        }
        return torch.where(within(value, spans), new, value) if spans else new


def run_grow(case: Case, td: TensorDictBase) -> Results:
    """Rows are added where experiments begin, inside the model; what lies before runs once."""
    if any(reach.place is None for reach in case.order):
        raise Unfit("an entry that the model reads is changed")
    pairs = [(reach, move) for reach in case.order for move in case.at(reach.where)]
    schedule = case.once("schedule", lambda: Schedule(case.n, [move for _, move in pairs]))
    events = iter([(reach, event) for (reach, _), event in zip(pairs, schedule.events, strict=True)])
    held = 1

    def act(where: Where, times: int, value: Tensor) -> Tensor:
        nonlocal held
        for _ in range(times):
            reach, event = next(events, (None, None))
            if reach is None or event is None or reach.place is None or reach.where != where:
                raise Unfit("the places are reached in another order")
            slots = _slots(value, reach.rows, held)
            value, held = schedule.change(event, value, slots, td, reach.place.part), event.total
        return value

    places = {reach.where: reach.place for reach in case.order if reach.place is not None}
    steps = [Step(place, _Act(act, where, len(case.at(where))), every=True) for where, place in places.items()]
    flat = TensorDict({}, batch_size=[])
    for key in td.keys(True, True):
        flat.set(key, td.get(key))
    out = case.hooked(Steps(steps))(flat)
    if next(events, None) is not None:
        raise Unfit("a place was not reached")
    found = {}
    for key in case.outputs:
        value = out.get(key)
        rows = schedule.results(value, _slots(value, td.batch_size[0], held))
        found[key] = rows.reshape(case.n, *td.batch_size, *rows.shape[1 + td.batch_dims :])
    return found


def _slots(value: Tensor, rows: int, held: int) -> int:
    slots, rest = divmod(value.shape[0], rows)
    if rest or slots not in (1, held):
        raise Unfit("a value has another number of rows than the experiments that have begun")
    return slots


class _Act:
    def __init__(self, act: Callable[[Where, int, Tensor], Tensor], where: Where, times: int) -> None:
        self.act, self.where, self.times = act, where, times

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        return self.act(self.where, self.times, value)


def run_resume(case: Case, td: TensorDictBase) -> Results:
    """The pipeline is run stage by stage; rows are added where experiments begin, and only there."""
    if case.seen is not None:
        raise Unfit("sites are wanted")
    chain, schedule, events = case.once("chain", lambda: _chained(case))
    found = dict(chain.run(td, schedule, events))
    return {key: found[key] for key in case.outputs}


def _chained(case: Case) -> Any:
    keep = [reach.place.module for reach in case.order if reach.place is not None]
    chain = Chain(case.module, case.outputs, keep)
    spots: list[Any] = []
    for reach in {reach.where: reach for reach in reversed(case.order)}.values():
        if reach.place is None:
            spots.append((0, reach.where, None, reach.where))
        else:
            spots += [(spot.at, spot.key, reach.place.part, reach.where) for spot in chain.spots(reach.place)]
    rank = {reach.where: i for i, reach in reversed(list(enumerate(case.order)))}
    spots.sort(key=lambda spot: rank[spot[3]])
    spots.sort(key=lambda spot: spot[0])
    moves = [(at, key, part, move) for at, key, part, where in spots for move in case.at(where)]
    schedule = Schedule(case.n, [move for *_, move in moves])
    events: dict[int, list[Any]] = {}
    for (at, key, part, _), event in zip(moves, schedule.events, strict=True):
        events.setdefault(at, []).append((event, key, part))
    return chain, schedule, events


PLANS: dict[str, Callable[[Case, TensorDictBase], Results]] = {
    "resume": run_resume,
    "grow": run_grow,
    "vmap": run_vmap,
    "batch": run_batch,
    "sequential": run_sequential,
}


def restricted(table: Table, members: Sequence[int]) -> list[Move]:
    """The moves of some of the experiments, which are numbered anew."""
    number = {member: i for i, member in enumerate(members)}
    moves = []
    for plain in table.moves:
        which = [i for i, member in enumerate(plain.members.tolist()) if member in number]
        if which:
            moves.append(Move(plain).take(which, [number[int(plain.members[i])] for i in which]))
    return moves


def _split(value: Tensor, n: int, td: TensorDictBase) -> Tensor:
    return value.reshape(n, *td.batch_size, *value.shape[td.batch_dims :])
