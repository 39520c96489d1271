"""Concept embeddings: a vector for each state of each concept, scored and mixed by the concepts' probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdconcepts.concepts.encoders import one_pair
from tdconcepts.concepts.spec import ConceptSpec, Run
from tdconcepts.concepts.stage import BlockStage, as_size, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey

__all__ = ["ConceptMixing", "ConceptScore", "vectors"]


def vectors(concepts: ConceptSpec) -> int:
    """How many embeddings a spec needs, V: two for a binary concept (true first, then false), one for each state of a
    categorical one, one for each number of a continuous one.

    Args:
        concepts: what the columns mean.

    Examples:
        >>> vectors(ConceptSpec(["wing", "colour", "age"], [1, 3, 1], ["binary", "categorical", "continuous"]))
        6
    """
    return sum((run.stop - run.start) * _each(run) for run in concepts.runs)


class ConceptScore(BlockStage):
    r"""The logits of concepts from their embeddings, by one linear layer that all concepts of a kind share.

    A binary concept: :math:`w \cdot [e^+; e^-] + b`; a state of a categorical one, and a continuous number:
    :math:`w \cdot e + b`.

    =======  =======================  ==============
    reads    ``"exogenous"``          ``[*B, V, E]``
    writes   ``"concepts_logits"``    ``[*B, C]``
    =======  =======================  ==============

    Args:
        concepts: what the columns mean.
        exogenous_size: width of an embedding, E.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, or embeddings of another shape.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, section 3.1.

    Examples:
        >>> ConceptScore(ConceptSpec(["wing", "colour"], [1, 3]), 4)(exogenous=torch.zeros(2, 5, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, concepts: ConceptSpec, exogenous_size: int, keys: Mapping[NestedKey, NestedKey] | None = None
    ) -> None:
        as_size(exogenous_size=exogenous_size)
        in_key, out_key = one_pair(keys or {"exogenous": "concepts_logits"})
        super().__init__([in_key], [out_key])
        self.concepts, self.exogenous_size, self.vectors = concepts, exogenous_size, vectors(concepts)
        kinds = dict.fromkeys(run.kind for run in concepts.runs)
        self.linear = nn.ModuleDict({k: nn.Linear(exogenous_size * (1 + (k == "binary")), 1) for k in kinds})

    def compute(self, *entries: Tensor) -> Tensor:
        exogenous = check_block(entries[0], (self.vectors, self.exogenous_size), self._read[0])
        parts = [
            self.linear[run.kind](part.flatten(-2) if run.kind == "binary" else part).squeeze(-1)
            for run, part in _parts(self.concepts, exogenous)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class ConceptMixing(BlockStage):
    r"""One vector for each concept: its embeddings, mixed by its probabilities.

    A binary concept: :math:`p\,e^+ + (1 - p)\,e^-`; a categorical one: :math:`\sum_j p_j e_j`; a continuous one:
    :math:`\sum_j c_j e_j`. Where the probabilities are corrected, so is what the task sees.

    =======  ================  ==============
    reads    ``"concepts"``    ``[*B, C]``
    reads    ``"exogenous"``   ``[*B, V, E]``
    writes   ``"mixture"``     ``[*B, K, E]``
    =======  ================  ==============

    Args:
        concepts: what the columns mean; K is their number.
        concepts_key, exogenous_key, out_key: the entries.

    Raises:
        BadValue: for concepts or embeddings of another shape.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, eq. 1.

    Examples:
        >>> mixing = ConceptMixing(ConceptSpec(["wing"]))
        >>> mixing(concepts=torch.tensor([0.25]), exogenous=torch.tensor([[4.0, 0.0], [0.0, 4.0]])).tolist()
        [[1.0, 3.0]]
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        concepts_key: NestedKey = "concepts",
        exogenous_key: NestedKey = "exogenous",
        out_key: NestedKey = "mixture",
    ) -> None:
        super().__init__([concepts_key, exogenous_key], [out_key])
        self.concepts, self.vectors = concepts, vectors(concepts)

    def compute(self, *entries: Tensor) -> Tensor:
        probs = check_block(entries[0], (self.concepts.size,), self._read[0])
        exogenous = check_block(entries[1], (self.vectors, entries[1].shape[-1]), self._read[1])
        if probs.shape[:-1] != exogenous.shape[:-2]:
            got = f"{list(probs.shape)} and {list(exogenous.shape)}"
            raise BadValue("concepts and embeddings of different batches", got=got, needed="[*B, C] and [*B, V, E]")
        parts = []
        for run, part in _parts(self.concepts, exogenous):
            weights = probs[..., run.start : run.stop]
            if run.kind == "binary":
                true, false = part.unbind(-2)
                parts.append(torch.lerp(false, true, weights.to(part.dtype).unsqueeze(-1)))
            elif run.cardinality == 1:
                parts.append(part * weights.unsqueeze(-1))
            else:
                shape = (run.last - run.first, run.cardinality)
                parts.append((weights.unflatten(-1, shape).unsqueeze(-2) @ part.unflatten(-2, shape)).squeeze(-2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _each(run: Run) -> int:
    """Embeddings for each column."""
    return 2 if run.kind == "binary" else 1


def _parts(concepts: ConceptSpec, exogenous: Tensor) -> list[tuple[Run, Tensor]]:
    """The embeddings of each run: ``[*B, k, 2, E]`` for k binary concepts, ``[*B, columns, E]`` for others."""
    parts, start = [], 0
    for run in concepts.runs:
        stop = start + (run.stop - run.start) * _each(run)
        part = exogenous[..., start:stop, :]
        parts.append((run, part.unflatten(-2, (-1, 2)) if run.kind == "binary" else part))
        start = stop
    return parts
