"""Many experiments on one batch in a few forwards: the sweep, and how it chooses among the plans."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.experiments.ideal import SweepPlan, ideal, operations
from tdconcepts.experiments.listing import as_experiments, as_tensordict
from tdconcepts.experiments.moves import Unfit
from tdconcepts.experiments.plans import PLANS, Case, Reach, Results, Steps, observed, restricted, run_one
from tdconcepts.experiments.table import Experiments, Table, Where, check_experiments, reads
from tdconcepts.hooks import Capture, Hooked, Site, check_module, check_td, dispatch_rows, locate
from tdconcepts.hooks.batching import check_chunk_size, dense
from tdconcepts.hooks.calling import check_norms, norms_of
from tdconcepts.hooks.contexts import acted_on, active
from tdconcepts.hooks.leaves import pick
from tdconcepts.hooks.plans import Run, Step
from tdconcepts.hooks.sites import Place, module_paths
from tdconcepts.hooks.stages import containers
from tdconcepts.keys import SWEEP, NestedKey, as_key, as_keys, check_writable, join, key_text

__all__ = ["Sweep"]

_ELEMENTS = 2**22  # of the widest activation known, in flight: 16 MB of float32
_LARGE = 2**16  # parameters from which on sharing what lies before a site pays for vmap's own work
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Sweep(TensorDictModuleBase):
    r"""Run N experiments on the same batch: :math:`y_n = f(x \mid \mathrm{do}_n)`, as if each were run alone.

    | reads | writes |
    |---|---|
    | the model's ``in_keys``, the entries that edits name | ``("sweep", *key)`` ``[*B, N, ...]`` for each output |

    Plans, in the order in which they are tried:

    * *resume*: the stages of a ``TensorDictSequential``, and the layers of each stage that is an ``nn.Sequential``, run
      one by one; rows are added where experiments begin, and run through what follows only;
    * *grow*: the same, inside a model of any kind, where it turns out that all the rest depends on the value alone;
    * *vmap* for each group of experiments with the same sites, which shares what lies before them, and *batch*, one
      forward on N copies; which of them is first depends on the sizes;
    * *sequential*: one hooked forward for each experiment.

    A plan is taken when it gives what single hooked forwards give, for the experiments with the largest effect; that is
    looked at once for each shape of the batch. Results are detached.

    Args:
        model: a TensorDictModule.
        experiments: :func:`every`, :func:`each`, :func:`grid`, :func:`product`, or a sum of these; or a TensorDict with
            a row for each change: ``"site"``, ``"index"``, ``"value"``, ``"name"``, as :meth:`table` gives it.
        outputs: the entries that are wanted, and sites: ``("sweep", "blocks.3")``. Where only sites are wanted, a
            forward ends after the last of them. Default: all entries that the model writes.
        chunk_size: how many rows may be in flight; results do not depend on it. Default: chosen from the sizes.
        out_key: the first part of the keys that are written.

    Raises:
        BadKey: a site or an entry that does not exist. BadType: for a bare ``nn.Module``.
        BadValue: at the call, for batch normalisation in training mode, where experiments would change each other.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.experiments import every
        >>> from tdconcepts.hooks import Ablate
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        >>> sweep = Sweep(TensorDictModule(net, ["x"], ["logits"]), every(Site("1"), Ablate()))
        >>> td = sweep(TensorDict(x=torch.randn(5, 4), batch_size=[5]))
        >>> td["sweep", "logits"].shape, sweep.plan(td).name
        (torch.Size([5, 6, 2]), 'resume')
    """

    def __init__(
        self,
        model: TensorDictModuleBase,
        experiments: Experiments | TensorDictBase,
        *,
        outputs: Where | list[Where] | None = None,
        chunk_size: int | None = None,
        out_key: NestedKey = SWEEP,
    ) -> None:
        super().__init__()
        self.model = check_module(model, "model")
        listed = as_experiments(experiments) if isinstance(experiments, TensorDictBase) else experiments
        self.experiments = check_experiments(listed)
        self.chunk_size = check_chunk_size(chunk_size)
        several = list(model.out_keys) if outputs is None else outputs if isinstance(outputs, list) else [outputs]
        self._outputs = _wanted(model, [where for where in several if not isinstance(where, Site)])
        names = list(self._outputs)
        self._seen = _captures([where for where in several if isinstance(where, Site)])
        if self._seen:
            found = [key for bound in self._seen[-1].bind(model) for key in bound.out_keys]
            names += [join(key)[-1] for key in found]
            self._seen = self._seen[-1:] if self._outputs else self._seen
            self._outputs += found
        paths = module_paths(model)
        self._places = {where: self._located(where, paths) for where in self.experiments.wheres()}
        read = [key for edit in self.experiments.edits() for key in reads(edit)]
        self._inner = [key for key in read if key in model.out_keys and key not in model.in_keys]
        outer = [key for key in read if key not in self._inner]
        self.in_keys = list(dict.fromkeys([*map(as_key, model.in_keys), *outer]))
        self.out_keys = [as_key(join(out_key, name)) for name in names]
        self._written = list(zip(self._outputs, self.out_keys, strict=True))
        check_writable(self.out_keys, self.in_keys)
        self._decided: dict[Any, _Decision] = {}
        self._tree = tuple(model.modules())  # to look at their modes at each call
        self._norms = norms_of(model)

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the experiments."""
        check_td(tensordict)
        with torch.no_grad():
            work = self._work(tensordict)
            decision, found = self._decide(work)
            found = self._run(work, decision) if found is None else found
        lead = tensordict.batch_dims
        for key, out_key in self._written:
            value = found[key] if lead else found[key].squeeze(1)
            tensordict.set(out_key, value.movedim(0, lead))
        return tensordict

    def names(self, tensordict: TensorDictBase) -> tuple[str, ...]:
        """What each experiment changes, in their order on a batch like this one: ``"0[3]"`` is unit 3 at site 0."""
        with torch.no_grad():
            return self._decide(self._work(tensordict))[0].table.names

    def table(self, tensordict: TensorDictBase) -> TensorDict:
        """The experiments on a batch like this one as a TensorDict, a row for each change.

        ``"experiment"`` (its number), ``"name"``, ``"site"``, ``"index"``, ``"value"`` (the edit). What is selected
        from it is a description again: ``Sweep(model, sweep.table(td)[:10])``.
        """
        with torch.no_grad():
            return as_tensordict(self._decide(self._work(tensordict))[0].table)

    def plan(self, tensordict: TensorDictBase) -> SweepPlan:
        """Which plan runs on this batch, and how close it comes to the ideal; it is run once, and counted."""
        with torch.no_grad():
            work = self._work(tensordict)
            decision, _ = self._decide(work)
            spent = operations(lambda: self._run(work, decision))
            places = dict(itertools.chain(*self._places.values()))
            least = ideal(work, decision.table, places, decision.chunks[0][1])
        chunks = decision.chunks
        return SweepPlan(decision.name, decision.table.n, len(chunks), least / max(1, spent), dict(decision.why_not))

    def _work(self, td: TensorDictBase) -> TensorDictBase:
        check_norms(self._norms, "experiments")
        work = dense(td, self.in_keys)
        return work if td.batch_dims else work.unsqueeze(0)

    def _located(self, where: Where, paths: Any) -> list[tuple[Where, Place | None]]:
        if not isinstance(where, Site) and where in self.model.in_keys and where not in self.model.out_keys:
            return [(where, None)]
        return [(place.what, place) for place in locate(self.model, where, paths)]

    def _decide(self, td: TensorDictBase) -> tuple[_Decision, Results | None]:
        """What is known about batches of these shapes; with the results, where that had to be found out."""
        values = [(key, td.get(key)) for key in self.in_keys]
        shapes = tuple((key, v.shape, v.dtype, v.device) for key, v in values if isinstance(v, Tensor))
        key = (shapes, tuple([module.training for module in self._tree]))
        if active():  # an outer context may change between two calls
            return self._new_decision(td)
        if key not in self._decided:
            self._decided[key], found = self._new_decision(td)
            return self._decided[key], found
        return self._decided[key], None

    def _new_decision(self, td: TensorDictBase) -> tuple[_Decision, Results | None]:
        order, shapes, base, seen = self._probe(td)
        table = self.experiments.resolve(
            lambda where: [(concrete, shapes[concrete]) for concrete, _ in self._places[where]]
        )
        if not table.n:
            raise BadValue("no experiments", got=repr(self.experiments), needed="one at least")
        rank = {reach.where: i for i, reach in reversed(list(enumerate(order)))}
        first = [len(order)] * table.n
        for move in table.moves:
            for member in move.members.tolist():
                first[member] = min(first[member], rank[move.where])
        members = sorted(range(table.n), key=first.__getitem__)
        rows, size = max(1, td.numel()), max([shape.numel() for shape in shapes.values()], default=1)
        limit = self.chunk_size if self.chunk_size is not None else max(rows, _ELEMENTS // max(1, size))
        step = max(1, limit // rows)
        chunks = []
        for start in range(0, table.n, step):
            some = members[start : start + step] if step < table.n else list(range(table.n))
            chunks.append((some, Case(self.model, restricted(table, some), len(some), order, self._outputs, seen)))
        decision = _Decision("sequential", table, chunks, {})
        for name in self._candidates(td, order, table):
            try:
                found = self._run(td, dataclasses.replace(decision, name=name))
                wrong = self._differs(td, decision, found, base, first if name == "grow" else [0] * table.n)
            except (Unfit, Exception) as error:
                wrong = str(error).strip().split("\n")[0] or type(error).__name__
            if wrong is None:
                return dataclasses.replace(decision, name=name), found
            decision.why_not[name] = wrong
        return decision, None

    def _candidates(self, td: TensorDictBase, order: Sequence[Reach], table: Table) -> Iterable[str]:
        if table.n == 1 or self._inner or not td.numel():
            return []
        large = sum(parameter.numel() for parameter in self.model.parameters()) >= _LARGE
        one_place = len({reach.where for reach in order}) == 1
        shared = ["vmap", "batch"] if large and one_place else ["batch", "vmap"]
        first = [] if acted_on(_parts(self.model)) else ["resume"]
        return [*first, "grow", *shared]

    def _probe(self, td: TensorDictBase) -> tuple[list[Reach], dict[Where, torch.Size], Results, Capture | None]:
        """One forward without changes: the places in their order, the shapes of their rows, the outputs, the captures.

        A forward that ends after the last site that is wanted must have reached all that is changed.
        """
        for seen in self._seen[:-1]:
            try:
                return self._probed(td, seen)
            except BadValue:
                continue
        return self._probed(td, self._seen[-1] if self._seen else None)

    def _probed(
        self, td: TensorDictBase, seen: Capture | None
    ) -> tuple[list[Reach], dict[Where, torch.Size], Results, Capture | None]:
        order: list[Reach] = []
        shapes: dict[Where, torch.Size] = {}
        steps = []
        for where, place in itertools.chain(*self._places.values()):
            if place is None:
                value = td.get(where)
                if value is None:
                    raise BadKey(
                        f"no entry {key_text(where)} to change", needed=nearest(where, list(td.keys(True, True)))
                    )
                order.append(Reach(where, None, value.shape[0]))
                shapes[where] = value.shape[td.batch_dims :]
            else:
                steps.append(Step(place, _Look(where, place, td, order, shapes), every=True))
        unique = {step.place.what: step for step in steps}
        out = observed(Hooked(self.model, Steps(list(unique.values()))), seen)(td.copy())
        base = {}
        for key in self._outputs:
            value = out.get(key)
            if not isinstance(value, Tensor):
                raise BadValue(
                    f"the model's entry {key_text(key)} is no tensor",
                    got=type(value).__name__,
                    needed="tensors to put side by side",
                    fix=f"Sweep(..., outputs={[k for k in self._outputs if k != key]})",
                )
            base[key] = value
        return order, shapes, base, seen

    def _run(self, td: TensorDictBase, decision: _Decision) -> Results:
        plan = PLANS[decision.name]
        parts = [plan(case, td) for _, case in decision.chunks]
        if len(parts) == 1:
            return parts[0]
        back = torch.tensor([member for members, _ in decision.chunks for member in members]).argsort()
        return {key: torch.cat([part[key] for part in parts])[back.to(parts[0][key].device)] for key in parts[0]}

    def _differs(
        self, td: TensorDictBase, decision: _Decision, found: Results, base: Results, kinds: Sequence[int]
    ) -> str | None:
        """Why ``found`` is not what single forwards give, looked at where the effect is largest; None where it is."""
        n = decision.table.n
        effect = torch.zeros(n)
        for key, value in found.items():
            if value.shape != (n, *base[key].shape):
                return f"{key_text(key)} has another shape"
            difference = (value.double() - base[key].double()).abs().reshape(n, -1)
            effect += difference.nan_to_num(0.0, 0.0, 0.0).amax(1).cpu()
        where = {m: (case, i) for members, case in decision.chunks for i, m in enumerate(members)}
        for kind in dict.fromkeys(kinds):
            member = max((m for m in range(n) if kinds[m] == kind), key=effect.tolist().__getitem__)
            case, i = where[member]
            for key, value in run_one(case, td, i).items():
                if not _close(found[key][member], value):
                    return f"it gives other numbers at {decision.table.names[member]}"
        return None


@dataclasses.dataclass
class _Decision:
    name: str
    table: Table
    chunks: list[tuple[list[int], Case]]
    why_not: dict[str, str]


class _Look:
    def __init__(self, where: Where, place: Place, td: TensorDictBase, order: list[Reach], shapes: dict) -> None:
        self.where, self.place, self.td, self.order, self.shapes = where, place, td, order, shapes

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        batch = self.td.batch_size
        lead = len(batch) if value.shape[: len(batch)] == batch else 1
        self.shapes.setdefault(self.where, pick(value, self.place.part, lead).shape[lead:])
        self.order.append(Reach(self.where, self.place, value.shape[0] if value.ndim else 0))
        return value


def _wanted(model: TensorDictModuleBase, keys: list[Any]) -> list[NestedKey]:
    found = as_keys(keys)
    for key in found:
        if key not in model.out_keys:
            raise BadKey(f"the model writes no entry {key_text(key)}", needed=nearest(key, list(model.out_keys)))
    return found


def _captures(sites: list[Site]) -> list[Capture]:
    """Captures of what is wanted: those that end the forward, where that can be, and those that don't."""
    if not sites:
        return []
    last = any(site.call == "all" or (site.call or 0) < 0 for site in sites)  # known at the end of a forward only
    return [*([] if last else [Capture(*sites, stop=True)]), Capture(*sites)]


def _parts(model: TensorDictModuleBase) -> list[nn.Module]:
    """The containers that running a pipeline stage by stage passes by."""
    sequentials = [m for m in model.modules() if isinstance(m, (nn.Sequential, TensorDictModuleBase))]
    return [*containers(model), *sequentials]


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    scale = max(1.0, float(other.abs().nan_to_num(0.0, 0.0, 0.0).amax())) if other.numel() else 1.0
    tolerance = _TOLERANCE.get(one.dtype, 1e-4)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * 1e-1 * scale, equal_nan=True)
