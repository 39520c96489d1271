"""How a concept model is trained: jointly, one part after the other, or with true concepts mixed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdconcepts.concepts.missing import missing
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, beside, check_block
from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import check_module, cut
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["LabelsAsDo", "TeacherForcing", "teach"]

HOW = {"joint": (0.0, False), "sequential": (0.0, True), "independent": (1.0, True), "randint": (0.25, False)}
TEACHING = ("teaching", "mask")


class TeacherForcing(BlockStage):
    r"""In training, concepts are replaced by their labels with a probability: :math:`c_k \leftarrow y_k` where
    :math:`u_k < p` and the label is known.

    A missing label (NaN in one column of its concept) leaves the prediction; the mask says which columns were replaced.
    At evaluation nothing is. No gradient reaches a prediction that was replaced.

    =======  ========================  =========================================
    reads    ``key``                   ``[*B, C]``
    reads    ``labels``                ``[*B, K]`` numbers or ``[*B, C]`` columns
    writes   ``("teaching", "mask")``  ``[*B, C]``, bool
    writes   ``key``                   ``[*B, C]``
    =======  ========================  =========================================

    Args:
        concepts: what the columns mean.
        labels: the entry with the labels, see :meth:`ConceptSpec.targets`.
        probability: p, for each concept of each row.
        detach: whether the predictions that stay pass no gradient on.
        space: what ``key`` holds, ``"probs"`` or ``"logits"``; labels are converted.
        generator: what the draws come from. Default: torch's own.
        key: the entry of the concepts.

    Raises:
        BadValue: for a probability outside [0, 1], an unknown space, entries of another shape, wrong labels.
        BadKey: when an entry is missing.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, section 3.2 (RandInt, p = 0.25).

    Examples:
        >>> stage = TeacherForcing(ConceptSpec(["wing", "beak"]), probability=1.0)
        >>> labels = torch.tensor([1.0, float("nan")])
        >>> mask, concepts = stage(concepts=torch.tensor([0.25, 0.75]), labels=labels)
        >>> mask.tolist(), concepts.tolist()
        ([True, False], [1.0, 0.75])
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        labels: NestedKey = "labels",
        probability: float = 0.25,
        detach: bool = False,
        space: Literal["probs", "logits"] = "probs",
        generator: torch.Generator | None = None,
        key: NestedKey = "concepts",
    ) -> None:
        if not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise BadValue("not a probability", got=repr(probability), needed="a number in [0, 1]")
        if space not in ("probs", "logits"):
            raise BadValue("not a space for concepts", got=repr(space), needed='"probs" or "logits"')
        super().__init__([key, labels], [TEACHING, key])
        self.concepts, self.probability, self.detach, self.space = concepts, float(probability), detach, space
        self.source = Source(generator)
        owner = [i for i, n in enumerate(concepts.cardinalities) for _ in range(n)]
        self._owner = None if concepts.size == len(concepts) else owner

    def compute(self, *entries: Tensor) -> tuple[Tensor, ...]:
        block, labels = entries
        check_block(block, (self.concepts.size,), self._read[0])
        targets = self.concepts.targets(labels, block)
        if not self.training:
            return torch.zeros_like(block, dtype=torch.bool), block.clone()
        shape = (*block.shape[:-1], len(self.concepts))
        drawn = (self.source.uniform(*shape) < self.probability).to(block.device)
        mask = (drawn if self._owner is None else drawn[..., self._owner]) & ~missing(self.concepts, targets)
        value = self.concepts.logits(targets) if self.space == "logits" else targets
        return mask, torch.where(mask, value, block.detach() if self.detach else block)


class LabelsAsDo(BlockStage):
    r"""In training, labels are set as ``do`` with a probability: what depends on a concept then sees its label.

    =======  ====================  =========================================
    reads    ``like``              ``[*B, ...]``: dtype and device
    reads    ``labels``            ``[*B, K]`` numbers or ``[*B, C]`` columns
    writes   ``do``                ``[*B, C]``, NaN where nothing is set
    =======  ====================  =========================================

    Args:
        concepts: what the columns mean.
        labels: the entry with the labels.
        probability: of each concept of each row.
        generator: what the draws come from. Default: torch's own.
        keys: the entry ``like`` and the entry to write.

    Raises:
        BadKey: for an entry that is missing. BadValue: for a probability outside [0, 1], and labels of another shape.

    Examples:
        >>> stage = LabelsAsDo(ConceptSpec(["wing", "beak"]), probability=1.0)
        >>> stage(latent=torch.zeros(1, 5), labels=torch.tensor([[1.0, torch.nan]])).tolist()
        [[1.0, nan]]
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        labels: NestedKey = "labels",
        probability: float = 0.25,
        generator: torch.Generator | None = None,
        keys: tuple[NestedKey, NestedKey] = ("latent", "do"),
    ) -> None:
        super().__init__([keys[0], labels], [keys[1]])
        self.forcing = TeacherForcing(concepts, labels, probability, generator=generator)

    def compute(self, *entries: Tensor) -> Tensor:
        like, labels = entries
        concepts = self.forcing.concepts
        batch = labels.shape if len(concepts) == 1 and labels.ndim < like.ndim else labels.shape[:-1]
        nothing = like.new_full((*batch, concepts.size), torch.nan)
        return self.forcing.compute(nothing, labels)[1]


class _Same(BlockStage):
    """Hands entries on; ``apart``: in training without a gradient, so that their readers don't train their writers."""

    def __init__(self, keys: Sequence[NestedKey], to: Sequence[NestedKey], apart: bool = False) -> None:
        super().__init__(keys, to)
        self.apart = apart

    def compute(self, *entries: Tensor) -> tuple[Tensor, ...]:
        return tuple(entry.detach() if self.apart and self.training else entry for entry in entries)


def teach(
    model: TensorDictModuleBase,
    labels: NestedKey = "labels",
    how: Literal["joint", "sequential", "independent", "randint"] = "joint",
    *,
    probability: float | None = None,
    generator: torch.Generator | None = None,
) -> TensorDictSequential:
    """The pipeline to train ``model`` with: what comes after the concepts sees predictions, labels, or some of both.

    ================  ===========================================================  ====================
    ``how``           what the rest of the model is given                          gradient to encoder
    ================  ===========================================================  ====================
    ``joint``         predictions                                                  of concepts and task
    ``sequential``    predictions                                                  of concepts only
    ``independent``   labels (predictions where there is none)                     of concepts only
    ``randint``       labels with a probability of 0.25, else predictions          of concepts and task
    ================  ===========================================================  ====================

    The stages are shared with ``model``, not copied: train the pipeline, use the model. In evaluation mode the two
    compute the same.

    What the rest reads besides the concepts, such as embeddings (:class:`~tdconcepts.concepts.ConceptEmbedding`) or a
    latent (:class:`~tdconcepts.concepts.ConceptMemoryReasoner`), it is given without a gradient where the table says
    "of concepts only": these entries then train nothing, and embeddings learn what the concepts need of them alone.
    Train the concepts by ``key + "_logits"``: these are predictions in any case. Where ``key`` itself holds logits
    (``space="logits"``), the pipeline writes that entry too, as ``key`` then holds what the rest is given.

    In a graph of concepts the labels are given as ``do``, so that each equation sees those of its parents. Its tasks
    are concepts, and the encoder is trained by all equations that read the input: those of the roots in
    :class:`~tdconcepts.concepts.GraphBottleneck`, every one in :class:`~tdconcepts.concepts.CausalBottleneck`. There is
    no ``sequential``.

    Args:
        model: a concept model, which knows its ``concepts``, its ``key`` and its ``space``.
        labels: the entry with the labels, see :meth:`ConceptSpec.targets`; NaN where there is none.
        how: see above.
        probability: how often a label is given, instead of the one of ``how``.
        generator: what the draws come from. Default: torch's own.

    Raises:
        BadType: for a model that does not know its concepts.
        BadValue: for an unknown ``how``, ``sequential`` for a graph, and ``sequential`` or ``independent`` for a model
            whose task reads the concepts' logits too: without a gradient these could not be trained.

    Source: Koh et al., Concept Bottleneck Models, ICML 2020, section 3 (the first three); Espinosa Zarlenga et al.,
    Concept Embedding Models, NeurIPS 2022, section 3.2.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tdconcepts.concepts import ConceptBottleneck
        >>> model = ConceptBottleneck(nn.Linear(8, 2), nn.Linear(2, 5), ["wing", "beak"])
        >>> pipeline = teach(model, how="independent")
        >>> td = TensorDict({"observation": torch.zeros(3, 8), "labels": torch.ones(3, 2)}, [3])
        >>> pipeline(td)["concepts"].unique().tolist(), pipeline.in_keys
        ([1.0], ['observation', 'labels'])
    """
    if how not in HOW:
        raise BadValue("not a way to train", got=repr(how), needed=", ".join(map(repr, HOW)))
    check_module(model)
    spec, key = getattr(model, "concepts", None), getattr(model, "key", None)
    if not isinstance(spec, ConceptSpec) or key is None:
        needed = "a concept model with the attributes concepts (a ConceptSpec) and key"
        raise BadType("the model does not know its concepts", got=type(model).__name__, needed=needed)
    chance, detach = HOW[how]
    stage: TeacherForcing | LabelsAsDo = TeacherForcing(
        spec,
        as_key(labels),
        chance if probability is None else probability,
        detach,
        getattr(model, "space", "probs"),
        generator,
        key,
    )
    do_key = getattr(model, "do_key", None)
    if do_key is not None:
        if detach and chance == 0:
            needed = '"joint", "independent" or "randint"'
            raise BadValue("a graph of concepts has no rest to train after them", got=repr(how), needed=needed)
        before, after = cut(model, model.latent_key)
        stage = LabelsAsDo(spec, as_key(labels), stage.probability, generator, (before[-1].out_keys[-1], do_key))
        return _named(model, [*before, stage, *after], {"teaching": stage})
    before, after = cut(model, key)
    besides = _besides(before, after, as_key(key)) if detach else []
    if (logits := beside(key, join(key)[-1] + "_logits")) in besides:
        needed = f'how="joint" or "randint", as {key_text(logits)} is what the concepts are trained by'
        raise BadValue("the task reads the logits of the concepts too", got=f"how={how!r}", needed=needed)
    new: dict[str, TensorDictModuleBase] = {}
    if stage.space == "logits" and not any(logits in [*each.in_keys, *each.out_keys] for each in [*before, *after]):
        new["predicted"] = _Same([key], [logits])
    if besides:
        new["apart"] = _Same(besides, besides, apart=True)
    new["teaching"] = stage
    return _named(model, [*before, *new.values(), *after], new)


def _besides(before: list[TensorDictModuleBase], after: list[TensorDictModuleBase], key: NestedKey) -> list[NestedKey]:
    """The entries that the stages ``before`` write and those ``after`` read, but for ``key``."""
    made = [as_key(each) for stage in before for each in stage.out_keys]
    read = [join(each) for stage in after for each in [*stage.in_keys, *getattr(stage, "optional_keys", [])]]
    return [each for each in dict.fromkeys(made) if each != key and any(join(each)[: len(k)] == k for k in read)]


def _named(
    model: Any, stages: list[TensorDictModuleBase], new: Mapping[str, TensorDictModuleBase]
) -> TensorDictSequential:
    """The stages as one pipeline, under the model's names where it has some."""
    held = getattr(model, "module", None)
    names = {id(m): name for name, m in held.items()} if isinstance(held, nn.ModuleDict) else {}
    names |= {id(stage): name for name, stage in new.items()}
    if any(id(stage) not in names for stage in stages):
        return TensorDictSequential(*stages)
    return TensorDictSequential(OrderedDict((names[id(stage)], stage) for stage in stages))
