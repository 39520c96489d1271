"""A model taken apart into a chain of calls: what flows between two of them is all that the rest depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from tdconcepts.experiments.growth import Event, Schedule, bring
from tdconcepts.experiments.moves import Unfit
from tdconcepts.hooks.sites import Place
from tdconcepts.hooks.stages import is_watched, needed, stages
from tdconcepts.keys import NestedKey, as_key

__all__ = ["Chain", "Spot"]


class Spot(NamedTuple):
    """Where in a chain: before link number ``at``; ``key`` is the entry, None for the tensor that flows."""

    at: int
    key: NestedKey | None


class _Link(NamedTuple):
    """A stage with its keys; ``"open"`` and ``"close"`` a stage whose layers follow one by one; or such a layer."""

    kind: str
    module: nn.Module
    key: NestedKey | None = None


class Chain:
    """The stages of a pipeline, and the layers of each stage that is an ``nn.Sequential``, as one chain of calls.

    Args:
        module: the model.
        outputs: the entries that are wanted; stages that they don't need are left out.
        keep: modules that must run.
    """

    def __init__(self, module: TensorDictModuleBase, outputs: Sequence[NestedKey], keep: Sequence[nn.Module]) -> None:
        found = stages(module) if set(outputs) == set(module.out_keys) else needed(module, outputs, keep)
        self.in_keys = list(module.in_keys)
        self.links: list[_Link] = []
        self.spans: dict[nn.Module, list[tuple[int, int]]] = {}
        for stage in found:
            start = len(self.links)
            inner = _sequential(stage)
            if inner is None:
                self.links.append(_Link("stage", stage))
            else:
                self.links.append(_Link("open", stage, as_key(stage.in_keys[0])))
                self._take_apart(inner)
                self.links.append(_Link("close", stage, as_key(stage.out_keys[0])))
            self.spans.setdefault(stage, []).append((start, len(self.links)))

    def spots(self, place: Place) -> list[Spot]:
        """Where the place is in the chain.

        Raises:
            Unfit: it is inside a link, or seen by a part of the chain only.
        """
        spans = self.spans.get(place.module)
        if not spans:
            raise Unfit(f"{place.name} lies inside a stage that is not a Sequential")
        inside = (link.module for link in self.links if link.kind in ("stage", "call"))
        if any(place.module is not one and place.module in one.modules() for one in inside):
            raise Unfit(f"{place.name} is called inside another stage too")
        if isinstance(place.call, int):
            spans = spans[place.call : place.call + 1]
        if place.out_keys is not None:
            if place.side == "input":
                raise Unfit(f"{place.name} changes an entry for one stage only")
            leaf = place.leaf if place.leaf is not None else place.out_keys[0] if len(place.out_keys) == 1 else None
            if leaf is None or as_key(leaf) not in place.out_keys or not spans:
                raise Unfit(f"{place.name} is no entry that a stage writes")
            return [Spot(end, as_key(leaf)) for _, end in spans]
        if place.leaf not in (None, 0) or not spans or (place.leaf == 0 and place.side == "output"):
            raise Unfit(f"{place.name} is a part of what flows")
        return [Spot(end if place.side == "output" else start, None) for start, end in spans]

    def run(
        self, td: TensorDictBase, schedule: Schedule, events: dict[int, list[tuple[Event, NestedKey | None, Any]]]
    ) -> Iterator[tuple[NestedKey, Tensor]]:
        """Run it, with events before links; every entry that it wrote, ``[n, *B, ...]``."""
        batch = td.batch_size
        flow: dict[NestedKey, tuple[Any, int]] = {key: (td.get(key), 1) for key in self.in_keys}
        value: Any = None
        held = 1
        written: list[NestedKey] = []
        for at, link in enumerate([*self.links, None]):
            for event, key, index in events.get(at, ()):
                if key is None:
                    value, held = schedule.change(event, value, held, td, index), event.total
                else:
                    old, slots = flow[key]
                    flow[key] = (schedule.change(event, old, slots, td, index), event.total)
            if link is None:
                break
            if link.kind == "call":
                value = link.module(value)
            elif link.kind == "open":
                value, held = flow[link.key]  # type: ignore[index]
            elif link.kind == "close":
                flow[link.key] = (value, held)  # type: ignore[index]
                written.append(link.key)  # type: ignore[arg-type]
            else:
                written += _run_stage(link.module, flow, batch)
        for key in dict.fromkeys(written):
            value, held = flow[key]
            if isinstance(value, Tensor):
                rows = schedule.results(value, held)
                yield key, rows.reshape(schedule.n, *batch, *rows.shape[1 + len(batch) :])

    def _take_apart(self, module: nn.Module) -> None:
        start = len(self.links)
        if type(module).forward is nn.Sequential.forward and not is_watched(module):
            for child in module:  # type: ignore[attr-defined]
                self._take_apart(child)
        else:
            self.links.append(_Link("call", module))
        self.spans.setdefault(module, []).append((start, len(self.links)))


def _run_stage(stage: Any, flow: dict[NestedKey, tuple[Any, int]], batch: Any) -> list[NestedKey]:
    """Run a stage on as many slots as what it reads has: a branch that no experiment reaches runs on one."""
    given = {key: flow[key] for key in map(as_key, stage.in_keys) if key in flow and flow[key][0] is not None}
    held = max((slots for _, slots in given.values()), default=1)
    if held > 1 and not all(isinstance(value, Tensor) for value, _ in given.values()):
        raise Unfit("a stage reads entries that are no tensors")
    td = TensorDict({}, batch_size=[held * batch[0], *batch[1:]])
    for key, (value, slots) in given.items():
        td.set(key, value if held == 1 else bring(value, slots, held))
    stage(td)
    keys = list(map(as_key, stage.out_keys))
    for key in keys:
        flow[key] = (td.get(key), held)
    return keys


def _sequential(stage: TensorDictModuleBase) -> nn.Module | None:
    """The ``nn.Sequential`` that a stage with one input and one output runs, if that is what it does."""
    inner = getattr(stage, "module", None)
    plain = type(stage).forward is TensorDictModule.forward and len(stage.in_keys) == len(stage.out_keys) == 1
    fits = plain and isinstance(inner, nn.Sequential) and type(inner).forward is nn.Sequential.forward
    options = getattr(stage, "inplace", True) is not True or getattr(stage, "_kwargs", None) is not None
    options = options or getattr(stage, "method", None) is not None
    watched = is_watched(stage) or (isinstance(inner, nn.Module) and is_watched(inner))
    return inner if fits and not watched and not options and len(inner) else None  # type: ignore[arg-type]
