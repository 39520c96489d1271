"""Policies: which concepts are replaced first. High score = first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.pullback import Pullback
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.targets import Target
from tdconcepts.interventions.stages import ConceptStage, Splice
from tdconcepts.keys import GRADIENT, NestedKey, as_key, join, key_text

__all__ = ["GradientPolicy", "RandomPolicy", "UncertaintyPolicy", "UniformPolicy"]


class UniformPolicy(ConceptStage):
    """Scores every concept alike, so that concepts are replaced in the order of their index.

    ``score = 0``

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``
    =======  ============================================  ===========

    Examples:
        >>> UniformPolicy()(concepts=torch.tensor([0.9, 0.2])).tolist()
        [0.0, 0.0]
    """

    writes = "score"

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        return torch.zeros_like(concepts)


class RandomPolicy(ConceptStage):
    """Scores every concept by an independent draw, so that each row replaces concepts in an order of its own.

    ``score ~ U[0, 1)``, one draw for each row and concept (the columns of a categorical concept share theirs).

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``, float32
    =======  ============================================  ===========

    Args:
        generator: where the draws come from; the global generator is then not touched. Default: the global one.

    Examples:
        >>> policy = RandomPolicy(generator=torch.Generator().manual_seed(0))
        >>> policy(concepts=torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    writes = "score"

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if not (generator is None or isinstance(generator, torch.Generator)):
            needed = "a torch.Generator or None"
            raise BadType("not a generator", got=repr(generator), needed=needed, fix="torch.Generator().manual_seed(0)")
        super().__init__()
        self.generator = generator

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        owner = self.splice.owner
        columns = concepts.shape[-1] if owner is None else owner[-1] + 1
        shape = (*concepts.shape[:-1], columns)
        source = concepts.device if self.generator is None else self.generator.device
        draws = torch.rand(shape, generator=self.generator, device=source).to(concepts.device)
        return draws if owner is None else draws[..., list(owner)]


class UncertaintyPolicy(ConceptStage):
    """Scores a binary concept by how near its prediction is to undecided: the least certain are replaced first.

    ``score = -|concept - center|``

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "score")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        center: the undecided value. Default: 0.5, or 0 where the model says that the entry holds logits.

    Raises:
        BadValue: when bound to categorical concepts.

    Examples:
        >>> UncertaintyPolicy()(concepts=torch.tensor([0.5, 0.75])).tolist()
        [-0.0, -0.25]
    """

    writes = "score"

    def __init__(self, center: float | None = None) -> None:
        if not (center is None or type(center) in (int, float)):
            raise BadType("not a center", got=repr(center), needed="a number: 0.5 for probabilities, 0 for logits")
        super().__init__()
        self.center = center

    def bind(self, splice: Splice) -> ConceptStage:
        if splice.owner is not None:
            many = [n for n in splice.cardinalities or () if n > 1]
            needed, fix = "binary concepts", "write the entropy as a callable policy, (concepts, td) -> score"
            raise BadValue("the distance to a center scores binary concepts", got=f"{many}", needed=needed, fix=fix)
        return super().bind(splice)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        undecided = 0.0 if self.splice.space == "logits" else 0.5
        return (concepts - (undecided if self.center is None else self.center)).abs_().neg_()


class GradientPolicy(ConceptStage):
    """Scores a concept by its influence: the most influential are replaced first.

    ``score = |d target / d concept|``, each row by itself, at the predicted concepts.

    =======  =======================================================  ===========
    reads    ``"concepts"``, or what it is bound to                   ``[*B, C]``
    reads    with a target: what the later stages read                as they do
    reads    without: ``("gradient", "concepts")``, or ``key``        ``[*B, C]``
    writes   ``("intervention", "score")``                            ``[*B, C]``
    =======  =======================================================  ===========

    With a target, the gradient is taken through the stages that follow in the pipeline (only those that the target
    needs: no action is sampled). Without one, it is read from an entry that an earlier stage wrote. Without either, it
    is an error, unless ``fallback="uniform"``, which then scores as :class:`UniformPolicy`.

    The later stages run twice then, for the gradient and for the model: a capture inside them says which call it means,
    ``Site("head", call=-1)``.

    Args:
        target: a :class:`~tdconcepts.Target` with one value for each row, in terms of a later entry.
        key: where to read gradients, when there is no target.
        fallback: ``"uniform"``, or None (default): without gradients there is no score.

    Raises:
        BadKey: without a target, when the gradients are missing.
        BadValue: for a target and a key at once, gradients of another shape than the concepts, or a target that was
            never bound to later stages.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"concepts": torch.zeros(2), ("gradient", "concepts"): torch.tensor([-3.0, 1.0])})
        >>> GradientPolicy()(td)["intervention", "score"].tolist()
        [3.0, 1.0]
    """

    writes = "score"

    def __init__(
        self,
        target: Target | None = None,
        key: NestedKey | None = None,
        fallback: Literal["uniform"] | None = None,
    ) -> None:
        if target is not None and not isinstance(target, Target):
            raise BadType("not a target", got=repr(target), needed="a Target", fix='Target("logits", "argmax")')
        if target is not None and key is not None:
            raise BadValue("two sources of gradients", got=f"{target!r} and key={key!r}", needed="one of them")
        if fallback not in (None, "uniform"):
            raise BadValue("not a fallback", got=repr(fallback), needed='"uniform" or None')
        self.target, self.fallback = target, fallback
        self.key = None if key is None else as_key(key)
        self._source: tuple[Any, ...] = ()
        super().__init__()

    def bind(self, splice: Splice) -> ConceptStage:
        bound = cast(GradientPolicy, super().bind(splice))
        if self.target is not None:
            if isinstance(self.target.of, Site):
                needed, fix = "an entry that a later stage writes", 'Target("logits", ...)'
                raise BadValue("a policy's target is an entry", got=repr(self.target.of), needed=needed, fix=fix)
            rest = TensorDictSequential(*splice.rest)
            # In a tuple, so that the stages are not registered twice: they belong to the pipeline.
            bound._source = (Pullback(rest, self.target, wrt=splice.at),)
            bound.in_keys = [splice.at, *(k for k in bound._source[0].in_keys if k != splice.at)]
        return bound

    def reads(self, splice: Splice) -> list[NestedKey]:
        return [self._key(splice)] if self.target is None else []

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        if self.target is None:
            gradient = tensordict.get(self._key(self.splice), None)
        elif self._source:
            (gradient,) = self._source[0].gradients(_with_batch(tensordict, self._source[0].in_keys, concepts))
        else:
            fix = "intervene(model, at=..., policy=GradientPolicy(target), ...) binds it to the later stages"
            raise BadValue("this policy is not part of a pipeline", got=repr(self.target), fix=fix)
        if gradient is None and self.fallback == "uniform":
            return torch.zeros_like(concepts)
        if gradient is None:
            raise BadKey(
                "no gradients to score by",
                got=f"no entry {key_text(self._key(self.splice))} and no target",
                needed="one of them",
                fix='GradientPolicy(Target("logits", "argmax")), or fallback="uniform" to score all alike',
            )
        if gradient.shape != concepts.shape:
            needed = f"{list(concepts.shape)}: one target for each row"
            raise BadValue("the gradient has another shape", got=list(gradient.shape), needed=needed)
        return gradient.detach().abs()

    def _key(self, splice: Splice) -> NestedKey:
        return join(GRADIENT, splice.at) if self.key is None else self.key


def _with_batch(tensordict: TensorDictBase, keys: Sequence[NestedKey], concepts: Tensor) -> TensorDictBase:
    """``tensordict`` itself, or what tensors that were passed without a batch size (by dispatch) would be with one."""
    batch = concepts.shape[:-1]
    entries = {key: tensordict.get(key, None) for key in keys}
    if tensordict.batch_dims or not batch or any(e is None or e.shape[: len(batch)] != batch for e in entries.values()):
        return tensordict
    return TensorDict(entries, batch)
