"""Losses as stages: each writes a number for each row, and one adds them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.concepts.missing import missing
from tdconcepts.concepts.spec import ConceptSpec, Run
from tdconcepts.concepts.stage import BlockStage, as_spec, check_block
from tdconcepts.errors import BadType, BadValue
from tdconcepts.keys import NestedKey, join

__all__ = ["CompletenessLoss", "ConceptLoss", "LeakageLoss", "TotalLoss"]

LOSS = "loss"


class ConceptLoss(BlockStage):
    r"""How far a block is from its labels: cross-entropy for binary and categorical columns, squared error for
    continuous ones.

    :math:`\ell = \sum_k w_k m_k \ell_k / \sum_k w_k m_k` over the K concepts, with :math:`m_k = 0` where the label is
    missing (NaN, in one of its columns is enough), so that it takes no part, and no gradient reaches its prediction,
    whatever that is; 0 for a row without labels. ``reduction="sum"`` leaves the denominator out. A logit of -inf rules
    a state of a categorical concept out: that costs nothing where the label is another one.
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
        pairs = list((keys or {"concepts_logits": "labels"}).items()) if isinstance(keys or {}, Mapping) else []
        if len(pairs) != 1:
            raise BadValue("a loss compares one block with one entry of labels", got=repr(keys), needed="one pair")
        if space not in ("logits", "probs") or reduction not in ("mean", "sum"):
            got = f"space={space!r}, reduction={reduction!r}"
            raise BadValue("not an option", got=got, needed='space "logits" or "probs", reduction "mean" or "sum"')
        super().__init__(pairs[0], [join(LOSS, name)])
        self.concepts, self.space, self.reduction = as_spec(concepts), space, reduction
        by_name = dict.fromkeys(self.concepts.names, 1.0)
        for group, weight in _checked_weights(weights or {}).items():
            if weight < 0:
                raise BadValue(f"not the weight of {group!r}", got=repr(weight), needed="a number of 0 or more")
            by_name |= dict.fromkeys(self.concepts.members([group]), float(weight))
        self.register_buffer("weights", torch.tensor(list(by_name.values())), persistent=False)

    def compute(self, *entries: Tensor) -> Tensor:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        targets = self.concepts.targets(entries[1], block)
        gone = missing(self.concepts, targets)
        found, wanted = block.masked_fill(gone, 0), targets.masked_fill(gone, 0)
        parts = [self._part(run, found, wanted, gone) for run in self.concepts.runs]
        losses, known = (p[0] if len(p) == 1 else torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
        weights = self.weights.to(block) * known
        total = (losses * weights).sum(-1)
        return total if self.reduction == "sum" else total / weights.sum(-1).where(weights.any(-1), 1)

    def _part(self, run: Run, block: Tensor, targets: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each concept of a run and whether it is known, both ``[*B, k]``."""
        shape = (run.last - run.first, run.cardinality)
        found, wanted, gone = (x[..., run.start : run.stop] for x in (block, targets, gone))
        if run.kind == "binary":
            if self.space == "logits":
                return F.binary_cross_entropy_with_logits(found, wanted, reduction="none"), ~gone
            return F.binary_cross_entropy(found, wanted, reduction="none"), ~gone
        found, wanted = found.unflatten(-1, shape), wanted.unflatten(-1, shape)
        known = ~gone.unflatten(-1, shape)[..., 0]
        if run.kind == "continuous":
            return (found - wanted).square().mean(-1), known
        logs = found.log_softmax(-1) if self.space == "logits" else found.clamp(min=torch.finfo(found.dtype).tiny).log()
        return -_expected(logs, wanted).sum(-1), known


class LeakageLoss(BlockStage):
    r"""What the errors of the concepts tell about the task, as the share of the task's variance that they explain.

    Leakage is information on the task that soft concepts carry beside their labels. With the residual
    :math:`r = c - y_c` of each column and the columns :math:`t` of the task, both centred over the batch,
    :math:`\ell = \frac{1}{CT} \sum_{ct} \mathrm{cov}(r_c, t_t)^2 / (\mathrm{var}(r_c) \mathrm{var}(t_t))`: the mean
    squared correlation, 0 where errors are unrelated to the task, and the same number for each row. A pair (c, t) is
    compared over the rows in which both labels are known (not NaN), and counts as 0 where one does not vary there.

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
        targets, task = self.concepts.targets(entries[1], block), self.task.targets(entries[2], like)
        share = _correlation(*_rows(self.concepts, block - targets, targets), *_rows(self.task, task, task)).square()
        return share.mean().to(block.dtype).expand(block.shape[:-1])


class CompletenessLoss(BlockStage):
    r"""What a black box knows about the task and the concepts don't: :math:`\mathrm{KL}(p_\mathrm{reference} \| p)`.

    0 where the concepts are enough to say all that the reference says. No gradient reaches the reference. A reference
    of -inf or inf rules states out; a state without a share in the reference adds nothing.

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
            logs = _log_probs(run, other.clamp(-_far(other), _far(other)))
            total = total + _expected(logs - _log_probs(run, one), logs.exp()).sum((-2, -1))
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
        BadValue: without losses, and for a weight that is no number. BadType: for weights without names.

    Examples:
        >>> total = TotalLoss({"concepts": 1.0, "task": 0.5})
        >>> total(loss_concepts=torch.tensor(1.0), loss_task=torch.tensor(4.0)).item()
        3.0
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not _checked_weights(weights) or "total" in weights:
            raise BadValue("not the losses to add up", got=repr(weights), needed="{name: weight}")
        super().__init__([join(LOSS, name) for name in weights], [join(LOSS, "total")])
        self.weights = dict(weights)

    def compute(self, *entries: Tensor) -> Tensor:
        pairs = zip(self.weights.values(), entries, strict=True)
        return sum((weight * loss for weight, loss in pairs), torch.zeros_like(entries[0]))


def _checked_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    """``weights`` itself: numbers by their names."""
    if not isinstance(weights, Mapping):
        raise BadType("not weights", got=repr(weights), needed="{name: number}")
    for name, weight in weights.items():
        single = isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.numel() == 1)
        if not single or weight != weight:
            raise BadValue(f"not the weight of {name!r}", got=repr(weight), needed="a number")
    return weights


def _expected(values: Tensor, shares: Tensor) -> Tensor:
    """``shares * values``; 0, with no gradient, where the share is 0, whatever the value is."""
    return shares * torch.where(shares == 0, 0, values)


def _log_probs(run: Run, logits: Tensor) -> Tensor:
    """``[*B, columns] -> [*B, k, states]``; a binary concept has two states."""
    if run.kind == "binary":
        return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)
    return logits.unflatten(-1, (-1, run.cardinality)).log_softmax(-1)


def _far(logits: Tensor) -> float:
    """A logit that is as good as infinite, and can still be subtracted from its opposite."""
    return torch.finfo(logits.dtype).max / 4


def _rows(concepts: ConceptSpec, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each column about its mean over the rows with a label, 0 in the others, and which have one, both ``[N, C]``.

    In float32 at least: a half has no room for the sum of some thousand squares.
    """
    known = ~missing(concepts, labels).reshape(-1, concepts.size)
    wide = torch.promote_types(values.dtype, torch.float32)
    rows, share = values.reshape(-1, concepts.size).to(wide), known.to(wide)
    mean = rows.detach().where(known, 0).sum(0) / share.sum(0).clamp(min=1)  # a shift, so without a gradient
    return (rows - mean).where(known, 0), share


def _correlation(rows: Tensor, known: Tensor, others: Tensor, also: Tensor) -> Tensor:
    """Of each column with each other one, over the rows in which both are known ``[C, T]``; 0 where one is constant."""
    with torch.autocast(rows.device.type, enabled=False):
        n, second, other_squares = (known.mT @ torch.cat([also, others, others.square()], -1)).chunk(3, -1)
        first, products = (rows.mT @ torch.cat([also, others], -1)).chunk(2, -1)
        squares = rows.square().mT @ also
    n = n.clamp(min=1)
    covariance = products - first * second / n
    variance, other_variance = squares - first.square() / n, other_squares - second.square() / n
    least = 16 * torch.finfo(n.dtype).eps  # less than that is what rounding leaves
    varies = (variance > least * squares) & (other_variance > least * other_squares)
    scale = variance.where(varies, 1).sqrt() * other_variance.where(varies, 1).sqrt()
    return torch.where(varies, covariance / scale, 0)
