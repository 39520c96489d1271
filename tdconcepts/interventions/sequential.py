"""Greedy selection: one concept at a time, scored anew after each correction."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing

from tdconcepts.errors import BadValue
from tdconcepts.interventions.ranking import counted_mask
from tdconcepts.interventions.selection import SelectStage
from tdconcepts.interventions.spaces import is_visible, known_places
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import read_block, write
from tdconcepts.keys import key_text

__all__ = ["GreedyStage"]


class GreedyStage(TensorDictModuleBase):
    """Chooses concepts one at a time: score, replace the best, score again at the corrected concepts, and so on.

    ==========  =============================================================  ====================
    reads       ``"concepts"``, ``("intervention", "value")``                  ``[*B, C]``
    reads       what the policy and the selection read
    writes      ``("intervention", "score")``: when it was chosen, else last   ``[*B, C]``
    writes      ``("intervention", "mask")``                                   ``[*B, C]``, bool
    writes      ``("intervention", "order")``: 0 for the first, -1 for none    ``[*B, C]``, int64
    ==========  =============================================================  ====================

    Each row has its own order. The first n of an order are what n corrections would have been, so one run gives a whole
    intervention curve.

    Args:
        policy: the bound policy, or a TensorDictModule that writes the score.
        select: how many, of which; a budget is spent step by step.
        splice: where the intervention sits.

    Raises:
        BadValue: for a selection by probability, which has no order.

    Examples:
        >>> from tdconcepts.interventions import Do, InterventionPipeline, UncertaintyPolicy
        >>> pipeline = InterventionPipeline(UncertaintyPolicy(), Do(1.0), k=2, sequential=True)
        >>> pipeline.select_out_keys(("intervention", "order"))(concepts=torch.tensor([0.9, 0.4, 0.5])).tolist()
        [-1, 1, 0]
    """

    def __init__(self, policy: TensorDictModuleBase, select: SelectStage, splice: Splice) -> None:
        super().__init__()
        if select.is_random:
            raise BadValue("a selection by probability has no order", got="sequential=True", needed="k=, or another")
        self.score, self.select = policy, select
        self._keys = splice.at, splice.key("value"), splice.key("score"), splice.key("mask"), splice.key("order")
        self.in_keys = list(dict.fromkeys([*self._keys[:2], *policy.in_keys, *select.in_keys]))
        self.in_keys.remove(self._keys[2])
        self.out_keys = list(self._keys[2:])

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        at, value_key, score_key, mask_key, order_key = self._keys
        concepts, value = read_block(tensordict, at), read_block(tensordict, value_key)
        candidates, known = self.select.read(tensordict), known_places(value) if self.select.missing else None
        work = tensordict.copy()
        score = final = read_block(self.score(work), score_key)
        if score.shape != concepts.shape:
            needed = f"{list(concepts.shape)}, as {key_text(at)}"
            raise BadValue("score and concepts differ in shape", got=list(score.shape), needed=needed)
        units = self.select.units(score)
        allowed, counts = self.select.allowed(units, candidates, known)
        if self.select.is_off:
            allowed = torch.zeros_like(allowed)
        order = torch.full_like(units, -1, dtype=torch.long)
        budget = self.select.budget
        left = None if budget is None else units.new_full(units.shape[:-1], budget, dtype=torch.float64)
        rounds = counts if isinstance(counts, int) and left is None else units.shape[-1]
        for step in range(rounds):
            if step:
                replaced = self.select.columns(order >= 0)
                work.set(at, torch.where(replaced, value.to(concepts), concepts))
                score = read_block(self.score(work), score_key)
                final = torch.where(replaced, final, score)
            open_ = allowed & (order < 0)
            if left is not None:
                costs = self.select.costs(units)
                open_ = open_ & (costs <= left.unsqueeze(-1) + 1e-9 * (budget or 0.0))  # as in affordable_mask
            elif isinstance(counts, torch.Tensor):
                open_ = open_ & (step < counts).unsqueeze(-1)
            chosen = counted_mask(self.select.units(score), open_, 1)
            if is_visible(chosen) and not bool(chosen.any()):
                break
            order = torch.where(chosen, step, order)
            if left is not None:
                left = left - (chosen * costs).sum(-1)
        write(tensordict, score_key, final)
        order = self.select.columns(order)
        return tensordict.set(mask_key, order >= 0).set(order_key, order)
