"""The only place that calls autograd: gradients of a target with respect to entries and sites, one target or many."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.batching import align, dense
from tdconcepts.hooks.calling import explained, missing_entries
from tdconcepts.hooks.contexts import acted_on, active, run_under
from tdconcepts.hooks.jacobian import differentiable, new_leaf, seeds, vector_jacobian
from tdconcepts.hooks.leaves import pick
from tdconcepts.hooks.locate import one_place
from tdconcepts.hooks.nodes import AtNodes
from tdconcepts.hooks.plain import call_stage
from tdconcepts.hooks.plans import Bound, Plan, Run, Step, Stop, stopping
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.stages import check_module, containers, needed, overlap, overwrites_nothing
from tdconcepts.hooks.sums import PathSum
from tdconcepts.hooks.targets import Target
from tdconcepts.hooks.watch import Pulled, Read, Seen, Watch, settle
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Pullback", "Wrt"]

Wrt: TypeAlias = NestedKey | Site


class Pullback:
    r"""The gradient of a target with respect to entries and sites of a module: :math:`\partial y_t / \partial w`.

    Bound to the module once (paths, keys and checks), called many times. Only what the target depends on is run: a
    policy's logits are explained without sampling an action. Several targets cost one forward and one batched backward.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries (read by the module, or written between its stages) and sites, one or a list; default: all entries
            that the module reads.
        program: steps to take besides (in their order, those that watch ``wrt`` among them), and how they finish.
        rules: a program of changed backward passes to pull back through.
        whole: run the whole module, because its outputs are wanted too; then ``by=`` takes what it has just written.

    Raises:
        BadType: for a bare ``nn.Module``. BadKey: for an entry or a site that does not exist.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), in_keys=["x"], out_keys=["logits"])
        >>> pull = Pullback(net, Target("logits", 1))
        >>> torch.equal(pull.gradients(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))[0][0], net.module.weight[1])
        True
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        whole: bool = False,
        program: Bound | None = None,
        rules: Any = None,
    ) -> None:
        self.module = check_module(module)
        if not isinstance(target, Target):
            raise BadType(
                "not a Target", got=repr(target), needed="a Target", fix=f"Target({list(module.out_keys)[-1]!r}, ...)"
            )
        self.target, self._name = target, getattr(target, "name", "")
        self.wrt = self._checked_wrt(wrt)
        self._entries = [key for key in self.wrt if not isinstance(key, Site) and key in module.in_keys]
        self._places = {w: one_place(self.module, w) for w in self.wrt if w not in self._entries}
        self._program = program
        steps = list(program.steps) if program else [Step(place, Watch(w)) for w, place in self._places.items()]
        steps = steps if rules is None else rules.around(module, steps)
        self._rule_keys = () if rules is None else rules.in_keys
        keep = [place.module for place in self._places.values()]
        self._read = None
        if isinstance(target.of, Site):
            place = one_place(self.module, target.of)
            self._read = Read(target.of)
            steps.append(Step(place, self._read))
            keep.append(place.module)
        target.check_goals(module.out_keys)
        self._whole = whole
        self._by_output = whole and target.by is not None and target.by in module.out_keys
        self._given = [] if whole or target.by is not None else [k for k in target.in_keys if k in module.out_keys]
        self.stages = [module] if whole else needed(module, target.goals, keep)
        self._passed = [] if self.stages == [module] else containers(module)
        if any(inner in self._passed for inner in keep):
            self.stages, self._passed = [module], []
        if program is not None:
            steps = list(stopping(steps)) if program.stop else steps
        only = program.only_through if program else ()
        self.plan, self._nodes = Plan(module, steps, only), AtNodes.of(rules)
        unruled = [step for step in steps if not hasattr(step.act, "operate")]
        self._bare = self.plan if self._nodes is None else Plan(module, unruled, only)
        self.in_keys = self._needed_keys()
        self._unchanged = overwrites_nothing(module)  # as far as anybody can tell

    @property
    def names(self) -> list[str | NestedKey]:
        """For each *wrt* the name under which its result is written: the key of an entry, the text of a site."""
        return [w.key if isinstance(w, Site) else w for w in self.wrt]

    @property
    def is_inner(self) -> bool:
        """Whether some *wrt* is a value inside the module, not an entry that it reads."""
        return bool(self._places)

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """The entries to hand to the model: ``in_keys``, and all that it reads where it has to run as a whole."""
        if not acted_on(self._passed):
            return self.in_keys
        return self.in_keys + [k for k in self.module.in_keys if k not in self.in_keys and td.get(k) is not None]

    def gradients(self, td: TensorDictBase, create_graph: bool = False) -> list[Tensor]:
        """The gradients alone, one for each *wrt*: ``[*B, ...]``, with several targets ``[*B, T, ...]``."""
        return self(td, create_graph=create_graph).gradients

    def __call__(
        self,
        td: TensorDictBase,
        points: Mapping[Wrt, Tensor] | None = None,
        *,
        create_graph: bool = False,
        snapshot: bool = False,
        held: Tensor | None = None,
        width: int | None = None,
        owner: object = None,
        onto: PathSum | None = None,
        at_calls: bool = False,
    ) -> Pulled:
        """Run the module once and pull the target back.

        Args:
            td: the module's inputs (and the ``by=`` entry), ``[*B]``; not changed.
            points: values to put in the place of entries and sites, where the gradient is taken.
            create_graph: keep the graph, for derivatives of the gradient; else everything returned is detached.
            snapshot: whether the points at sites are wanted (they are copied where an in-place operation could follow).
            held: what :meth:`hold` gave.
            width: how many targets are pulled back at once; default: all.
            owner: whose standing run this one stands in for.
            onto: what gradients of entries are added to, and then not returned.
            at_calls: whether rules are to look at calls, also where they can be hung on the nodes of a graph.

        Raises:
            BadKey: an entry is missing. BadType: an integer entry is asked for gradients.
            BadValue: nothing of the target's graph is left (the model detaches, or runs under ``no_grad``).
        """
        points = points or {}
        self.check_inputs(td, points)
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return self._functional(td, points, create_graph, held, width, owner)
        nodes = None if at_calls or create_graph or onto is not None or active() else self._nodes
        how: Any = {"create_graph": create_graph, "snapshot": snapshot, "held": held, "width": width}
        with differentiable():
            leaves: Any = {k: new_leaf(points[k] if k in points else td.get(k), create_graph) for k in self._entries}
            work = dense(td, self.reads(td), leaves)
            run = Run(self.plan if nodes is None else self._bare, work, owner)
            run.store["points"] = points
            run.store["unchanged"] = snapshot and self._unchanged and not create_graph
            run.store["snapshot"] = snapshot and not self._unchanged
            run.store["create_graph"] = create_graph
            work = run_under(run, self._forward, work, run)
            values, several = self._values(work, td, run, held)
            seen = [run.store[w] if w in self._places else Seen(leaves[w], handle=leaves[w]) for w in self.wrt]
            if any([s.version is not None and s.value._version != s.version for s in seen]):  # noqa: C419 - faster
                self._unchanged = False  # something does, and the values at sites are to be copied
                return self(td, points, **how, owner=owner, onto=onto, at_calls=at_calls)
            pull: Any = vector_jacobian if onto is None else onto.pull
            if nodes is not None:  # which gives None where a call has to be looked at
                pull = functools.partial(nodes.pull, [*work.values(True, True), *run.store.values()])
            found = pull(values, [s.handle for s in seen], several, create_graph, width, self._name)
            if found is None:
                self._nodes = None
                return self(td, points, **how, owner=owner)
            gradients, where = [], []
            for w, gradient, one in zip(self.wrt, found, seen, strict=onto is None):
                gradients.append(self._shaped(w, gradient, one, values, td, several))
                point = self._point(w, one, td)
                where.append(point if create_graph else point.detach())
        if not create_graph:
            values = values.detach()
            work = work.detach() if self._whole else work
        return Pulled(values, where, gradients, work)

    def evaluate(
        self,
        td: TensorDictBase,
        points: Mapping[Wrt, Tensor] | None = None,
        held: Tensor | None = None,
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor, dict[Wrt, Tensor]]:
        """The explained numbers without their gradient, and the value at each site: one forward."""
        points = points or {}
        self.check_inputs(td, points, gradients=False)
        with torch.set_grad_enabled(create_graph):
            work = dense(td, self.reads(td))
            for key in self._entries:
                if key in points:
                    work.set(key, points[key])
            run = Run(self.plan, work)
            run.store["points"] = points
            run.store["snapshot"] = True
            run.store["shapes"] = True
            work = run_under(run, self._forward, work, run)
            values, _ = self._values(work, td, run, held)
            batch = td.batch_size
            seen = {w: align(settle(run.store[w].value, batch), batch, str(w)) for w in self._places}
        return values, seen

    def hold(self, td: TensorDictBase) -> Tensor | None:
        """The index ``[*B]`` that a target's ``"argmax"`` chooses at ``td``; None for a target that does not move."""
        if not self.target.moves:
            return None
        with torch.no_grad():
            work = dense(td, self.reads(td))
            run = Run(self.plan, work)
            run.store["shapes"] = True
            work = run_under(run, self._forward, work, run)
            return self.target.hold(self._target_value(work, run, td), td.batch_dims)

    def _forward(self, work: TensorDictBase, run: Run) -> TensorDictBase:
        try:
            for stage in [self.module] if acted_on(self._passed) else self.stages:
                work = call_stage(stage, work)
        except Stop:
            pass
        except Exception as error:
            reason = explained(error, self.in_keys, work)
            if reason is error:
                raise
            raise reason from error
        run.check_reached()
        if self._program is not None and self._program.finish is not None:
            self._program.finish(run, work)
        return work

    def _values(self, work: TensorDictBase, td: TensorDictBase, run: Run, held: Tensor | None) -> tuple[Tensor, bool]:
        value = self._target_value(work, run, td)
        source = td if self.target.by is not None and not self._by_output else work
        if self._given:  # the selection reads what was given, also where the stages that run write it anew
            source = work.copy()
            for key in self._given:
                if (given := td.get(key)) is None:
                    raise missing_entries([key], td)
                source.set(key, given)
        return self.target.read(value, source, td.batch_dims, held)

    def _target_value(self, work: TensorDictBase, run: Run, td: TensorDictBase) -> Tensor:
        if self._read is None:
            value = work.get(self.target.of)
            if value is None:
                raise BadKey(
                    f"the module did not write {key_text(self.target.of)}", got=f"{list(work.keys(True, True))}"
                )
            if not isinstance(value, Tensor) and isinstance(value, TensorDictBase):  # made of a dict without that name
                names = list(value.keys(True, True))
                got, fix = f"entries {names}", f"TensorDictModule(..., out_keys={names})" if names else None
                raise BadKey(f"{key_text(self.target.of)} is a group of entries", got=got, needed="an entry", fix=fix)
            return value
        site = self.target.of
        assert isinstance(site, Site)
        value = align(settle(run.store[self._read.key], td.batch_size), td.batch_size, str(site))
        return pick(value, site.index, td.batch_dims)

    def _functional(
        self,
        td: TensorDictBase,
        points: Mapping[Wrt, Tensor],
        create_graph: bool,
        held: Tensor | None,
        width: int | None,
        owner: object,
    ) -> Pulled:
        """The same by ``torch.func``: what ``torch.compile`` and the function transforms can trace."""
        batch, lead = td.batch_size, td.batch_dims
        several = False
        starts: dict[Wrt, Tensor] = {key: points[key] if key in points else td.get(key) for key in self._entries}
        if (
            self._places
        ):  # sites are differentiated by a zero that is added; this run tells its shape, and is optimised away
            with torch.no_grad():
                work = dense(td, self.reads(td))
                run = Run(self.plan, work, owner)
                run.store["points"], run.store["shapes"] = points, True
                run_under(run, self._forward, work, run)
                starts.update({w: torch.zeros_like(run.store[w].value) for w in self._places})

        def forward(*leaves: Tensor) -> tuple[Tensor, Any]:
            nonlocal several
            given = dict(zip(self.wrt, leaves, strict=True))
            work = dense(td, self.reads(td))
            for key in self._entries:
                work.set(key, given[key].clone())  # torch.compile sees of a copy that it has a graph, not of the leaf
            run = Run(self.plan, work, owner)
            run.store["points"] = points
            run.store["zeros"] = {w: given[w] for w in self._places}
            work = run_under(run, self._forward, work, run)
            values, several = self._values(work, td, run, held)
            wrote = {key: work.get(key) for key in work.keys(True, True)}
            return values, (wrote, {w: run.store[w].value for w in self._places})

        with torch.enable_grad():
            leaves = [starts[w] if create_graph else starts[w].detach() for w in self.wrt]
            values, pull, aux = torch.func.vjp(forward, *leaves, has_aux=True)  # type: ignore[misc]
            wrote, seen = aux
            if several:
                found = [g.movedim(0, lead) for g in torch.vmap(pull, chunk_size=width)(seeds(values))]
            else:
                found = list(pull(torch.ones_like(values)))
        points_at = [
            starts[w] if w in self._entries else self._picked(w, align(seen[w], batch, str(w)), lead) for w in self.wrt
        ]
        gradients = [self._picked(w, g, lead + several) for w, g in zip(self.wrt, found, strict=True)]
        outputs = dense(td, [])
        for key, value in wrote.items():
            outputs.set(key, value if create_graph else value.detach())
        if not create_graph:
            gradients, points_at = [g.detach() for g in gradients], [p.detach() for p in points_at]
        return Pulled(values if create_graph else values.detach(), points_at, gradients, outputs)

    def _shaped(
        self, w: Wrt, gradient: Tensor | None, seen: Seen, values: Tensor, td: TensorDictBase, several: bool
    ) -> Tensor:
        """A raw gradient ``[T?, ...]`` in its final shape ``[*B, T?, ...]``; zeros where it does not matter."""
        lead = len(batch := td.batch_size)
        if gradient is None:
            shape = ((values.shape[-1],) if several else ()) + seen.value.shape
            gradient = torch.zeros(shape, dtype=seen.value.dtype, device=seen.value.device)
        if seen.mapped is not None:
            gradient = gradient.movedim(seen.mapped + several, lead + several)
        if w in self._places and gradient.shape[several : several + lead] != batch:
            each = [align(g, batch, str(w)) for g in gradient] if several else []
            gradient = torch.stack(each) if several else align(gradient, batch, str(w))
        if several:
            gradient = gradient.movedim(0, lead)
        return self._picked(w, gradient, lead + several)

    def _point(self, w: Wrt, seen: Seen, td: TensorDictBase) -> Tensor:
        """Where the gradient was taken, ``[*B, ...]``."""
        if w not in self._places:
            return seen.value
        batch = td.batch_size
        value = seen.value if seen.mapped is None else seen.value.movedim(seen.mapped, len(batch))
        value = settle(value, batch)
        return self._picked(w, value if value.shape[: len(batch)] == batch else align(value, batch, str(w)), len(batch))

    def _picked(self, w: Wrt, value: Tensor, lead: int) -> Tensor:
        return pick(value, w.index, lead) if isinstance(w, Site) and w.index is not None else value

    def _checked_wrt(self, wrt: Wrt | list[Wrt] | None) -> tuple[Wrt, ...]:
        given: Sequence[Wrt] = list(self.module.in_keys) if wrt is None else wrt if isinstance(wrt, list) else [wrt]
        checked = tuple(w if isinstance(w, Site) else as_key(w) for w in given)
        if not checked or len(set(map(str, checked))) != len(checked):
            raise BadValue(
                "nothing to explain by, or the same twice", got=f"wrt={list(given)}", needed="entries and sites"
            )
        return checked

    def _needed_keys(self) -> list[NestedKey]:
        written: set[NestedKey] = set()
        keys: list[NestedKey] = []
        for stage in self.stages:
            keys += [key for key in stage.in_keys if key not in keys and not overlap(key, written)]
            written.update(stage.out_keys)
        keys += [key for key in self._entries if key not in keys]
        keys += [
            key for key in self.target.in_keys if key not in keys and not (self._by_output and key == self.target.by)
        ]
        more = () if self._program is None else self._program.in_keys
        return [*keys, *(key for key in (*more, *self._rule_keys) if key not in keys)]

    def check_inputs(self, td: TensorDictBase, points: Mapping[Wrt, Tensor], gradients: bool = True) -> None:
        """Raise for an entry that is missing or, where gradients are wanted, has none."""
        for key in self._entries if self.target.by is None or self._by_output else [*self._entries, self.target.by]:
            value = points[key] if key in points else td.get(key)
            if value is None:
                raise missing_entries([key], td)
            is_tensor = isinstance(value, Tensor)
            if gradients and key != self.target.by and not (is_tensor and value.is_floating_point()):
                kind = str(value.dtype).removeprefix("torch.") if is_tensor else type(value).__name__
                raise BadType(
                    f"the entry {key_text(key)} has no gradient",
                    got=f"{kind} of shape {list(value.shape)}" if is_tensor else kind,
                    needed="a floating-point entry",
                    fix='name others by wrt=["..."], or the site where it becomes a float: wrt=Site("embedding")',
                )
