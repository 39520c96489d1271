"""Losses as stages: each writes a number for each row, and one adds them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.concepts.spec import ConceptSpec, Run
from tdconcepts.concepts.stage import BlockStage, as_spec, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, join

__all__ = ["CompletenessLoss", "ConceptLoss", "LeakageLoss", "TotalLoss"]

LOSS = "loss"


class ConceptLoss(BlockStage):
    r"""How far a block is from its labels: cross-entropy for binary and categorical columns, squared error for
    continuous ones.

    :math:`\ell = \sum_k w_k m_k \ell_k / \sum_k w_k m_k` over the K concepts, with :math:`m_k = 0` where the label is
    missing (NaN), so that it takes no part; 0 for a row without labels. ``reduction="sum"`` leaves the denominator out.
    A task is a block too: ``ConceptLoss(ConceptSpec(["digit"], [10]), {"logits": "digit"}, "task")``.

    =======  =========================  ==============================================================
    reads    ``"concepts_logits"``      ``[*B, C]``
    reads    ``"labels"``               ``[*B, K]`` numbers (``[*B]`` for one concept) or ``[*B, C]`` columns
    writes   ``("loss", name)``         ``[*B]``
    =======  =========================  ==============================================================

    Args:
        concepts: what the columns mean.
        keys: the entry of the block and the entry of the labels, default ``{"concepts_logits": "labels"}``.
        name: what the loss is called.
        weights: :math:`w_k` by the name of a concept or group; 1 for those that are not named.
        space: what the block holds, ``"logits"`` (default) or ``"probs"``.
        reduction: ``"mean"`` (default) or ``"sum"`` over the concepts.

    Raises:
        BadKey: for a weight of no concept, with the nearest names, and a missing entry.
        BadValue: for entries of another shape, labels that can't be, and a weight below 0.

    Examples:
        >>> loss = ConceptLoss(ConceptSpec(["wing", "beak"]))
        >>> loss(concepts_logits=torch.zeros(2), labels=torch.tensor([1.0, float("nan")])).item()
        0.693...
    """

    def __init__(
        self,
        concepts: ConceptSpec | Sequence[str],
        keys: Mapping[NestedKey, NestedKey] | None = None,
        name: str = "concepts",
        weights: Mapping[str, float] | None = None,
        space: Literal["logits", "probs"] = "logits",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        pairs = list((keys or {"concepts_logits": "labels"}).items())
        if len(pairs) != 1:
            raise BadValue("a loss compares one block with one entry of labels", got=repr(keys), needed="one pair")
        if space not in ("logits", "probs") or reduction not in ("mean", "sum"):
            got = f"space={space!r}, reduction={reduction!r}"
            raise BadValue("not an option", got=got, needed='space "logits" or "probs", reduction "mean" or "sum"')
        super().__init__(pairs[0], [join(LOSS, name)])
        self.concepts, self.space, self.reduction = as_spec(concepts), space, reduction
        by_name = dict.fromkeys(self.concepts.names, 1.0)
        for group, weight in (weights or {}).items():
            if not weight >= 0:
                raise BadValue(f"not the weight of {group!r}", got=repr(weight), needed="a number of 0 or more")
            by_name |= dict.fromkeys(self.concepts.members([group]), float(weight))
        self.register_buffer("weights", torch.tensor(list(by_name.values())), persistent=False)

    def compute(self, *entries: Tensor) -> Tensor:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        targets = self.concepts.targets(entries[1], block)
        parts = [self._part(run, block, targets) for run in self.concepts.runs]
        losses, known = (p[0] if len(p) == 1 else torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
        weights = self.weights.to(block) * known
        total = (torch.where(known, losses, 0) * weights).sum(-1)
        return total if self.reduction == "sum" else total / weights.sum(-1).where(weights.any(-1), 1)

    def _part(self, run: Run, block: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each concept of a run and whether it is known, both ``[*B, k]``."""
        shape = (run.last - run.first, run.cardinality)
        found, wanted = block[..., run.start : run.stop], targets[..., run.start : run.stop]
        missing = wanted.isnan()
        wanted = wanted.masked_fill(missing, 0)
        if run.kind == "binary":
            if self.space == "logits":
                return F.binary_cross_entropy_with_logits(found, wanted, reduction="none"), ~missing
            return F.binary_cross_entropy(found, wanted, reduction="none"), ~missing
        found, wanted = found.unflatten(-1, shape), wanted.unflatten(-1, shape)
        known = ~missing.unflatten(-1, shape).any(-1)
        if run.kind == "continuous":
            return (found - wanted).square().mean(-1), known
        logs = found.log_softmax(-1) if self.space == "logits" else found.clamp(min=torch.finfo(found.dtype).tiny).log()
        return -(wanted * logs).sum(-1), known


class LeakageLoss(BlockStage):
    r"""What the errors of the concepts tell about the task, as the share of the task's variance that they explain.

    Leakage is information on the task that soft concepts carry beside their labels. With the residual
    :math:`r = c - y_c` of each column and the columns :math:`t` of the task, both centred over the batch,
    :math:`\ell = \frac{1}{CT} \sum_{ct} \mathrm{cov}(r_c, t_t)^2 / (\mathrm{var}(r_c) \mathrm{var}(t_t))`: the mean
    squared correlation, 0 where errors are unrelated to the task, and the same number for each row.

    =======  =====================  ======================================
    reads    ``"concepts"``         ``[*B, C]``
    reads    ``"labels"``           as :class:`ConceptLoss`
    reads    ``"task"``             as :class:`ConceptLoss`, for the task
    writes   ``("loss", name)``     ``[*B]``
    =======  =====================  ======================================

    Args:
        concepts: what the columns of the concepts mean.
        task: what the columns of the task mean, such as ``ConceptSpec(["digit"], [10])``.
        keys: the entries of concepts, labels and task, in this order.
        name: what the loss is called.

    Raises:
        BadValue: for other than three keys, and entries of another shape.

    Source: after Mahinpei et al., Promises and Pitfalls of Black-Box Concept Learning Models, 2021 (what leakage is);
    Havasi et al., Addressing Leakage in Concept Bottleneck Models, NeurIPS 2022.

    Examples:
        >>> loss = LeakageLoss(["wing"], ["is a bird"])
        >>> labels, task = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[1.0], [0], [1], [0]])
        >>> [loss(labels * 0.8 + x * task, labels, task)[0].item() for x in (0.0, 0.1)]
        [0.0, 0.2...]
    """

    def __init__(
        self,
        concepts: ConceptSpec | Sequence[str],
        task: ConceptSpec | Sequence[str],
        keys: Sequence[NestedKey] = ("concepts", "labels", "task"),
        name: str = "leakage",
    ) -> None:
        if len(keys) != 3:
            raise BadValue("leakage is between three entries", got=repr(keys), needed="concepts, labels, task")
        super().__init__(keys, [join(LOSS, name)])
        self.concepts, self.task = as_spec(concepts), as_spec(task)

    def compute(self, *entries: Tensor) -> Tensor:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        like = block.detach()[..., :1].expand(*block.shape[:-1], self.task.size)
        residual = block - self.concepts.targets(entries[1], block)
        task = self.task.targets(entries[2], like)
        rows = (-1, residual.shape[-1]), (-1, task.shape[-1])
        residual, task = _centred(residual.reshape(rows[0])), _centred(task.reshape(rows[1]))
        covariance = residual.mT @ task
        spread = residual.square().sum(0).unsqueeze(-1) * task.square().sum(0)
        tiny = torch.finfo(spread.dtype).tiny ** 0.5
        share = torch.where(spread > tiny, covariance.square() / spread.clamp(min=tiny), 0)
        return share.mean().expand(block.shape[:-1])


class CompletenessLoss(BlockStage):
    r"""What a black box knows about the task and the concepts don't: :math:`\mathrm{KL}(p_\mathrm{reference} \| p)`.

    0 where the concepts are enough to say all that the reference says. No gradient reaches the reference.

    =======  =======================  ============
    reads    ``"logits"``             ``[*B, T]``
    reads    ``"reference"``          ``[*B, T]``, logits
    writes   ``("loss", name)``       ``[*B]``
    =======  =======================  ============

    Args:
        task: what the columns of the task mean, such as ``ConceptSpec(["digit"], [10])``.
        keys: the entry of the concept model's logits and that of the reference's.
        name: what the loss is called.

    Raises:
        BadValue: for a task with continuous columns, and entries of another shape.

    Source: after Yeh et al., On Completeness-aware Concept-Based Explanations, NeurIPS 2020, section 3.

    Examples:
        >>> loss = CompletenessLoss(ConceptSpec(["digit"], [3]))
        >>> loss(logits=torch.zeros(3), reference=torch.tensor([2.0, 0.0, 0.0])).item()
        0.433...
    """

    def __init__(
        self,
        task: ConceptSpec | Sequence[str],
        keys: Mapping[NestedKey, NestedKey] | None = None,
        name: str = "completeness",
    ) -> None:
        pairs = list((keys or {"logits": "reference"}).items())
        self_task = as_spec(task)
        if len(pairs) != 1 or any(run.kind == "continuous" for run in self_task.runs):
            raise BadValue("not a pair of distributions", got=repr(keys or task), needed="one pair of logits")
        super().__init__(pairs[0], [join(LOSS, name)])
        self.task = self_task

    def compute(self, *entries: Tensor) -> Tensor:
        shape = (self.task.size,)
        found, reference = (check_block(e, shape, k) for e, k in zip(entries, self._read, strict=True))
        total = found.new_zeros(found.shape[:-1])
        for run in self.task.runs:
            one, other = found[..., run.start : run.stop], reference[..., run.start : run.stop].detach()
            if run.kind == "binary":  # a state for false, whose logit is 0
                one, other = (torch.stack([x, torch.zeros_like(x)], -1) for x in (one, other))
            else:
                one, other = (x.unflatten(-1, (-1, run.cardinality)) for x in (one, other))
            logs = other.log_softmax(-1)
            total = total + (logs.exp() * (logs - one.log_softmax(-1))).sum((-2, -1))
        return total


class TotalLoss(BlockStage):
    r"""The weighted sum of losses, :math:`\sum_i w_i \ell_i`.

    =======  ======================  ========
    reads    ``("loss", name)``...   ``[*B]``
    writes   ``("loss", "total")``   ``[*B]``
    =======  ======================  ========

    Args:
        weights: the weight of each loss by its name.

    Raises:
        BadValue: without losses.

    Examples:
        >>> total = TotalLoss({"concepts": 1.0, "task": 0.5})
        >>> total(loss_concepts=torch.tensor(1.0), loss_task=torch.tensor(4.0)).item()
        3.0
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights or "total" in weights:
            raise BadValue("not the losses to add up", got=repr(dict(weights)), needed="{name: weight}")
        super().__init__([join(LOSS, name) for name in weights], [join(LOSS, "total")])
        self.weights = dict(weights)

    def compute(self, *entries: Tensor) -> Tensor:
        pairs = zip(self.weights.values(), entries, strict=True)
        return sum((weight * loss for weight, loss in pairs), torch.zeros_like(entries[0]))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0, keepdim=True) if len(rows) else rows
