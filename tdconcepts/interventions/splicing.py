"""Interventions in a model: a pipeline spliced in behind the stage that writes the concepts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Self, Unpack

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Hooked, Site, check_module, cut
from tdconcepts.interventions.pipeline import InterventionPipeline, Step
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.program import Intervention, described
from tdconcepts.interventions.selection import Selection
from tdconcepts.interventions.splice import Splice
from tdconcepts.keys import INTERVENTION, NestedKey, as_key, check_writable, key_text

__all__ = ["intervene"]


def intervene(
    model: TensorDictModuleBase,
    at: NestedKey | Site = "concepts",
    *,
    policy: Step | None = None,
    strategy: Step,
    quantile: float | None = None,
    sequential: bool = False,
    straight_through: bool = False,
    concepts: Any = None,
    out_key: NestedKey = INTERVENTION,
    **select: Unpack[Selection],
) -> TensorDictSequential | Hooked:
    """A new pipeline that runs ``model`` with an intervention right after the stage that writes ``at``.

    ``with intervene(policy, "concept", strategy=Do(0.0)) as fixed:`` reads as it does for hooks; the result can be
    used without it, too. The model is untouched, and its stages (with their parameters) are shared, not copied. A
    model that ends in a distribution stays a :class:`ProbabilisticTensorDictSequential` with ``get_dist``, so an
    actor stays an actor. An entry that the model only reads, such as an observation, can be intervened on too: then
    the intervention runs first. At a :class:`~tdconcepts.Site`, an activation inside a module, the model runs under
    a hook: the result is that of :class:`~tdconcepts.interventions.Intervention`. Interventions nest; those that
    follow each other on one entry write their score, mask, value and before over those of the first, unless given
    another ``out_key``.

    Args:
        model: a TensorDictSequential, or a TensorDictModule with ``at`` among its keys.
        at: the entry of the concepts, ``[*B, C]``, or a site.
        policy: as in :class:`InterventionPipeline`. Default: :class:`UniformPolicy`.
        strategy: as in :class:`InterventionPipeline`.
        quantile: another word for ``fraction``, for people from PyC; here it is one.
        sequential: whether concepts are replaced one at a time, and scored anew after each.
        straight_through: whether a replaced prediction gets the gradient of the value that replaced it.
        concepts: a :class:`~tdconcepts.concepts.ConceptSpec`, or the names of binary concepts. Default: what the model
            declares.
        out_key: the first name of the entries that are written.
        select: how many, and of which: ``fraction``, ``k``, ``budget``, ``probability``, ``among`` and more, see
            :class:`~tdconcepts.interventions.Selection`. Default: all.

    Raises:
        BadType: for a bare ``nn.Module``, as model, policy or strategy.
        BadKey: for an entry that the model does not know, an unknown name in ``among``, an ``out_key`` that clashes.
        BadValue: for a number out of range, and where the change would reach no later stage.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from tdconcepts.interventions import GroundTruth, UncertaintyPolicy
        >>> head = Mod(nn.Linear(3, 2), ["concepts"], ["logits"])
        >>> model = TensorDictSequential(Mod(nn.Sigmoid(), ["x"], ["concepts"]), head)
        >>> fixed = intervene(model, at="concepts", policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), k=1)
        >>> td = fixed(TensorDict({"x": torch.tensor([[0.1, 2.0, -2.0]]), "labels": torch.tensor([[1, 1, 0]])}, [1]))
        >>> td["concepts"].round(decimals=2), td["intervention", "mask"]
        (tensor([[1.0000, 0.8800, 0.1200]]), tensor([[ True, False, False]]))
    """
    if select.get("fraction") is not None and quantile is not None:
        got = f"fraction={select['fraction']!r} and quantile={quantile!r}"
        raise BadValue("how many is said twice", got=got, needed="one")
    if quantile is not None:
        select["fraction"] = quantile
    check_module(model)
    flags = {"sequential": sequential, "straight_through": straight_through}
    if isinstance(at, Site):
        program = Intervention(strategy, policy, at, concepts=concepts, out_key=out_key, **flags, **select)
        return program.on(model)
    at = as_key(at)
    selected = _selected(model)
    plain = model if selected is None else _unselected(model)
    before, after = _cut(plain, at)
    found, space = described(concepts, before[-1] if before else None, model)
    splice = Splice.described(at, found, space, rest=tuple(after), before=tuple(before), out_key=out_key)
    pipeline = InterventionPipeline(UniformPolicy() if policy is None else policy, strategy, splice, **flags, **select)
    check_writable(pipeline.out_keys, [*model.in_keys, *plain.out_keys])
    result = _rebuilt(plain, before, pipeline, after)
    return result if selected is None else result.select_out_keys(*selected, *(k for k in pipeline.out_keys if k != at))


def _cut(model: TensorDictModuleBase, at: NestedKey) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
    """The stages before and after the intervention; refuses a place where it would change nothing."""
    if at in model.in_keys and at not in model.out_keys:
        before, after = cut(model, list(model.out_keys)[-1])
        return [], before + after
    before, after = cut(model, at)
    writer = before[-1]
    is_read = any(at in stage.in_keys for stage in after)
    if not is_read and (after or list(writer.out_keys) != [at]):
        raise BadValue(
            f"no stage reads {key_text(at)} after it is written: an intervention there would change nothing",
            got=f"{type(writer).__name__} with in_keys {list(writer.in_keys)}, out_keys {list(writer.out_keys)}",
            needed="a TensorDictSequential with the writer and the readers as stages of their own",
            fix="select keys, hang hooks and set partial_tolerant on the whole, not on a nested sequential",
        )
    return before, after


def _rebuilt(
    model: TensorDictModuleBase,
    before: list[TensorDictModuleBase],
    pipeline: InterventionPipeline,
    after: list[TensorDictModuleBase],
) -> TensorDictSequential:
    """The stages as one pipeline of the model's kind, under their names where they have some."""
    held = getattr(model, "module", None)
    names = {id(m): name for name, m in held.items()} if isinstance(held, nn.ModuleDict) else {}
    stages: list[TensorDictModuleBase] = [*before, pipeline, *after]
    named = OrderedDict((names.get(id(s), f"intervention_{len(before)}"), s) for s in stages)
    arguments: tuple[Any, ...] = (named,) if len(named) == len(stages) and names else tuple(stages)
    if isinstance(model, ProbabilisticTensorDictSequential):
        return SplicedPolicy(*arguments, return_composite=model.return_composite)
    return Spliced(*arguments)


class _Context:
    """``with intervene(...) as fixed:`` reads as it does for hooks; there is nothing to undo."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        return None


class Spliced(_Context, TensorDictSequential):
    """A pipeline with an intervention in it."""


class SplicedPolicy(_Context, ProbabilisticTensorDictSequential):
    """A policy with an intervention in it."""


def _selected(model: TensorDictModuleBase) -> list[NestedKey] | None:
    return list(model.out_keys) if getattr(model, "_select_before_return", False) else None


def _unselected(model: TensorDictModuleBase) -> TensorDictModuleBase:
    """A shallow copy that writes all its keys; the stages are the same objects."""
    plain = copy.copy(model)
    plain._select_before_return = False
    return plain.reset_out_keys()
