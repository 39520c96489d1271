"""Interventions in a model: a pipeline spliced in behind the stage that writes the concepts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Self, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
    dispatch,
    set_skip_existing,
)
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Hooked, Site, check_module, cut
from tdconcepts.interventions.pipeline import InterventionPipeline, Step
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.program import Intervention, described
from tdconcepts.interventions.selection import Selection
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import read_block, write
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

    In a graph of concepts (a :class:`~tdconcepts.concepts.GraphBottleneck`, a
    :class:`~tdconcepts.concepts.CausalBottleneck`) one block holds causes and effects. What the intervention replaces
    is then set as by ``do``, in ``("intervention", "do")`` (NaN elsewhere), and the graph is run once more: the edges
    into it are cut, and all that depends on it follows.

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
    writer: Any = before[-1] if _sets_itself(before, after, at) else None
    rest = tuple(after) if writer is None else (writer.leaning(at), *after)
    splice = Splice.described(at, found, space, rest=rest, before=tuple(before), out_key=out_key)
    pipeline = InterventionPipeline(UniformPolicy() if policy is None else policy, strategy, splice, **flags, **select)
    written = [key for key in pipeline.out_keys if key != at]
    added: list[TensorDictModuleBase] = [pipeline]
    if writer is not None:
        do = _Do(splice, writer.optional_keys[0])
        added += [do, writer.setting(do.out_keys[0])]
        written += do.out_keys
    check_writable(written, [*model.in_keys, *plain.out_keys, *pipeline.in_keys])
    result = _rebuilt(plain, before, added, after)
    return result if selected is None else result.select_out_keys(*selected, *written)


def _cut(model: TensorDictModuleBase, at: NestedKey) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
    """The stages before and after the intervention; refuses a place where it would change nothing."""
    if at in model.in_keys and at not in model.out_keys:
        before, after = cut(model, list(model.out_keys)[-1])
        return [], before + after
    before, after = cut(model, at)
    writer = before[-1]
    is_read = any(at in stage.in_keys for stage in after) or _sets_itself(before, after, at)
    if not is_read and (after or list(writer.out_keys) != [at]):
        raise BadValue(
            f"no stage reads {key_text(at)} after it is written: an intervention there would change nothing",
            got=f"{type(writer).__name__} with in_keys {list(writer.in_keys)}, out_keys {list(writer.out_keys)}",
            needed="a TensorDictSequential with the writer and the readers as stages of their own",
            fix="select keys, hang hooks and set partial_tolerant on the whole, not on a nested sequential",
        )
    return before, after


def _sets_itself(before: list[TensorDictModuleBase], after: list[TensorDictModuleBase], at: NestedKey) -> bool:
    """Whether the writer is a graph of concepts, whose values follow what is set among them."""
    is_read = any(at in stage.in_keys for stage in after)
    return bool(before) and not is_read and hasattr(before[-1], "setting")


class _Do(TensorDictModuleBase):
    """What an intervention has replaced, as a graph of concepts takes it: NaN where nothing is set.

    =======  ============================================  =================
    reads    ``"concepts"``                                ``[*B, C]``
    reads    ``("intervention", "mask")``                  ``[*B, C]``, bool
    reads    what is set already, where it is there        ``[*B, C]``
    writes   ``("intervention", "do")``                    ``[*B, C]``
    =======  ============================================  =================
    """

    def __init__(self, splice: Splice, given: NestedKey) -> None:
        super().__init__()
        self.in_keys: list[NestedKey] = [splice.at, splice.key("mask")]
        self.out_keys: list[NestedKey] = [splice.key("do")]
        self.optional_keys = [given]

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        value, mask = (read_block(tensordict, key) for key in self.in_keys)
        given = tensordict.get(self.optional_keys[0], None)
        left = value.new_full((), torch.nan) if given is None else given.to(value)
        return write(tensordict, self.out_keys[0], torch.where(mask, value, left))


def _rebuilt(
    model: TensorDictModuleBase,
    before: list[TensorDictModuleBase],
    added: list[TensorDictModuleBase],
    after: list[TensorDictModuleBase],
) -> TensorDictSequential:
    """The stages as one pipeline of the model's kind, under their names where they have some."""
    held = getattr(model, "module", None)
    names = {id(m): name for name, m in held.items()} if isinstance(held, nn.ModuleDict) else {}
    names |= {id(s): f"{what}_{len(before)}" for s, what in zip(added, ("intervention", "do", "again"), strict=False)}
    stages: list[TensorDictModuleBase] = [*before, *added, *after]
    named = OrderedDict((names.get(id(s), ""), s) for s in stages)
    has_names = len(named) == len(stages) and len(names) > len(added)
    arguments: tuple[Any, ...] = (named,) if has_names else tuple(stages)
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
