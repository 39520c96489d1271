"""Programs: frozen descriptions of what to read and what to change in a model, that add with ``+``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.batching import align
from tdconcepts.hooks.contexts import outside
from tdconcepts.hooks.edits import Edit
from tdconcepts.hooks.hooked import Hooked
from tdconcepts.hooks.leaves import pick, put
from tdconcepts.hooks.locate import locate
from tdconcepts.hooks.plans import Bound, Run, Step
from tdconcepts.hooks.sites import Place, Site, module_paths, places
from tdconcepts.hooks.targets import Target
from tdconcepts.hooks.watch import Record, Seen, Watch, check_version, normal_tensors, settle
from tdconcepts.keys import ACTIVATION, GRADIENT, NestedKey, as_key, join, key_text

__all__ = ["Capture", "Patch", "Programs", "capture", "patch"]

EditLike: TypeAlias = Edit | Callable[[Tensor, TensorDictBase], Tensor]


class _Adds:
    """What every program can: add up, and be bound to a module."""

    def __add__(self, other: Any) -> Programs:
        return Programs((*_parts(self), *_parts(other)))

    def on(self, module: TensorDictModuleBase) -> Hooked:
        """Bind to ``module``: a context manager that is a TensorDictModule."""
        return Hooked(module, self)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, init=False)
class Capture(_Adds):
    """Read activations, and gradients of a target with respect to them, in one forward.

    | writes | shape |
    |---|---|
    | ``("activation", site)`` for each | what was written, ``[*B, ...]``; ``[*B, calls, ...]`` with ``call="all"`` |
    | ``("gradient", site)``, with ``gradients=`` | the same; ``[*B, T, ...]`` with several targets |

    The site's text is the name: ``"net.2"``, ``"head:in"``. Captures are detached, and not copied; a value that an
    in-place operation overwrites later is an error, and is copied beforehand where a module of the model says
    ``inplace=True``.

    Args:
        sites: sites, or their texts; a glob stands for all that match.
        gradients: also pull this target back to the sites, by one ``autograd.grad`` over them.
        stop: end the forward after the last site; the module's own outputs are not written.
        clone: copy what is captured.
        detach: False keeps the graph.

    Raises:
        BadKey: a path that matches nothing. BadValue: a site that never ran, or ran several times without ``call=``; an
            overwritten value; an activation without the batch in front.

    Examples:
        >>> Capture("net.*", "head:in") + Capture("body")
        Capture('net.*', 'head:in') + Capture('body')
    """

    sites: tuple[Site, ...]
    gradients: Target | None
    stop: bool
    clone: bool
    detach: bool

    def __init__(
        self,
        *sites: Site | str,
        gradients: Target | None = None,
        stop: bool = False,
        clone: bool = False,
        detach: bool = True,
    ) -> None:
        if not sites:
            raise BadValue(
                "nothing to capture", needed="sites, or their texts", fix='capture(model, "**") for every module'
            )
        if stop and gradients is not None and not isinstance(gradients.of, Site):
            raise BadValue(
                "a forward that stops early has no gradients of an output", fix="gradients=Target(Site(...), ...)"
            )
        if stop and any(site.call == "all" or (site.call or 0) < 0 for site in map(Site.parse, sites)):
            raise BadValue(
                "a forward that stops early has no last call", got=f"{list(sites)}", needed="call=0, 1, ... or none"
            )
        if gradients is not None and not isinstance(gradients, Target):
            raise BadType("not a Target", got=repr(gradients), needed='gradients=Target("logits", 3)')
        if gradients is not None and not detach:
            raise BadValue(
                "taking gradients uses up the graph",
                got="gradients= and detach=False",
                needed="one of them",
                fix="Gradient(model, target, wrt=Site(...), create_graph=True) keeps the graph",
            )
        for name, value in (
            ("sites", tuple(Site.parse(site) for site in sites)),
            ("gradients", gradients),
            ("stop", stop),
            ("clone", clone),
            ("detach", detach),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        options = [f"gradients={self.gradients!r}"] if self.gradients is not None else []
        options += [f"{name}={value}" for name, value in (("stop", self.stop), ("clone", self.clone)) if value]
        return f"Capture({', '.join([*(repr(str(site)) for site in self.sites), *options])}" + (
            ")" if self.detach else ", detach=False)"
        )

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """Resolve the sites in ``module``."""
        paths = module_paths(module)
        found = list(
            {place.name: place for site in self.sites for place in places(module, site, paths)}.values()
        )  # a place that two globs match is captured once
        inner = [
            m for m in module.modules() if not isinstance(m, TensorDictModuleBase)
        ]  # their inplace= is another one
        overwritten = any(getattr(m, "inplace", False) is True for m in inner)
        steps: list[Step] = []
        for place in found:
            if self.gradients is not None:
                steps.append(Step(place, Watch(place.what)))
            keep = None if place.call == "all" else -place.call if isinstance(place.call, int) and place.call < 0 else 1
            steps.append(Step(place, Record(("capture", place.name), keep, self.clone or overwritten, self.detach)))
        out_keys = [join(ACTIVATION, place.name) for place in found]
        pull = None
        if self.gradients is not None:
            out_keys += [join(GRADIENT, place.name) for place in found]
            pull = (self.gradients, tuple(found))
        return [Bound(tuple(steps), out_keys=tuple(out_keys), finish=_Finish(tuple(found)), pull=pull, stop=self.stop)]


@dataclasses.dataclass(frozen=True)
class Patch(_Adds):
    """Change activations while the model runs.

    Args:
        edits: for each place what is done there: a :class:`Site` names an activation inside a module, a string or
            tuple an entry of the TensorDict, changed right after the stage that wrote it (or before the model runs,
            where the model reads it). The values are edits (:class:`Replace`, :class:`Add`, :class:`Scale`,
            :class:`Ablate`) or callables ``(value, td) -> value``. Where a module runs several times each call is
            edited, unless the site says which.

    Edits act while the context is entered. A model that recomputes activations in its backward
    (``torch.utils.checkpoint``) must therefore be pulled back inside the context.

    Raises:
        BadKey: a path or an entry that does not exist.
        BadValue: at the call: an edit that changes the shape, a site that never ran.

    Examples:
        >>> from tdconcepts import Add
        >>> Patch({Site("net.2"): Add(1.0)})
        Patch({Site('net.2'): Add(vector=1.0, scale=1.0)})
    """

    edits: Mapping[Site | NestedKey, EditLike]

    def __post_init__(self) -> None:
        if not isinstance(self.edits, Mapping) or not self.edits:
            raise BadType("not a mapping of edits", got=repr(self.edits), needed='{Site("net.2"): Replace(0.0)}')
        for where, edit in self.edits.items():
            if not callable(edit):
                raise BadType(
                    f"the edit at {where!r} is none",
                    got=repr(edit),
                    needed="Replace, Add, Scale, Ablate or a callable (value, td) -> value",
                    fix=f"Replace({edit!r})",
                )
        checked = {where if isinstance(where, Site) else as_key(where): edit for where, edit in self.edits.items()}
        object.__setattr__(self, "edits", checked)

    def __hash__(self) -> int:
        return hash(tuple(self.edits))

    def __repr__(self) -> str:
        return f"Patch({dict(self.edits)!r})"

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """Resolve the sites and entries in ``module``."""
        paths = module_paths(module)
        steps: list[Step] = []
        before: list[tuple[NestedKey, EditLike]] = []
        in_keys: list[NestedKey] = []
        for where, edit in self.edits.items():
            in_keys += [as_key(key) for key in getattr(edit, "in_keys", ())]
            if not isinstance(where, Site) and where in module.in_keys and where not in module.out_keys:
                before.append((where, edit))
                continue
            for place in locate(module, where, paths):
                if isinstance(place.call, int) and place.call < 0:
                    raise BadValue(
                        "an edit can't know which call will be the last",
                        got=repr(where),
                        needed="call=0, 1, ... or none",
                    )
                steps.append(Step(place, _Apply(place, edit), every=True))
        keys = tuple(key for key in in_keys if key not in module.out_keys)
        return [
            Bound(
                tuple(steps),
                keys,
                edit_inputs=_EditInputs(tuple(before)) if before else None,
                only_through=tuple(key_text(k) for k, _ in before),
            )
        ]


@dataclasses.dataclass(frozen=True)
class Programs(_Adds):
    """Several programs on one model, in the order of addition: a capture after a patch sees what the patch made.

    Args:
        parts: the programs; ``a + b`` makes one of these.

    Examples:
        >>> from tdconcepts import Scale
        >>> Patch({"y": Scale(0.0)}) + Capture("1")
        Patch({'y': Scale(factor=0.0)}) + Capture('1')
    """

    parts: tuple[Any, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """Bind each part."""
        return [bound for part in self.parts for bound in part.bind(module)]


def capture(
    model: TensorDictModuleBase,
    *sites: Site | str,
    gradients: Target | None = None,
    stop: bool = False,
    clone: bool = False,
    detach: bool = True,
) -> Hooked:
    """``Capture(*sites, ...).on(model)``: a context whose module also writes what it captures.

    Args:
        model: a TensorDictModule.
        sites, gradients, stop, clone, detach: as for :class:`Capture`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), ["x"], ["y"])
        >>> with capture(net, "*", gradients=Target("y", 0)) as m:
        ...     td = m(TensorDict(x=torch.zeros(2, 4), batch_size=[2]))
        >>> td["activation", "1"].equal(td["y"]), td["gradient", "0"].shape
        (True, torch.Size([2, 3]))
    """
    return Capture(*sites, gradients=gradients, stop=stop, clone=clone, detach=detach).on(model)


def patch(model: TensorDictModuleBase, edits: Mapping[Site | NestedKey, EditLike]) -> Hooked:
    """``Patch(edits).on(model)``: a context whose module runs with changed activations.

    Args:
        model: a TensorDictModule.
        edits: as for :class:`Patch`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Replace
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), ["x"], ["y"])
        >>> with patch(net, {Site("0"): Replace(0.0)}) as m:
        ...     m(TensorDict(x=torch.ones(1, 4), batch_size=[1]))["y"].tolist()
        [[0.0, 0.0, 0.0]]
    """
    return Patch(edits).on(model)


class _Apply:
    """The step of an edit: pick the part that the site names, edit it, check it, put it back."""

    def __init__(self, place: Place, edit: EditLike) -> None:
        self.name, self.index, self.edit = place.name, place.part, edit

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        lead = 0
        if self.index is not None:
            batch = torch.Size([]) if run.td is None else run.td.batch_size
            lead = len(batch) if value.shape[: len(batch)] == batch else 1
        part = pick(value, self.index, lead)
        if isinstance(self.edit, Edit):
            new = self.edit(part, run.td)
        else:
            part = part.clone()  # it may be edited in place, and what a module is given or passes on is the caller's
            new = outside(run, self.edit, part, run.td)
            new = part if new is None else new
        return put(value, self.index, lead, checked_edit(new, part, self.name))


class _EditInputs:
    """Edits of entries that the model reads, made before it runs."""

    def __init__(self, edits: tuple[tuple[NestedKey, EditLike], ...]) -> None:
        self.edits = edits

    def __call__(self, td: TensorDictBase) -> None:
        for key, edit in self.edits:
            value = td.get(key)
            if value is None:
                raise BadKey(f"no entry {key_text(key)} to edit", needed=nearest(key, list(td.keys(True, True))))
            given = value if isinstance(edit, Edit) else value.clone()  # it may be edited in place
            new = edit(given, td)
            td.set(key, checked_edit(given if new is None else new, value, key_text(key)))


class _Finish:
    """The end of a capture: check every value, and write it."""

    def __init__(self, found: tuple[Place, ...]) -> None:
        self.found = found

    def __call__(self, run: Run, td: TensorDictBase) -> None:
        batch = td.batch_size
        values = {}
        for place in self.found:
            seen = run.store["capture", place.name]
            if place.call == "all":
                with normal_tensors():
                    values[place.name] = torch.stack([_final(each, place, batch) for each in seen], len(batch))
            else:
                values[place.name] = _final(seen[0], place, batch)
        found = td.get(ACTIVATION)
        if found is None:
            td.set(ACTIVATION, TensorDict(values, batch_size=batch))
        else:
            found.update(values)


def _final(seen: Seen, place: Place, batch: torch.Size) -> Tensor:
    value = align(settle(check_version(seen, place.name), batch), batch, place.name)
    return pick(value, place.part, len(batch))


def checked_edit(new: Any, old: Tensor, name: str) -> Tensor:
    """``new`` in the dtype and on the device of ``old``; raise where it is no tensor of that shape."""
    if not isinstance(new, Tensor) or new.shape != old.shape:
        raise BadValue(
            f"the edit at {name!r} gave another shape",
            got=f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}",
            needed=f"shape {list(old.shape)}",
        )
    return new if new.dtype == old.dtype and new.device == old.device else new.to(device=old.device, dtype=old.dtype)


def _parts(program: Any) -> tuple[Any, ...]:
    if not hasattr(program, "bind"):
        raise BadType(
            "not a program", got=repr(program), needed="Capture, Patch, a composite of rules, or a sum of these"
        )
    return program.parts if isinstance(program, Programs) else (program,)
