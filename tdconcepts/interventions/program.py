"""Interventions as programs: frozen descriptions that add up with each other, with captures and with patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import Bound, Hooked, Patch, Programs, Site, check_module, cut, locate
from tdconcepts.hooks.calling import check_dense
from tdconcepts.interventions.pipeline import InterventionPipeline, Step
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.selection import Selection
from tdconcepts.interventions.splice import Splice
from tdconcepts.keys import ACTIVATION, INTERVENTION, NestedKey, as_key, check_writable, join, key_text

__all__ = ["Intervention", "Options", "described"]


class Options(Selection, total=False):
    """A selection, and how it is carried out: see :class:`~tdconcepts.interventions.InterventionPipeline`."""

    sequential: bool
    straight_through: bool


class Intervention:
    """An intervention without a model: data that prints, pickles, adds with ``+``, and is bound by :meth:`on`.

    ``at`` is an entry of the TensorDict, or a :class:`~tdconcepts.Site`, an activation inside a module ``[*B, C]`` (of
    more dims, all but the last are rows). Sums act in the order of addition, a later one on what an earlier one wrote,
    and take captures and patches too. At a site, a policy's gradient is that of the unchanged model.

    =======  ================================================================  =================
    reads    the model's ``in_keys``, and what policy and strategy read        as they do
    writes   the model's ``out_keys``                                          as it does
    writes   ``(out_key, "score")``, ``"mask"``, ``"value"``, ``"before"``     ``[*B, C]``
    =======  ================================================================  =================

    Args:
        strategy: as in :class:`~tdconcepts.interventions.InterventionPipeline`.
        policy: as there. Default: :class:`~tdconcepts.interventions.UniformPolicy`.
        at: the entry or site.
        concepts: as in :func:`~tdconcepts.interventions.intervene`; at a site a ConceptSpec or names, default none.
        out_key: the first name of the entries that are written; each intervention of a sum needs one of its own.
        options: as in :func:`~tdconcepts.interventions.intervene`.

    Raises:
        BadType, BadKey, BadValue: as :func:`~tdconcepts.interventions.intervene`, when it is bound.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Capture
        >>> from tdconcepts.interventions import Do
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), ["x"], ["y"])
        >>> program = Intervention(Do(0.0), at=Site("0"), k=2) + Capture("1")
        >>> with program.on(net) as fixed:
        ...     td = fixed(TensorDict(x=torch.ones(1, 2), batch_size=[1]))
        >>> td["activation", "1"][:, :2].tolist(), td["intervention", "mask"].tolist()
        ([[0.0, 0.0]], [[True, True, False]])
    """

    def __init__(
        self,
        strategy: Step,
        policy: Step | None = None,
        at: NestedKey | Site = "concepts",
        *,
        concepts: Any = None,
        out_key: NestedKey = INTERVENTION,
        **options: Unpack[Options],
    ) -> None:
        self.strategy, self.policy = strategy, policy
        self.at = at if isinstance(at, Site) else as_key(at)
        self.concepts, self.out_key, self.options = concepts, as_key(out_key), options

    def __repr__(self) -> str:
        said = [repr(self.strategy)] + ([] if self.policy is None else [repr(self.policy)])
        said += [f"at={self.at!r}", *(f"{name}={value!r}" for name, value in self.options.items())]
        return f"Intervention({', '.join(said)})"

    def __add__(self, other: Any) -> Programs:
        if not hasattr(other, "bind"):
            needed = "an Intervention, Capture, Patch, or a sum of these"
            raise BadType("not a program", got=repr(other), needed=needed)
        return Programs((self, *(other.parts if isinstance(other, Programs) else (other,))))

    def on(self, module: TensorDictModuleBase) -> Hooked:
        """Bind to ``module``: a context manager that is a TensorDictModule."""
        return Hooked(check_module(module), self)

    def bind(self, module: TensorDictModuleBase) -> list[Bound]:
        """Resolve the place, the names and the keys in ``module``."""
        splice = self._splice(module)
        policy = UniformPolicy() if self.policy is None else self.policy
        pipeline = InterventionPipeline(policy, self.strategy, splice, **self.options)
        written = tuple(key for key in pipeline.out_keys if key != splice.at)
        check_writable(written, [*module.in_keys, *module.out_keys, *pipeline.in_keys])
        (bound,) = Patch({self.at: _Edit(pipeline, splice)}).bind(module)
        first = _Present(bound.in_keys, bound.edit_inputs)
        return [bound._replace(out_keys=written, edit_inputs=first, finish=_Finish(written))]

    def _splice(self, module: TensorDictModuleBase) -> Splice:
        if isinstance(self.at, Site):
            found = locate(module, self.at)
            if len(found) > 1:
                names = [place.name for place in found][:6]
                fix = "add one Intervention for each, with out_keys of their own"
                raise BadValue(f"{self.at!r} names several places", got=names, needed="one", fix=fix)
            given, key = self.concepts, join(ACTIVATION, self.at.key)
            return Splice.described(key, given, rest=(module,), out_key=self.out_key, site=self.at)
        before: tuple[TensorDictModuleBase, ...]
        if self.at in module.in_keys and self.at not in module.out_keys:
            first, last = cut(module, list(module.out_keys)[-1])
            before, rest = (), (*first, *last)
        else:
            first, last = cut(module, self.at)
            before, rest = tuple(first), tuple(last)
            if hasattr(before[-1], "setting") and not any(self.at in stage.in_keys for stage in rest):
                got = f"an edit of {key_text(self.at)}, which the graph has followed already"
                raise BadValue("nothing would follow in a graph of concepts", got=got, fix="intervene(model, ...)")
        concepts, space = described(self.concepts, before[-1] if before else None, module)
        return Splice.described(self.at, concepts, space, rest=rest, before=before, out_key=self.out_key)


def described(concepts: Any, writer: TensorDictModuleBase | None, model: nn.Module) -> tuple[Any, str | None]:
    """What is known about the concepts and their space: as given, or as declared by their writer, or by the model."""
    for holder in (writer, model):
        found = getattr(holder, "concepts", None)
        if isinstance(getattr(found, "cardinalities", None), tuple):
            break
    else:
        holder, found = None, None
    return found if concepts is None else concepts, getattr(holder, "space", None)


class _Edit:
    """The edit of an intervention: the pipeline on the value, and on the entries that it reads besides."""

    def __init__(self, pipeline: InterventionPipeline, splice: Splice) -> None:
        self.pipeline, self.at = pipeline, splice.at
        self.in_keys = [key for key in pipeline.in_keys if key != splice.at]

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        entries = {} if td is None else {key: td.get(key, None) for key in self.in_keys}
        missing = [key for key in self.in_keys if entries.get(key) is None]
        if td is None and missing:
            got = "a direct call of the model with tensors"
            raise BadKey(f"no entry {key_text(missing[0])}", got=got, needed="a call with a TensorDict")
        check_dense(value, key_text(self.at))
        batch = torch.Size([]) if td is None or value.shape[: td.batch_dims] != td.batch_size else td.batch_size
        local = TensorDict({key: entry for key, entry in entries.items() if entry is not None}, batch)
        self.pipeline(local.set(self.at, value))
        if td is not None and not td.is_locked:
            for key in self.pipeline.out_keys:
                if key != self.at:
                    td.set(key, local.get(key))
        return cast(Tensor, local.get(self.at))


class _Present:
    """Before the model runs: the entries that the pipeline needs are there; then the edits of what it reads."""

    def __init__(self, keys: tuple[NestedKey, ...], then: Callable[[TensorDictBase], None] | None) -> None:
        self.keys, self.then = keys, then

    def __call__(self, td: TensorDictBase) -> None:
        missing = [key for key in self.keys if td.get(key, None) is None]
        if missing:
            have = list(td.keys(True, True))
            needed = nearest(missing[0], have)
            raise BadKey(f"no entry {key_text(missing[0])} in the TensorDict", got=f"entries {have}", needed=needed)
        if self.then is not None:
            self.then(td)


class _Finish:
    """The end of a run: what the edit has written into the TensorDict that ran goes to the one that was given."""

    def __init__(self, keys: tuple[NestedKey, ...]) -> None:
        self.keys = keys

    def __call__(self, run: Any, td: TensorDictBase) -> None:
        for key in self.keys if run.td is not td else ():
            td.set(key, run.td.get(key))
