"""How much a model gains when its concepts are corrected: curves over the number of corrections, and their area."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.calling import check_norms, norms_of
from tdconcepts.interventions import GroundTruth, intervene
from tdconcepts.keys import NestedKey, key_text
from tdconcepts.metrics.accuracy import task_hits

__all__ = ["correction_curve", "curve_area"]

Score = Callable[[Tensor, Tensor], Tensor]


def correction_curve(
    model: TensorDictModuleBase,
    data: TensorDictBase,
    policy: TensorDictModuleBase,
    *,
    labels: NestedKey = "labels",
    task: NestedKey = "task",
    out: NestedKey = "logits",
    counts: Sequence[int] | None = None,
    score: Score = task_hits,
    among: Sequence[str] | None = None,
) -> Tensor:
    """The mean score of a model as k concepts of each row are replaced by their labels, for each k.

    A row whose task is missing (NaN) does not count, and a label that is missing corrects nothing.

    In a graph of concepts, whose tasks are concepts too, say which may be corrected by ``among``, and read the task off
    the block: ``out="concepts", score=lambda block, task: (block[..., -1] > 0.5) == task``.

    Args:
        model: a concept model, which knows its ``concepts`` and its ``key``.
        data: what it reads, the labels and the task, ``[*B]``.
        policy: which concepts are corrected first.
        labels: the entry with the concepts' labels.
        task: the entry with the true task.
        out: the entry with the model's task output.
        counts: the numbers k. Default: 0, 1, ... up to all concepts.
        among: the concepts that are corrected, by name. Default: all.
        score: ``(out, task) -> [*B]``; :func:`~tdconcepts.metrics.task_hits` by default, so the mean is the accuracy.

    Returns:
        one number for each k, ``[len(counts)]``, in float64; NaN where no task is known.

    Raises:
        BadKey: for data without the task.
        BadValue: for a k that is out of range, scores of another shape than the rows where a task is missing, and for a
            batch norm in training mode.

    Source: Koh et al., Concept Bottleneck Models, ICML 2020, section 5.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> from tdconcepts.concepts import ConceptBottleneck
        >>> from tdconcepts.interventions import UncertaintyPolicy
        >>> model = ConceptBottleneck(nn.Identity(), nn.Identity(), ["a", "b"])
        >>> x = torch.tensor([[-1.0, 0.1]])
        >>> data = TensorDict({"observation": x, "labels": torch.tensor([[1, 0]]), "task": torch.tensor([0])}, [1])
        >>> correction_curve(model, data, UncertaintyPolicy()).tolist()
        [0.0, 1.0, 1.0]
    """
    if not isinstance(data.get(task, None), Tensor):
        raise BadKey("no task in the data", got=key_text(task), needed=nearest(task, list(data.keys(True, True))))
    concepts, key = getattr(model, "concepts", None), getattr(model, "key", "concepts")
    candidates = concepts if among is None else among
    ks = range(len(candidates) + 1) if counts is None and candidates is not None else counts
    if ks is None:
        raise BadValue("the model does not know its concepts", got=type(model).__name__, fix="pass counts=range(...)")
    check_norms(norms_of(model), "corrections")
    scores = []
    for k in ks:
        corrected = intervene(model, at=key, policy=policy, strategy=GroundTruth(labels), k=k, among=among)
        with torch.no_grad():
            found = corrected(data.copy()).get(out)
        scores.append(_mean(score(found, data.get(task)).double(), data.get(task), data.batch_dims))
    return torch.stack(scores)


def curve_area(curve: Tensor, counts: Sequence[float] | None = None) -> Tensor:
    r"""The area below a curve by the trapezium rule, over its width: the mean height.

    :math:`\frac{1}{x_n - x_0} \int y \, dx`.

    Args:
        curve: heights ``[..., n]``, two or more.
        counts: where they are, ascending. Default: evenly spaced.

    Raises:
        BadValue: for fewer than two points, another number of places, or places that don't ascend. BadType: for a curve
            that is no tensor.

    Examples:
        >>> curve_area(torch.tensor([0.0, 1.0, 1.0])).item(), curve_area(torch.tensor([0.0, 1.0]), [0, 7]).item()
        (0.75, 0.5)
    """
    if not isinstance(curve, Tensor):
        raise BadType("not a curve", got=type(curve).__name__, needed="a tensor [..., n]")
    n = curve.shape[-1] if curve.ndim else 0
    places = torch.arange(n).to(curve) if counts is None else torch.as_tensor(counts).to(curve)
    if n < 2 or places.shape != (n,) or not (places.diff() > 0).all():
        got = f"a curve of shape {list(curve.shape)} at {places.tolist()}"
        raise BadValue("not a curve", got=got, needed="two points or more, at places that ascend")
    return torch.trapezoid(curve, places) / (places[-1] - places[0])


def _mean(scores: Tensor, task: Tensor, batch_dims: int) -> Tensor:
    """The mean over the scores of tasks that are known: one score of each task, or of all those of a row."""
    if not task.is_floating_point() or not (gone := task.isnan()).any():
        return scores.mean()
    if scores.ndim < batch_dims or scores.shape != gone.shape[: scores.ndim]:
        got = f"{list(scores.shape)} for tasks {list(task.shape)}"
        raise BadValue("scores and tasks don't fit", got=got, needed="one score of each row, as some tasks are missing")
    return scores[~(gone.flatten(scores.ndim).all(-1) if gone.ndim > scores.ndim else gone)].mean()
