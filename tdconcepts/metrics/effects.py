"""What concepts do in a model: causal effects, completeness, leakage, and how many of them count."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Generator, Tensor

from tdconcepts.concepts import ConceptSpec, harden, linear_fit
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.calling import check_norms, norms_of
from tdconcepts.interventions import Do, intervene
from tdconcepts.keys import NestedKey, key_text

__all__ = [
    "causal_concept_effect",
    "completeness_score",
    "contributing_concepts",
    "effective_concepts",
    "leakage_score",
]


def causal_concept_effect(
    model: TensorDictModuleBase,
    data: TensorDictBase,
    concept: str | Mapping[str, tuple[float, float]],
    out: NestedKey = "logits",
) -> Tensor:
    r"""What a concept does to an output: :math:`E[y \mid do(c = 1)] - E[y \mid do(c = 0)]`, over the rows.

    Written is what stands for the value in the model's space: in a model with ``space="logits"`` do(c = 1) writes the
    logit 9.21, as :class:`~tdconcepts.interventions.GroundTruth` does. In a model along a graph
    (:class:`~tdconcepts.concepts.GraphBottleneck`) what depends on the concept follows.

    Args:
        model: a concept model, which knows its ``concepts`` and its ``key``.
        data: what it reads, ``[*B]``.
        concept: the name of a concept, or ``{name: (low, high)}`` for other values than 0 and 1: probabilities of a
            binary concept, any numbers of a continuous one.
        out: the entry whose effect is measured.

    Returns:
        the effect on each number of a row of ``out``.

    Raises:
        BadKey: for a name that is none, with the nearest, and an entry that the model does not write.
        BadType: for a model that does not know its concepts.
        BadValue: for a categorical concept, a value of a binary one outside [0, 1], without rows, and for a batch norm
            in training mode.

    Source: Goyal et al., Explaining Classifiers with Causal Concept Effect (CaCE), 2019, definition 1.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> from tdconcepts.concepts import ConceptBottleneck, LinearPredictor
        >>> model = ConceptBottleneck(nn.Identity(), LinearPredictor(2, 1), ["wing", "beak"])
        >>> effect = causal_concept_effect(model, TensorDict({"observation": torch.zeros(3, 2)}, [3]), "beak")
        >>> torch.allclose(effect, model["head"].linear.weight[:, 1])
        True
    """
    spec, key = getattr(model, "concepts", None), getattr(model, "key", None)
    if not isinstance(spec, ConceptSpec) or key is None:
        raise BadType("the model does not know its concepts", got=type(model).__name__, needed="a concept model")
    if isinstance(concept, Mapping) and len(concept) != 1:
        raise BadValue("an effect is that of one concept", got=repr(concept), needed="{name: (low, high)}")
    name, values = next(iter(concept.items())) if isinstance(concept, Mapping) else (concept, (0.0, 1.0))
    columns = spec.slice(name)
    if columns.stop - columns.start > 1:
        raise BadValue(f"{name!r} has several columns", got="a categorical concept", needed="one of one column")
    if not data.batch_size.numel():
        raise BadValue("an effect over no rows", got=f"batch size {list(data.batch_size)}", needed="one row or more")
    check_norms(norms_of(model), "what is done")
    continuous = spec.kinds[spec.index(name)] == "continuous"
    space: Any = "continuous" if continuous else getattr(model, "space", "probs")
    means = []
    for value in values:
        with torch.no_grad():
            done = intervene(model, at=key, strategy=Do(float(value), space), among=[name])
            found = done(data.copy()).get(out, None)
        if not isinstance(found, Tensor):
            raise BadKey("the model writes no such entry", got=key_text(out), needed=f"one of {list(model.out_keys)}")
        means.append(found.flatten(0, data.batch_dims - 1).mean(0) if data.batch_dims else found)
    return means[1] - means[0]


def completeness_score(accuracy: float, reference: float, chance: float) -> float:
    r"""How much of what can be known about the task the concepts know:
    :math:`\eta = (a - a_\mathrm{chance}) / (a_\mathrm{reference} - a_\mathrm{chance})`.

    Args:
        accuracy: of the concept model.
        reference: of the model that sees everything.
        chance: of a prediction that sees nothing.

    Raises:
        BadValue: when the reference is not above chance. BadType: for what is no number.

    Source: Yeh et al., On Completeness-aware Concept-Based Explanations, NeurIPS 2020, definition 3.1.

    Examples:
        >>> completeness_score(0.5, 1.0, 0.5), completeness_score(0.9, 1.0, 0.5)
        (0.0, 0.8)
    """
    if not all(isinstance(each, (Real, Tensor)) for each in (accuracy, reference, chance)):
        raise BadType("not accuracies", got=f"{accuracy!r}, {reference!r}, {chance!r}", needed="three numbers")
    if not reference > chance:
        raise BadValue("the reference knows nothing", got=f"{reference} with chance {chance}", needed="above chance")
    return (accuracy - chance) / (reference - chance)


def leakage_score(
    concepts: ConceptSpec,
    probs: Tensor,
    task: Tensor,
    *,
    held_out: float = 0.5,
    ridge: float = 1.0,
    generator: Generator | None = None,
) -> float:
    """What soft concepts tell about the task that their decisions don't: the gain in accuracy of a linear probe.

    A logistic probe (one class against the others) is fitted on the decisions, and one on decisions and probabilities;
    the difference of their accuracies on rows held out is the score. 0 when probabilities carry nothing more.

    Args:
        concepts: what the columns mean.
        probs: ``[N, C]``.
        task: the class of each row, ``[N]``; a row where it is NaN takes no part.
        held_out: the share of the rows to be scored on.
        ridge: of the probes.
        generator: what the rows are dealt by. Default: torch's own.

    Raises:
        BadType: for something else than a spec and two tensors.
        BadValue: for other shapes, a share outside (0, 1), and fewer than two classes among the rows that are fitted.

    Source: after Mahinpei et al., Promises and Pitfalls of Black-Box Concept Learning Models, 2021.

    Examples:
        >>> task = torch.arange(200) % 2
        >>> soft = torch.full((200, 1), 0.6) + 0.3 * task.unsqueeze(-1)  # decided alike, and yet it tells the task
        >>> leakage_score(ConceptSpec(["wing"]), soft, task, generator=torch.Generator().manual_seed(0)) > 0.4
        True
    """
    if not (isinstance(concepts, ConceptSpec) and isinstance(probs, Tensor) and isinstance(task, Tensor)):
        got = ", ".join(type(each).__name__ for each in (concepts, probs, task))
        raise BadType("not concepts and a task", got=got, needed="a ConceptSpec, probs [N, C] and task [N]")
    concepts.check(probs)
    if probs.ndim != 2 or task.shape != probs.shape[:1]:
        got = f"{list(probs.shape)} and {list(task.shape)}"
        raise BadValue("concepts and task don't fit", got=got, needed="[N, C] and [N]")
    if not 0 < held_out < 1:
        raise BadValue("not a share", got=repr(held_out), needed="a number between 0 and 1")
    if task.is_floating_point():
        known = ~task.isnan()
        probs, task = probs[known], task[known]
    order = torch.randperm(len(task), generator=generator).to(task.device)
    held, fitted = order.split([round(held_out * len(task)), len(task) - round(held_out * len(task))])
    classes = task[fitted].unique()
    if len(classes) < 2 or not len(held):
        raise BadValue("there is nothing to tell apart", got=f"{len(classes)} classes", needed="two or more")
    hard = harden(concepts, probs)
    accuracies = []
    for features in (hard, torch.cat([hard, probs], -1)):
        wide = features.detach().double()
        fit = linear_fit(wide[fitted], (task[fitted].unsqueeze(-1) == classes).double(), ridge)
        best = classes[(wide[held] @ fit.weight.mT + fit.bias).argmax(-1)]
        accuracies.append((best == task[held]).double().mean().item())
    return accuracies[1] - accuracies[0]


def effective_concepts(weight: Tensor, concepts: ConceptSpec | None = None, threshold: float = 0.0) -> Tensor:
    """The number of effective concepts (NEC): how many concepts each output of a linear head uses, ``[T]``.

    A concept is used where the weight of one of its columns is above the threshold in size.

    Args:
        weight: of the head, ``[T, C]``.
        concepts: which columns belong together. Default: each column is a concept.
        threshold: 0 or more.

    Raises:
        BadType: for weights that are no tensor. BadValue: for another shape, or a threshold below 0.

    Source: Srivastava et al., VLG-CBM, NeurIPS 2024, section 4 (there the mean over outputs).

    Examples:
        >>> weight = torch.tensor([[0.0, 0.5, 0.2], [0.0, 0.0, 0.1]])
        >>> effective_concepts(weight, ConceptSpec(["a", "b"], [1, 2])).tolist()
        [1, 1]
    """
    spec = _spec_of(weight, concepts)
    if not threshold >= 0:
        raise BadValue("not a threshold", got=repr(threshold), needed="a number of 0 or more")
    return _grouped((weight.abs() > threshold).double(), spec).gt(0).sum(-1)


def contributing_concepts(
    weight: Tensor, probs: Tensor, concepts: ConceptSpec | None = None, coverage: float = 0.95
) -> Tensor:
    r"""The number of contributing concepts (NCC): the fewest whose contributions make up a share of the whole.

    The contribution of concept k to output t in a row is :math:`\sum_{c \in k} |w_{tc} p_c|`.

    Args:
        weight: of the head, ``[T, C]``.
        probs: ``[*B, C]``.
        concepts: which columns belong together. Default: each column is a concept.
        coverage: the share, in (0, 1].

    Returns:
        ``[*B, T]``.

    Raises:
        BadType: for weights that are no tensor. BadValue: for another shape, or a share out of range.

    Source: Srivastava et al., VLG-CBM, NeurIPS 2024; Yuksekgonul et al., Post-hoc Concept Bottleneck Models, ICLR 2023
    (the contributions).

    Examples:
        >>> contributing_concepts(torch.tensor([[4.0, 0.1, 2.0]]), torch.tensor([1.0, 1.0, 1.0])).tolist()
        [2]
    """
    spec = _spec_of(weight, concepts)
    spec.check(probs)
    if not 0 < coverage <= 1:
        raise BadValue("not a share", got=repr(coverage), needed="a number in (0, 1]")
    counts = []
    for row in weight.double():  # one output at a time: [*B, C] is what is held
        sizes = _grouped((row * probs.double()).abs(), spec).sort(-1, descending=True).values
        reached = sizes.cumsum(-1)
        short = reached < coverage * reached[..., -1:] * (1 - 1e-12)
        counts.append((short.sum(-1) + 1) * (reached[..., -1] > 0))
    return torch.stack(counts, -1)


def _spec_of(weight: Tensor, concepts: ConceptSpec | None) -> ConceptSpec:
    if not isinstance(weight, Tensor):
        fix = "layer.weight" if hasattr(weight, "weight") else None
        raise BadType("not the weights of a linear head", got=type(weight).__name__, needed="a tensor [T, C]", fix=fix)
    if weight.ndim != 2 or (concepts is not None and weight.shape[1] != concepts.size):
        needed = "[T, C]" if concepts is None else f"[T, {concepts.size}]"
        raise BadValue("not the weights of a linear head", got=list(weight.shape), needed=needed)
    return ConceptSpec(weight.shape[1]) if concepts is None else concepts


def _grouped(columns: Tensor, spec: ConceptSpec) -> Tensor:
    """``[*B, C] -> [*B, K]``: the sum over the columns of each concept."""
    parts = [
        columns[..., run.start : run.stop].unflatten(-1, (run.last - run.first, run.cardinality)).sum(-1)
        for run in spec.runs
    ]
    return torch.cat(parts, -1)
