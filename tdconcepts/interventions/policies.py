"""Policies: which concepts are replaced first. High score = first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.interventions.draws import check_generator
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import ConceptStage, read_block
from tdconcepts.keys import NestedKey, as_keys

__all__ = ["LearnedPolicy", "OrderPolicy", "RandomPolicy", "UncertaintyPolicy", "UniformPolicy"]


class UniformPolicy(ConceptStage):
    """Scores every concept alike, so that concepts are replaced in the order of their index.

    ``score = 0``

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``
    =======  ============================================  ===========

    Raises:
        BadKey: when the concepts are missing. BadValue: where the TensorDict is locked, or the entry has no columns.

    Examples:
        >>> UniformPolicy()(concepts=torch.tensor([0.9, 0.2])).tolist()
        [0.0, 0.0]
    """

    writes = "score"
    fixed = True

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        return concepts.new_zeros(1).expand_as(concepts)


class OrderPolicy(ConceptStage):
    """Replaces the concepts in one order for all rows, such as one that was learned from data or asked of an expert.

    ``score = n - position`` for n concepts in the order; those that are not named score 0 and come last, by index.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        order: concepts, by name or index, those to be replaced first in front.

    Raises:
        BadKey: for an unknown name, with the nearest ones.
        BadValue: for an empty order, a concept that is there twice, an index out of range.

    Examples:
        >>> OrderPolicy([2, 0])(concepts=torch.zeros(4)).tolist()
        [1.0, 0.0, 2.0, 0.0]
    """

    writes = "score"
    fixed = True

    def __init__(self, order: Sequence[str | int]) -> None:
        listed = list(order) if isinstance(order, (Sequence, range)) and not isinstance(order, str) else []
        if not listed or not all(isinstance(item, str) or type(item) is int for item in listed):
            raise BadValue("not an order", got=repr(order), needed='names or indices: ["wing", "beak"] or [3, 0]')
        if len(set(listed)) < len(listed):
            raise BadValue("a concept is in the order twice", got=repr(listed), needed="each once")
        self.order = listed
        super().__init__()

    def bind(self, splice: Splice) -> ConceptStage:
        names = splice.names or ()
        unknown = [item for item in self.order if isinstance(item, str) and item not in names]
        if unknown:
            fix = None if names else "pass concepts=ConceptSpec(names), or indices"
            raise BadKey(f"no concept {unknown[0]!r}", got=repr(unknown), needed=nearest(unknown[0], names), fix=fix)
        return super().bind(splice)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        names, owner = self.splice.names or (), self.splice.owner
        count = concepts.shape[-1] if owner is None else owner[-1] + 1
        row = [0.0] * count
        for position, item in enumerate(self.order):
            index = names.index(item) if isinstance(item, str) else item
            if not 0 <= index < count:
                raise BadValue("a concept of the order is out of range", got=index, needed=f"0 to {count - 1}")
            row[index] = float(len(self.order) - position)
        columns = row if owner is None else [row[i] for i in owner]
        exact = concepts.dtype
        if not exact.is_floating_point or len(self.order) > 2 / torch.finfo(exact).eps:
            exact = torch.promote_types(exact, torch.float32)  # else neighbours would be alike
        return torch.tensor(columns, dtype=exact, device=concepts.device).expand(concepts.shape)


class RandomPolicy(ConceptStage):
    """Scores every concept by an independent draw, so that each row replaces concepts in an order of its own.

    ``score ~ U[0, 1)``, one draw for each row and concept (the columns of a categorical concept share theirs).

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``, float32
    =======  ============================================  ===========

    Args:
        generator: where the draws come from; the global generator is then not touched. Default: the global one.

    Raises:
        BadType: for a generator that is none.

    Examples:
        >>> policy = RandomPolicy(generator=torch.Generator().manual_seed(0))
        >>> policy(concepts=torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    writes = "score"
    sees_value = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = check_generator(generator)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        owner = self.splice.owner
        columns = concepts.shape[-1] if owner is None else owner[-1] + 1
        shape = (*concepts.shape[:-1], columns)
        source = concepts.device if self.generator is None else self.generator.device
        draws = torch.rand(shape, generator=self.generator, device=source).to(concepts.device)
        return draws if owner is None else draws[..., list(owner)]


class UncertaintyPolicy(ConceptStage):
    r"""Scores a concept by how undecided its prediction is: the least certain are replaced first.

    By ``measure="distance"``, :math:`-|c - center|`; by ``measure="entropy"``, the entropy as a share of the largest
    possible one, :math:`-\sum_v p_v \log p_v / \log n` (of ``p, 1 - p`` for a binary concept), so that concepts of
    any number of states can be compared.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        center: the undecided value, for the distance. Default: 0.5, or 0 where the model says that the entry holds
            logits.
        measure: ``"distance"`` or ``"entropy"``. Default: the entropy where a concept is categorical, else the
            distance. A continuous concept has no entropy: its score is minus infinity.

    Raises:
        BadValue: for an unknown measure, and for the distance where a concept is categorical.

    Source: Shin et al., A Closer Look at the Intervention Procedure of Concept Bottleneck Models, ICML 2023 (UCP).

    Examples:
        >>> UncertaintyPolicy()(concepts=torch.tensor([0.5, 0.75])).tolist()
        [-0.0, -0.25]
        >>> UncertaintyPolicy(measure="entropy")(concepts=torch.tensor([0.5, 1.0]))
        tensor([1., 0.])
    """

    writes = "score"
    sees_value = False

    def __init__(self, center: float | None = None, *, measure: Literal["distance", "entropy"] | None = None) -> None:
        if not (center is None or type(center) in (int, float)):
            raise BadType("not a center", got=repr(center), needed="a number: 0.5 for probabilities, 0 for logits")
        if measure not in (None, "distance", "entropy"):
            raise BadValue("not a measure", got=repr(measure), needed='"distance" or "entropy"')
        if center is not None and measure == "entropy":
            raise BadValue("the entropy has no center", got=f"center={center!r}", needed='measure="distance"')
        self.center, self.measure = center, measure
        super().__init__()

    def bind(self, splice: Splice) -> ConceptStage:
        if splice.owner is not None and (self.center is not None or self.measure == "distance"):
            many = [n for n in splice.cardinalities or () if n > 1]
            needed, fix = "binary concepts", 'UncertaintyPolicy(measure="entropy")'
            raise BadValue("the distance to a center scores binary concepts", got=f"{many}", needed=needed, fix=fix)
        return super().bind(splice)

    def _place(self, splice: Splice) -> None:
        super()._place(splice)
        self._by_entropy = self.measure == "entropy" or splice.owner is not None
        self._undecided = self.center if self.center is not None else 0.0 if splice.space == "logits" else 0.5

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        if self._by_entropy:
            return self._entropy(concepts)
        concepts = concepts.float() if concepts.dtype is torch.bool else concepts
        return (concepts - self._undecided).abs_().neg_()

    def _entropy(self, concepts: Tensor) -> Tensor:
        sizes = self.splice.cardinalities or (1,) * concepts.shape[-1]
        is_logits, parts = self.splice.space == "logits", []
        for part, n in _runs(concepts, sizes):
            if n == 1:
                p = part.sigmoid() if is_logits else part
                parts.append((torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2))
            else:
                p = part.softmax(-1) if is_logits else part
                share = torch.special.entr(p).sum(-1, keepdim=True) / math.log(n)
                parts.append(share.expand(part.shape).flatten(-2))
        score = torch.cat(parts, dim=-1)
        if self.splice.continuous is None:
            return score
        return score.masked_fill(torch.tensor(self.splice.continuous, device=score.device), -torch.inf)


class LearnedPolicy(ConceptStage):
    """Scores concepts by a network that learns which ones to ask for.

    ``score = scorer(concepts, ...)``. The score keeps its graph: a loss on ``("intervention", "score")`` trains the
    scorer (to imitate a greedy oracle, say). With a ``temperature`` a loss behind the intervention trains it as well,
    through :class:`~tdconcepts.interventions.ReplaceStage`. The concepts themselves are detached.

    =======  ============================================  =======================
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    reads    ``in_keys``                                   as the scorer does
    writes   ``("intervention", "score")``                 ``[*B, C]`` or ``[*B, K]``
    =======  ============================================  =======================

    Args:
        scorer: a network from the concepts, and the entries of ``in_keys`` after them, to a score for each column
            ``[*B, C]``, or for each concept ``[*B, K]``.
        in_keys: further entries that it is given, one key or a list.
        temperature: how sharp the choice is for the gradient, in units of the score. Default: no such gradient.

    Raises:
        BadType: for a scorer that can't be called. BadValue: for a temperature that is not above zero, and a score of
            another shape. BadKey: for an entry that is missing.

    Source: the straight-through estimator of a choice by softmax: Jang et al., ICLR 2017; learned policies: Espinosa
    Zarlenga et al., Learning to Receive Help, NeurIPS 2023.

    Examples:
        >>> policy = LearnedPolicy(nn.Linear(3, 3), temperature=1.0)
        >>> policy(concepts=torch.zeros(2, 3)).requires_grad
        True
    """

    writes = "score"
    sees_value = False

    def __init__(
        self,
        scorer: nn.Module,
        in_keys: NestedKey | list[NestedKey] | None = None,
        *,
        temperature: float | None = None,
    ) -> None:
        if isinstance(scorer, type) or not callable(scorer):
            raise BadType("not a scorer", got=repr(scorer), needed="a network from the concepts to their scores")
        if not (temperature is None or (type(temperature) in (int, float) and temperature > 0)):
            raise BadValue("not a temperature", got=repr(temperature), needed="a number above 0, or None")
        self._more = [] if in_keys is None else as_keys(in_keys)
        super().__init__()
        self.scorer, self.temperature = scorer, temperature

    def reads(self, splice: Splice) -> list[NestedKey]:
        return self._more

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        score = self.scorer(concepts, *(read_block(tensordict, key) for key in self._more))
        owner = self.splice.owner
        if owner is not None and score.shape == (*concepts.shape[:-1], owner[-1] + 1):
            score = score[..., list(owner)]
        if score.shape != concepts.shape:
            raise BadValue("the scorer gave another shape", got=list(score.shape), needed=list(concepts.shape))
        return score


def _runs(concepts: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Neighbouring concepts of one cardinality n together: ``[*B, m]`` for n = 1, else ``[*B, m, n]``."""
    runs: list[list[int]] = []
    for n in sizes:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    parts = concepts.split([n * count for n, count in runs], dim=-1)
    return [(p if n == 1 else p.unflatten(-1, (count, n)), n) for p, (n, count) in zip(parts, runs, strict=True)]
