"""Learning which concept depends on which: priorities decide the direction, so there is never a cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tdconcepts.concepts.encoders import one_pair
from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.missing import missing
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_spec, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey

__all__ = ["LearnedGraph"]


class LearnedGraph(BlockStage):
    r"""Each column from the columns of concepts with a lower priority; the weights that stay large are the edges.

    :math:`\hat\ell_j = b_j + \sum_i A_{ij} W_{ij} c_i` with :math:`A_{ij} = \sigma((p_j - p_i - \tau) / T)` for i and j
    of different concepts in training, and :math:`A_{ij} = [p_j - p_i > \tau]` at evaluation. A concept whose label is
    missing (NaN in one of its columns) takes no part: its terms are left out of the sum. To the equations it is then
    like a 0; where labels are often missing, put what you expect in their place first, such as their mean. As
    :math:`\tau \ge 0`, an edge always leads to a higher priority: the graph has no cycle, in any state of training.
    Train it to predict the concepts from the labels (:class:`~tdconcepts.concepts.ConceptLoss`) plus
    :meth:`sparsity`, then read :meth:`dag` and build a :class:`~tdconcepts.concepts.GraphBottleneck`.

    =======  ==================  =============================================
    reads    ``"labels"``        ``[*B, C]``, columns, NaN where a label is missing
    writes   ``"explained"``     ``[*B, C]``, logits
    =======  ==================  =============================================

    Args:
        concepts: what the columns mean.
        threshold: :math:`\tau`, 0 or more.
        temperature: T, above 0.
        spread: the standard deviation of the initial differences of priorities.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a threshold below 0 (there would be cycles), a temperature that is not above 0, another width.

    Source: Massidda et al., Constraint-Free Structure Learning with Smooth Acyclic Orientations (COSMO), ICLR 2024.

    Examples:
        >>> graph = LearnedGraph(["a", "b", "c"])
        >>> adjacency = graph.adjacency(hard=True)
        >>> int(adjacency.sum()), len(graph.dag(least=0.0).levels)
        (3, 3)
    """

    def __init__(
        self,
        concepts: ConceptSpec | Sequence[str],
        threshold: float = 0.0,
        temperature: float = 0.1,
        spread: float = 1.0,
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        if not threshold >= 0:
            raise BadValue("a threshold below 0 allows cycles", got=repr(threshold), needed="0 or more")
        if not temperature > 0 or not spread > 0:
            got = f"temperature={temperature!r}, spread={spread!r}"
            raise BadValue("not above 0", got=got, needed="numbers above 0")
        in_key, out_key = one_pair(keys or {"labels": "explained"})
        super().__init__([in_key], [out_key])
        self.concepts = as_spec(concepts)
        self.threshold, self.temperature = float(threshold), float(temperature)
        size, owner = self.concepts.size, [i for i, n in enumerate(self.concepts.cardinalities) for _ in range(n)]
        self.priority = nn.Parameter(torch.randn(len(self.concepts)) * spread / 2**0.5)
        self.weight = nn.Parameter(0.1 * torch.randn(size, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("owner", torch.tensor(owner), persistent=False)

    def adjacency(self, hard: bool | None = None) -> Tensor:
        """``A [K, K]`` between concepts, from row to column; hard by default at evaluation."""
        hard = not self.training if hard is None else hard
        difference = self.priority - self.priority.unsqueeze(-1) - self.threshold
        if hard:
            return (difference > 0).to(difference.dtype)
        soft = (difference / self.temperature).sigmoid()
        return soft * (1 - torch.eye(len(soft), dtype=soft.dtype, device=soft.device))

    def strength(self) -> Tensor:
        """How much a concept depends on another, ``[K, K]``: the norm of its weights, where there is an edge."""
        count = len(self.concepts)
        squares = self.weight.square().new_zeros(count, count)
        pairs = self.owner.unsqueeze(-1) * count + self.owner
        total = squares.flatten().index_add(0, pairs.flatten(), self.weight.square().flatten())
        return total.unflatten(0, (count, count)).clamp(min=torch.finfo(total.dtype).tiny).sqrt() * self.adjacency()

    def sparsity(self) -> Tensor:
        """The sum of the strengths, to be added to the loss with a weight."""
        return self.strength().sum()

    def dag(self, least: float = 0.3) -> Dag:
        """The edges whose strength is above ``least``."""
        training = self.training
        try:
            strength = self.eval().strength().detach()
        finally:
            self.train(training)
        return Dag.from_adjacency(strength > least, self.concepts.names)

    def compute(self, *entries: Tensor) -> Tensor:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        mask = self.adjacency()[self.owner][:, self.owner]
        block = block.masked_fill(missing(self.concepts, block), 0)
        return block @ (mask * self.weight) + self.bias
