"""The intervention pipeline: value -> score -> select -> replace, as stages or in one go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias, Unpack, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, skip_existing
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType
from tdconcepts.hooks.calling import has_entry, set_entries
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.selection import Selection, SelectStage
from tdconcepts.interventions.sequential import GreedyStage
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import CallableStage, ConceptStage, ReplaceStage, check_unlocked, read_block
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["InterventionPipeline", "Step"]

Step: TypeAlias = TensorDictModuleBase | Callable[..., Any]


class InterventionPipeline(TensorDictSequential):
    """Changes a block of concepts: which (``policy``), how many (``fraction``, ``k``, ...), to what (``strategy``).

    ``concepts = where(top_k(score), value, concepts)``, by the stages ``"value"``, ``"score"``, ``"select"`` and
    ``"replace"``. They can be looked at, exchanged and run one by one; where nothing hangs on them they run in one go,
    with the same results.

    =======  ============================================================  =================
    reads    ``at``, and what policy, strategy and selection read          ``[*B, C]``
    writes   ``("intervention", "value")``                                 ``[*B, C]``
    writes   ``("intervention", "score")``: high = replaced first          ``[*B, C]``
    writes   ``("intervention", "mask")``: True = replaced                 ``[*B, C]``, bool
    writes   ``("intervention", "before")``: what ``at`` held              ``[*B, C]``
    writes   ``at``                                                        ``[*B, C]``
    =======  ============================================================  =================

    Where the value is NaN (a label that is not known) a concept keeps its prediction, and the mask is False. What is
    the same for all rows (a constant, the score of a policy that is fixed) takes no memory for each of them: its rows
    are views of one; a value that is written as it is (labels of the same dtype, a parameter) shares the memory that it
    comes from. So ``clone()`` a score or a value before you write into it. The mask, and what stands at ``at`` then,
    have memory of their own.

    With ``sequential`` the stages are ``"value"``, ``"greedy"`` (a :class:`~tdconcepts.interventions.GreedyStage`,
    which writes ``("intervention", "order")`` too) and ``"replace"``.

    Args:
        policy: scores the concepts: a policy, a TensorDictModule that writes ``("intervention", "score")``, or a
            callable ``(concepts, td) -> score``.
        strategy: what to write: a strategy, a TensorDictModule that writes ``("intervention", "value")``, or a callable
            ``(concepts, td) -> value`` (the concepts are detached: no gradient comes back through what it computes).
        at: the entry of the concepts, or a :class:`~tdconcepts.interventions.Splice` that says more.
        sequential: whether concepts are replaced one at a time, and scored anew after each.
        straight_through: whether a replaced prediction gets the gradient of the value that replaced it.
        select: how many, and of which: see :class:`~tdconcepts.interventions.Selection`.

    Raises:
        BadType: for a bare ``nn.Module``, a class where an instance is needed, or anything that can't be called.
        BadKey: for a module that does not write the score or value, and an unknown name in ``among``.
        BadValue: see :class:`~tdconcepts.interventions.SelectStage`.

    Examples:
        >>> import torch
        >>> from tdconcepts.interventions import Do, UncertaintyPolicy
        >>> pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=1).select_out_keys("concepts")
        >>> pipeline(concepts=torch.tensor([[0.9, 0.4], [0.5, 0.1]])).tolist()
        [[0.8999999761581421, 1.0], [1.0, 0.10000000149011612]]
    """

    is_sequence = True  # its stages may be taken apart, although it has a forward of its own

    def __init__(
        self,
        policy: Step,
        strategy: Step,
        at: NestedKey | Splice = "concepts",
        *,
        sequential: bool = False,
        straight_through: bool = False,
        **select: Unpack[Selection],
    ) -> None:
        splice = at if isinstance(at, Splice) else Splice(as_key(at))
        value, score = _bound(strategy, "value", splice), _bound(policy, "score", splice)
        chooser = SelectStage(splice, missing=True, **select)
        temperature = getattr(score, "temperature", None)
        replace = ReplaceStage(splice, straight_through=straight_through, temperature=temperature)
        middle = {"greedy": GreedyStage(score, chooser, splice)} if sequential else {"score": score, "select": chooser}
        super().__init__(OrderedDict(value=value, **middle, replace=replace))

    @property
    def concepts(self) -> Splice:
        """What is known about the concepts."""
        return cast(Splice, self["replace"].concepts)

    @property
    def space(self) -> str | None:
        """What the entry holds, where it is known."""
        return self.concepts.space

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stages: in one go where all are ours, nothing hangs on them, and nothing special is asked for."""
        if len(args) == 1 and not kwargs and (type(args[0]) is TensorDict or isinstance(args[0], TensorDictBase)):
            stages = cast(Any, self._modules["module"])._modules.values()
            if self.inplace is None and not skip_existing() and _is_ours(stages):
                return _in_one_go(args[0], self.out_keys if self._select_before_return else None, *stages)
        return super().forward(*args, **kwargs)

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        """The stages that lead from ``in_keys`` to ``out_keys``, as a plain :class:`TensorDictSequential`."""
        return TensorDictSequential(OrderedDict(self.module.items())).select_subsequence(in_keys, out_keys)


def _is_ours(stages: Collection[Any]) -> bool:
    """Whether the stages are four of this package, with nothing on them that a run in one go would pass by."""
    if [vars(stage).get("forward", type(stage).forward) for stage in stages] != _FORWARDS:
        return False
    for stage in stages:  # noqa: SIM110 - a generator takes longer
        if stage._forward_hooks or stage._forward_pre_hooks:
            return False
    return True


_FORWARDS = [kind.forward for kind in (ConceptStage, ConceptStage, SelectStage, ReplaceStage)]


def _in_one_go(
    tensordict: TensorDictBase,
    selected: Collection[NestedKey] | None,
    value: ConceptStage,
    score: ConceptStage,
    select: SelectStage,
    replace: ReplaceStage,
) -> TensorDictBase:
    """What the four stages do one after the other: the same entries, without the way in and out of each stage."""
    at, mask_key, value_key, before_key, score_key = replace.keys
    concepts = read_block(tensordict, at)
    check_unlocked(tensordict, at)
    plain = concepts.detach() if concepts.requires_grad else concepts
    new, known = value.known(plain, tensordict)
    mask: Tensor | None
    ranks: Tensor | None
    every = known is None and select.is_everything(plain.shape[-1])
    copied, fits = every and replace.needs_no_mask(concepts), True
    apart = not has_entry(tensordict, value_key[0])
    shown = not apart or selected is None or score_key in selected or mask_key in selected
    if not shown and copied and type(score).compute is UniformPolicy.compute:
        ranks = mask = None
    elif score.fixed and select.is_exact and known is None and not every:  # one row says it for all
        ranks = score.compute(plain.new_zeros(plain.shape[-1:]), tensordict)
        mask = select.mask(ranks).expand_as(plain).contiguous()
        ranks = ranks.expand_as(plain)
    else:
        source = tensordict
        if not score.fixed and (score.sees_value or value_key in score.in_keys):
            source = tensordict.copy().set(value_key, new)
        ranks = score.compute(plain, source)
        if every:
            fits = ranks.shape == plain.shape
            mask = torch.ones_like(plain if fits else ranks, dtype=torch.bool)
        else:
            mask = select.mask(ranks, select.read(tensordict), known)
    if mask is None or (copied and fits):
        result = replace.all_replaced(concepts, new)
    else:
        result = replace.replaced(concepts, mask, new, ranks)
    if selected is None and apart and len(value_key) == 2:
        group = {value_key[1]: new, score_key[1]: ranks, mask_key[1]: mask, before_key[1]: concepts}
        return set_entries(tensordict, {value_key[0]: group, at: result})
    found = {value_key: new, score_key: ranks, mask_key: mask, before_key: concepts, at: result}
    if selected is not None:
        there = () if apart else tensordict.keys(True)
        found = {key: entry for key, entry in found.items() if key == at or key in selected or key in there}
    return set_entries(tensordict, found)


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
