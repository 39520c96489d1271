"""Is the concept right, is the task right: hits row by row, with missing labels left out."""

from __future__ import annotations

import torch
from torch import Tensor

from tdconcepts.concepts import ConceptSpec, harden
from tdconcepts.concepts.stage import BlockStage, as_spec, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import METRIC, NestedKey, join

__all__ = ["ConceptAccuracy", "concept_hits", "task_hits"]


class ConceptAccuracy(BlockStage):
    r"""The share of each row's concepts that are right, those without a label left out.

    A binary concept is right on its side of one half, a categorical one where its most probable state is the label's;
    continuous ones don't count. NaN for a row where nothing counts.

    =======  =======================  ==============================
    reads    ``"concepts"``           ``[*B, C]``, probabilities
    reads    ``"labels"``             ``[*B, K]`` or ``[*B, C]``
    writes   ``("metric", name)``     ``[*B]``
    =======  =======================  ==============================

    Args:
        concepts: what the columns mean.
        key, labels: the entries.
        name: what the metric is called.

    Raises:
        BadKey: when an entry is missing. BadValue: for entries of another shape, or labels that can't be.

    Examples:
        >>> accuracy = ConceptAccuracy(ConceptSpec(["wing", "beak", "tail"]))
        >>> accuracy(concepts=torch.tensor([0.9, 0.2, 0.3]), labels=torch.tensor([1.0, 1.0, float("nan")])).item()
        0.5
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        key: NestedKey = "concepts",
        labels: NestedKey = "labels",
        name: str = "concept_accuracy",
    ) -> None:
        super().__init__([key, labels], [join(METRIC, name)])
        self.concepts = as_spec(concepts)

    def compute(self, *entries: Tensor) -> Tensor:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        hits, known = concept_hits(self.concepts, block, entries[1])
        return (hits.to(block.dtype).sum(-1) / known.sum(-1)).detach()


def concept_hits(concepts: ConceptSpec, probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which concepts are right and which count, ``[*B, K]`` both; see :class:`ConceptAccuracy`.

    Args:
        concepts: which columns are which concepts.
        probs: ``[*B, C]``, probabilities.
        labels: ``[*B, C]``, or the classes ``[*B, K]``; NaN where a label is not known.

    Examples:
        >>> hits, known = concept_hits(ConceptSpec(["wing"]), torch.tensor([[0.9], [0.2]]), torch.tensor([[1], [1]]))
        >>> hits.tolist(), known.tolist()
        ([[True], [False]], [[True], [True]])
    """
    targets, found = concepts.targets(labels, probs), harden(concepts, probs)
    hits, known = [], []
    for run in concepts.runs:
        shape = (run.last - run.first, run.cardinality)
        one, other = (x[..., run.start : run.stop].unflatten(-1, shape) for x in (found, targets))
        counts = ~other.isnan().any(-1) & (run.kind != "continuous")
        right = (one == (other > 0.5)).all(-1) if run.kind == "binary" else one.argmax(-1) == other.argmax(-1)
        hits.append(right & counts)
        known.append(counts)
    return torch.cat(hits, dim=-1), torch.cat(known, dim=-1)


def task_hits(logits: Tensor, task: Tensor) -> Tensor:
    """Whether the task is right, ``[*B]``: the largest of several logits, or the sign of one.

    Args:
        logits: ``[*B, T]``; T = 1 (or ``[*B]``) is a yes-or-no question.
        task: the class ``[*B]``, or 0 and 1; NaN where it is not known.

    Returns:
        bool for a task of whole numbers. For a float task, which can be missing, float: 1, 0, and NaN where it is, so
        that ``nanmean`` is the accuracy.

    Raises:
        BadValue: for a task of another shape.

    Examples:
        >>> task_hits(torch.tensor([[0.1, 0.3], [2.0, 1.0]]), torch.tensor([1, 1])).tolist()
        [True, False]
        >>> task_hits(torch.tensor([[0.1], [2.0]]), torch.tensor([1.0, torch.nan])).tolist()
        [1.0, nan]
    """
    single = logits.shape == task.shape
    if single or logits.shape[-1:] == (1,):
        found = (logits if single else logits.squeeze(-1)) > 0
        truth = task.squeeze(-1) if task.shape == logits.shape and not single else task
        if found.shape == truth.shape:
            return _known(found == (truth > 0.5), truth)
    elif logits.shape[:-1] == task.shape:
        return _known(logits.argmax(-1) == task, task)
    raise BadValue(
        "logits and task don't fit", got=f"{list(logits.shape)} and {list(task.shape)}", needed="[*B, T], [*B]"
    )


def _known(hits: Tensor, task: Tensor) -> Tensor:
    return hits.to(task.dtype).masked_fill(task.isnan(), torch.nan) if task.is_floating_point() else hits
