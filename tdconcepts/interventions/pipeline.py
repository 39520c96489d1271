"""The intervention pipeline: score -> select -> value -> replace, spliced into a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.stages import check_module, cut
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.selection import SelectStage
from tdconcepts.interventions.stages import CallableStage, ReplaceStage, Splice
from tdconcepts.keys import INTERVENTION, NestedKey, as_key, check_writable, key_text

__all__ = ["InterventionPipeline", "intervene"]

Step: TypeAlias = TensorDictModuleBase | Callable[..., Any]


class InterventionPipeline(TensorDictSequential):
    """Changes a block of concepts: which (``policy``), how many (``fraction`` or ``k``), to what (``strategy``).

    The stages ``"score"``, ``"select"``, ``"value"`` and ``"replace"`` run one after the other:
    ``concepts = where(top_k(score), value, concepts)``.

    =======  ============================================================  =================
    reads    ``at``, and what policy and strategy read                     ``[*B, C]``
    writes   ``("intervention", "score")``: high = replaced first          ``[*B, C]``
    writes   ``("intervention", "mask")``: True = replaced                 ``[*B, C]``, bool
    writes   ``("intervention", "value")``                                 ``[*B, C]``
    writes   ``("intervention", "before")``: what ``at`` held              ``[*B, C]``
    writes   ``at``                                                        ``[*B, C]``
    =======  ============================================================  =================

    Args:
        policy: scores the concepts: a policy, a TensorDictModule that writes ``("intervention", "score")``, or a
            callable ``(concepts, td) -> score``.
        strategy: what to write: a strategy, a TensorDictModule that writes ``("intervention", "value")``, or a callable
            ``(concepts, td) -> value`` (the concepts are detached: no gradient comes back through what it computes).
        at: the entry of the concepts, or a :class:`~tdconcepts.interventions.stages.Splice` that says more.
        fraction: ``round(fraction * n)`` of the n candidates are replaced. Default, without ``k``: all.
        k: the number of concepts to replace, instead of ``fraction``.
        among: the candidates, by name or index. Default: all.
        straight_through: whether a replaced prediction gets the gradient of the value that replaced it.

    Raises:
        BadType: for a bare ``nn.Module``, a class where an instance is needed, or anything that can't be called.
        BadKey: for a module that does not write the score or value, and an unknown name in ``among``.
        BadValue: see :class:`~tdconcepts.interventions.selection.SelectStage`.

    Examples:
        >>> import torch
        >>> from tdconcepts.interventions import Do, UncertaintyPolicy
        >>> pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=1).select_out_keys("concepts")
        >>> pipeline(concepts=torch.tensor([[0.9, 0.4], [0.5, 0.1]])).tolist()
        [[0.8999999761581421, 1.0], [1.0, 0.10000000149011612]]
    """

    def __init__(
        self,
        policy: Step,
        strategy: Step,
        at: NestedKey | Splice = "concepts",
        *,
        fraction: float | None = None,
        k: int | None = None,
        among: Sequence[str | int] | None = None,
        straight_through: bool = False,
    ) -> None:
        splice = at if isinstance(at, Splice) else Splice(as_key(at))
        super().__init__(
            OrderedDict(
                score=_bound(policy, "score", splice),
                select=SelectStage(splice, fraction=fraction, k=k, among=among),
                value=_bound(strategy, "value", splice),
                replace=ReplaceStage(splice, straight_through=straight_through),
            )
        )

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        """The stages that lead from ``in_keys`` to ``out_keys``, as a plain :class:`TensorDictSequential`."""
        return TensorDictSequential(OrderedDict(self.module.items())).select_subsequence(in_keys, out_keys)


def intervene(
    model: TensorDictModuleBase,
    at: NestedKey = "concepts",
    *,
    policy: Step | None = None,
    strategy: Step,
    fraction: float | None = None,
    k: int | None = None,
    among: Sequence[str | int] | None = None,
    quantile: float | None = None,
    straight_through: bool = False,
    concepts: Any = None,
    out_key: NestedKey = INTERVENTION,
) -> TensorDictSequential:
    """A new pipeline that runs ``model`` with an intervention right after the stage that writes ``at``.

    The model is untouched, and its stages (with their parameters) are shared, not copied. A model that ends in a
    distribution stays a :class:`ProbabilisticTensorDictSequential` with ``get_dist``, so an actor stays an actor. An
    entry that the model only reads, such as an observation, can be intervened on too: then the intervention runs first.
    Interventions nest; those that follow each other on one entry write their score, mask, value and before over those
    of the first, unless given another ``out_key``.

    Args:
        model: a TensorDictSequential, or a TensorDictModule with ``at`` among its keys.
        at: the entry of the concepts, ``[*B, C]``.
        policy: as in :class:`InterventionPipeline`. Default: :class:`UniformPolicy`.
        strategy: as in :class:`InterventionPipeline`.
        fraction: the share of the candidates to replace, in [0, 1]. Default, without ``k``: all.
        k: their number instead.
        among: the candidates, by name or index. Default: all.
        quantile: another word for ``fraction``, for people from PyC; here it is one.
        straight_through: whether a replaced prediction gets the gradient of the value that replaced it.
        concepts: a :class:`~tdconcepts.ConceptSpec`, or the names of binary concepts. Default: what the model declares.
        out_key: the first name of the entries that are written.

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
    at = as_key(at)
    if fraction is not None and quantile is not None:
        raise BadValue("how many is said twice", got=f"fraction={fraction!r} and quantile={quantile!r}", needed="one")
    selected = _selected(check_module(model))
    plain = model if selected is None else _unselected(model)
    before, after = _cut(plain, at)
    splice = Splice(at, tuple(after), **_described(concepts, before, model), out_key=out_key)
    pipeline = InterventionPipeline(
        UniformPolicy() if policy is None else policy,
        strategy,
        splice,
        fraction=quantile if fraction is None else fraction,
        k=k,
        among=among,
        straight_through=straight_through,
    )
    check_writable(pipeline.out_keys, [*model.in_keys, *plain.out_keys])
    result = _rebuilt(plain, before, pipeline, after)
    return result if selected is None else result.select_out_keys(*selected, *(k for k in pipeline.out_keys if k != at))


def _bound(step: Any, name: str, splice: Splice) -> TensorDictModuleBase:
    """The stage that writes ``(out_key, name)``: ``step`` bound to the splice, as it is, or wrapped."""
    what = "the policy" if name == "score" else "the strategy"
    if isinstance(step, type):
        fix = f"{step.__name__}(...)"
        raise BadType(f"{what} is a class", got=step.__name__, needed="an instance", fix=fix)
    if isinstance(step, TensorDictModuleBase):
        bound = step.bind(splice) if hasattr(type(step), "bind") else step
        if splice.key(name) not in bound.out_keys:
            got, needed = (
                f"a module that writes {list(bound.out_keys)}",
                f"one that writes {key_text(splice.key(name))}",
            )
            raise BadKey(f"{what} writes something else", got=got, needed=needed)
        return bound
    if isinstance(step, nn.Module) or not callable(step):
        key = splice.key(name)
        fix = f"TensorDictModule(module, in_keys=[{key_text(splice.at)}], out_keys=[{key}])"
        raise BadType(
            f"{what} has no keys", got=f"{type(step).__name__}", needed="a TensorDictModule or a function", fix=fix
        )
    return CallableStage(step, name).bind(splice)


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


def _described(concepts: Any, before: Sequence[TensorDictModuleBase], model: nn.Module) -> dict[str, Any]:
    """Names, cardinalities and space: as given, or as declared by the stage that writes the entry, or by the model."""
    for holder in (before[-1] if before else None, model):
        found = getattr(holder, "concepts", None)
        if isinstance(getattr(found, "cardinalities", None), tuple):
            break
    else:
        holder, found = None, None
    given = found if concepts is None else concepts
    if isinstance(given, (list, tuple)):
        names: Any = tuple(given)
        cardinalities: Any = (1,) * len(names)
    else:
        names, cardinalities = getattr(given, "names", None), getattr(given, "cardinalities", None)
    if concepts is not None and not (isinstance(names, tuple) and isinstance(cardinalities, tuple)):
        raise BadType("not a description of concepts", got=repr(concepts), needed="a ConceptSpec or a list of names")
    return {"names": names, "cardinalities": cardinalities, "space": getattr(holder, "space", None)}


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
        return ProbabilisticTensorDictSequential(*arguments, return_composite=model.return_composite)
    return TensorDictSequential(*arguments)


def _selected(model: TensorDictModuleBase) -> list[NestedKey] | None:
    return list(model.out_keys) if getattr(model, "_select_before_return", False) else None


def _unselected(model: TensorDictModuleBase) -> TensorDictModuleBase:
    """A shallow copy that writes all its keys; the stages are the same objects."""
    plain = copy.copy(model)
    plain._select_before_return = False
    return plain.reset_out_keys()
