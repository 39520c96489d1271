"""One block of concepts, computed level by level along a graph; what is set by do reaches all that depends on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_size, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, as_key

__all__ = ["GraphPropagation", "HyperEquations", "LinearEquations", "graph_layout"]


Part: TypeAlias = tuple[int, int, Tensor]  # the columns of an earlier level: from, to, values [*B, to - from]


class Equations(Protocol):
    """The logits of a level: columns ``start`` to ``stop`` in the order of the levels, from the levels before."""

    width: int

    def __call__(self, start: int, stop: int, before: Sequence[Part], context: Tensor) -> Tensor: ...


class LinearEquations(nn.Module):
    r"""A root is read from the context; any other concept is linear in its parents:
    :math:`\ell_j = b_j + \sum_{i \in pa(j)} W_{ji} c_i`.

    Called by :class:`GraphPropagation` for each level, with the columns ``start`` to ``stop`` of that level (in the
    order of the levels), what the levels before it hold, and the context ``[*B, R]``.

    Args:
        layout: of the columns, see :class:`graph_layout`.

    Examples:
        >>> equations = LinearEquations(graph_layout(ConceptSpec(["a", "b"]), Dag(["a", "b"], [("a", "b")])))
        >>> parents = [(0, 1, torch.zeros(3, 1))]
        >>> equations(1, 2, parents, torch.zeros(3, 1)).tolist()
        [[0.0], [0.0], [0.0]]
    """

    mask: Tensor

    def __init__(self, layout: graph_layout) -> None:
        super().__init__()
        mask, self.width, self._edges = layout.mask, layout.roots, layout.edges
        self.register_buffer("mask", mask, persistent=False)
        fan_in = mask.sum(-1, keepdim=True).clamp(min=1)
        self.weight = nn.Parameter((2 * torch.rand(mask.shape) - 1) / fan_in.sqrt())
        self.bias = nn.Parameter(torch.zeros(len(mask)))

    def forward(self, start: int, stop: int, before: Sequence[Part], context: Tensor) -> Tensor:
        if not start:
            return context
        logits = self.bias[start:stop]
        for low, high, values in before:
            if (low, high, start) in self._edges:
                logits = logits + values @ (self.weight[start:stop, low:high] * self.mask[start:stop, low:high]).mT
        return logits


class HyperEquations(nn.Module):
    r"""Every row has its own equations: the weights of a concept's parents are predicted from its embedding.

    A root: :math:`\ell_j = w \cdot e_j + b`. Any other concept:
    :math:`\ell_j = \sum_{i \in pa(j)} W_{ji}(e_j) c_i + b_j`, with
    :math:`W_{ji}(e) = v_{ji} \cdot \mathrm{LeakyReLU}(A e + a)`: a hidden layer that all concepts share, and a readout
    :math:`v_{ji}` for each edge.

    Args:
        layout: as :class:`LinearEquations`.
        size: width of an embedding, E.
        hidden: width of the hidden layer.

    Raises:
        BadValue: for a size below 1.

    Examples:
        >>> equations = HyperEquations(graph_layout(ConceptSpec(["a", "b"]), Dag(["a", "b"], [("a", "b")])), size=4)
        >>> equations.weights(torch.zeros(3, 2, 4)).shape
        torch.Size([3, 2, 2])
    """

    mask: Tensor
    back: Tensor

    def __init__(self, layout: graph_layout, size: int, hidden: int = 8) -> None:
        super().__init__()
        as_size(embedding_size=size, hidden=hidden)
        self.register_buffer("back", layout.order.argsort(), persistent=False)
        mask, self.width, self._edges = layout.mask, size, layout.edges
        self.register_buffer("mask", mask, persistent=False)
        fan_in = mask.sum(-1).clamp(min=1).reshape(-1, 1, 1) * hidden
        self.trunk, self.score = nn.Linear(size, hidden), nn.Linear(size, 1)
        self.readout = nn.Parameter((2 * torch.rand(len(mask), hidden, len(mask)) - 1) / fan_in.sqrt())
        self.bias = nn.Parameter(torch.zeros(len(mask)))

    def forward(self, start: int, stop: int, before: Sequence[Part], context: Tensor) -> Tensor:
        if not start:
            return self.score(context[..., :stop, :]).squeeze(-1)
        hidden, logits = F.leaky_relu(self.trunk(context[..., start:stop, :])), self.bias[start:stop]
        for low, high, values in before:
            if (low, high, start) in self._edges:
                readout = self.readout[start:stop, :, low:high] * self.mask[start:stop, None, low:high]
                pulled = F.linear(values, readout.flatten(0, 1)).unflatten(-1, readout.shape[:2])  # [*B, level, hidden]
                logits = logits + (hidden * pulled).sum(-1)
        return logits

    def weights(self, context: Tensor) -> Tensor:
        """The weight of column i in the equation of column j, ``[*B, C (j), C (i)]``, in the order of the block.

        A root has none. The logit of any other column is ``(weights @ concepts.unsqueeze(-1)).squeeze(-1)`` and a bias.

        Args:
            context: the embeddings, ``[*B, C, E]``, in the order of the block: ``td["exogenous"]``.
        """
        readout = (self.readout * self.mask[:, None])[self.back][..., self.back]
        return torch.einsum("...jh,jhi->...ji", F.leaky_relu(self.trunk(context)), readout)


class GraphPropagation(BlockStage):
    r"""Concepts along a graph: each from its parents, one matrix product for each level.

    :math:`c_j = \sigma(\ell_j(c_{pa(j)}, x))` (a softmax for categorical ones). Where the entry of ``do`` is there and
    not NaN, :math:`c_j` is that value instead: the edges into j are cut, and all that depends on j sees it. Labels
    given as ``do`` are corrections, and teacher forcing in training.

    =======  ==========================  =========================================
    reads    ``keys[0]``                 ``[*B, R]`` (linear), ``[*B, C, E]`` (hyper)
    reads    ``do``, where it is there   ``[*B, C]``, NaN where nothing is set
    writes   ``keys[1]``                 ``[*B, C]``, logits
    writes   ``keys[2]``                 ``[*B, C]``, probabilities
    =======  ==========================  =========================================

    Args:
        concepts: what the columns mean; the dag has the same names.
        dag: which concept depends on which.
        equations: :class:`LinearEquations` or :class:`HyperEquations`, or a module called like these.
        keys: the entries of context, logits and probabilities.
        do: the entry of what is set.

    Raises:
        BadValue: for other than three keys, a dag of other names, entries of another shape.

    Source: Dominici et al., Causal Concept Graph Models, ICLR 2025; De Felice et al., Causally Reliable Concept
    Bottleneck Models, NeurIPS 2025 (structural equations with predicted weights).

    Examples:
        >>> spec, dag = ConceptSpec(["a", "b"]), Dag(["a", "b"], [("a", "b")])
        >>> layout = graph_layout(spec, dag)
        >>> stage = GraphPropagation(spec, dag, LinearEquations(layout))
        >>> logits, probs = stage(torch.zeros(3, 1))
        >>> probs[:, 0].tolist(), probs.shape
        ([0.5, 0.5, 0.5], torch.Size([3, 2]))
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        dag: Dag,
        equations: nn.Module,
        keys: Sequence[NestedKey] = ("context", "concepts_logits", "concepts"),
        do: NestedKey = "do",
    ) -> None:
        if len(keys) != 3:
            raise BadValue("propagation has three entries", got=repr(keys), needed="context, logits, probabilities")
        super().__init__(keys[:1], keys[1:], [do])
        layout = graph_layout(concepts, dag)
        self.concepts, self.dag, self.equations = concepts, dag, equations
        self._levels, self._specs, self._in_order = layout.levels, layout.specs, layout.in_order
        self.register_buffer("order", layout.order, persistent=False)
        self.register_buffer("back", layout.order.argsort(), persistent=False)

    @property
    def space(self) -> str:
        """What the entry of the concepts holds."""
        return "probs"

    def setting(self, key: NestedKey) -> GraphPropagation:
        """The same stage (its parameters are shared) that reads what is set from another entry.

        An intervention on a graph of concepts runs it behind the first: what depends on a changed concept follows.
        """
        again = copy.copy(self)
        again.optional_keys = [as_key(key)]
        return again

    def leaning(self, key: NestedKey) -> GraphPropagation:
        """The same stage whose concepts lean on the entry ``key`` ``[*B, C]``: not by its value, only by its gradient.

        So the derivative by that entry is the total one by each concept, through all that depends on it.
        """
        again = copy.copy(self)
        again._read, again.in_keys = [*self._read, as_key(key)], [*self.in_keys, as_key(key)]
        return again

    def compute(self, *entries: Any) -> tuple[Tensor, ...]:
        (context, *lean), do = entries[:-1], entries[-1]
        shape = (self.equations.width,) if isinstance(self.equations, LinearEquations) else context.shape[-2:]
        check_block(context, shape, self._read[0])
        if do is not None:
            check_block(do, (self.concepts.size,), self.optional_keys[0])
            do = do.to(context) if self._in_order else do.to(context)[..., self.order]
        push = [(each - each.detach() if self._in_order else (each - each.detach())[..., self.order]) for each in lean]
        if isinstance(self.equations, HyperEquations):
            check_block(context, (self.concepts.size, self.equations.width), self._read[0])
            context = context if self._in_order else context[..., self.order, :]
        logits: list[Tensor] = []
        before: list[Part] = []
        for (start, stop), spec in zip(self._levels, self._specs, strict=True):
            found = self.equations(start, stop, before, context)
            if not start and found.shape[-1] != stop:
                raise BadValue("the equations give other roots", got=list(found.shape), needed=f"[*B, {stop}]")
            probs = spec.probs(found)
            if do is not None:
                given = do[..., start:stop]
                probs = torch.where(given.isnan(), probs, given)
            for each in push:
                probs = probs + each[..., start:stop]
            logits.append(found)
            before.append((start, stop, probs))
        block, values = torch.cat(logits, -1), torch.cat([probs for _, _, probs in before], -1)
        return (block, values) if self._in_order else (block[..., self.back], values[..., self.back])


class graph_layout:  # noqa: N801
    """How the columns of a block lie when they are sorted by the levels of a graph.

    Attributes: ``levels`` (start and stop), ``specs`` (of each level), ``order`` (the column at each place), ``mask``
    (``[C, C]``, True at (j, i) where j depends on i, sorted), ``edges`` (for levels with edges between them: from, to,
    and where the later one starts), ``roots`` (columns of roots), ``in_order``.

    Args:
        concepts: what the columns mean.
        dag: which of them depends on which; the same names.

    Raises:
        BadValue: for other names in the dag.

    Examples:
        >>> spec = ConceptSpec(["b", "a"], [1, 2])
        >>> layout = graph_layout(spec, Dag(["a", "b"], [("a", "b")]))
        >>> layout.levels, layout.order.tolist(), layout.mask.int().tolist(), layout.roots
        ([(0, 2), (2, 3)], [1, 2, 0], [[0, 0, 0], [0, 0, 0], [1, 1, 0]], 2)
    """

    def __init__(self, concepts: ConceptSpec, dag: Dag) -> None:
        if set(dag.names) != set(concepts.names):
            apart = sorted(set(dag.names) ^ set(concepts.names))
            raise BadValue("graph and concepts have other names", got=f"{apart[:4]} in one only", needed="the same")
        place = {name: i for i, name in enumerate(concepts.names)}
        level_of = {name: depth for depth, level in enumerate(dag.levels) for name in level}
        names = sorted(concepts.names, key=lambda name: (level_of[name], place[name]))
        self.levels: list[tuple[int, int]] = []
        self.specs: list[ConceptSpec] = []
        columns: list[int] = []
        start = 0
        for depth in range(len(dag.levels)):
            some = [name for name in names if level_of[name] == depth]
            chosen = [place[name] for name in some]
            spec = ConceptSpec(some, [concepts.cardinalities[i] for i in chosen], [concepts.kinds[i] for i in chosen])
            self.levels.append((start, start + spec.size))
            self.specs.append(spec)
            start += spec.size
        starts = torch.tensor([0, *concepts.cardinalities]).cumsum(0).tolist()
        for name in names:
            columns += range(starts[place[name]], starts[place[name] + 1])
        self.order = torch.tensor(columns)
        self.in_order = columns == sorted(columns)
        owner = torch.tensor([i for i, n in enumerate(concepts.cardinalities) for _ in range(n)])[self.order]
        wanted = torch.tensor([dag.names.index(name) for name in concepts.names])
        adjacency = dag.adjacency[wanted][:, wanted]
        self.mask = adjacency[owner][:, owner].mT.contiguous()
        self.roots = self.levels[0][1]
        self.edges = {
            (low, high, start)
            for i, (start, stop) in enumerate(self.levels)
            for low, high in self.levels[:i]
            if bool(self.mask[start:stop, low:high].any())
        }
