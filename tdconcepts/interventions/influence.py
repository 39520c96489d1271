"""Policies by influence: which concepts the target depends on, and which corrections would move it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Pullback, Site, Target
from tdconcepts.interventions.spaces import EPS, to_logits
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import ConceptStage, read_block
from tdconcepts.keys import GRADIENT, NestedKey, as_key, join, key_text

__all__ = ["ExpectedInfluencePolicy", "GradientPolicy"]


class _Gradients:
    """Where the gradients of a policy come from: a target behind the concepts, or an entry."""

    def __init__(self, target: Target | None, key: NestedKey | None, fallback: str | None) -> None:
        if target is not None and not isinstance(target, Target):
            raise BadType("not a target", got=repr(target), needed="a Target", fix='Target("logits", "argmax")')
        if target is not None and key is not None:
            raise BadValue("two sources of gradients", got=f"{target!r} and key={key!r}", needed="one of them")
        if fallback not in (None, "uniform"):
            raise BadValue("not a fallback", got=repr(fallback), needed='"uniform" or None')
        self.target, self.fallback = target, fallback
        self.key = None if key is None else as_key(key)

    def source(self, splice: Splice) -> tuple[Any, ...]:
        """The pull-back through the later stages; in a tuple, so that these are not registered twice."""
        if self.target is None:
            return ()
        if isinstance(self.target.of, Site):
            needed, fix = "an entry that a later stage writes", 'Target("logits", ...)'
            raise BadValue("a policy's target is an entry", got=repr(self.target.of), needed=needed, fix=fix)
        if splice.site is not None:
            return (Pullback(splice.rest[0], self.target, wrt=splice.site),)
        return (Pullback(TensorDictSequential(*splice.rest), self.target, wrt=splice.at),)

    def entry(self, splice: Splice) -> NestedKey:
        return join(GRADIENT, splice.at) if self.key is None else self.key

    def at(
        self, concepts: Tensor, tensordict: TensorDictBase, splice: Splice, source: tuple[Any, ...]
    ) -> Tensor | None:
        """The gradient ``[*B, C]``, or None where there is none and that is allowed."""
        if self.target is None:
            gradient = tensordict.get(self.entry(splice), None)
        elif source:
            (gradient,) = source[0].gradients(_with_batch(tensordict, source[0].in_keys, concepts))
        else:
            fix = "intervene(model, at=..., policy=GradientPolicy(target), ...) binds it to the later stages"
            raise BadValue("this policy is not part of a pipeline", got=repr(self.target), fix=fix)
        if gradient is None and self.fallback == "uniform":
            return None
        if gradient is None:
            raise BadKey(
                "no gradients to score by",
                got=f"no entry {key_text(self.entry(splice))} and no target",
                needed="one of them",
                fix='GradientPolicy(Target("logits", "argmax")), or fallback="uniform" to score all alike',
            )
        if gradient.shape != concepts.shape:
            needed = f"{list(concepts.shape)}: one target for each row"
            raise BadValue("the gradient has another shape", got=list(gradient.shape), needed=needed)
        return gradient.detach()


class _Influence:
    """What policies by influence share: bound to the later stages, they take their gradients themselves."""

    writes = "score"
    _gradients: _Gradients
    _source: tuple[Any, ...] = ()

    @property
    def target(self) -> Target | None:
        """What is explained."""
        return self._gradients.target

    def bind(self, splice: Splice) -> ConceptStage:
        bound = ConceptStage.bind(cast(ConceptStage, self), splice)
        source = self._gradients.source(splice)
        if source:
            cast(_Influence, bound)._source = source
            bound.in_keys = list(dict.fromkeys([splice.at, *self.reads(splice), *source[0].in_keys]))
        return bound

    def reads(self, splice: Splice) -> list[NestedKey]:
        return [self._gradients.entry(splice)] if self.target is None else []


class GradientPolicy(_Influence, ConceptStage):
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

    def __init__(
        self,
        target: Target | None = None,
        key: NestedKey | None = None,
        fallback: Literal["uniform"] | None = None,
    ) -> None:
        self._gradients = _Gradients(target, key, fallback)
        super().__init__()

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        gradient = self._gradients.at(concepts, tensordict, self.splice, self._source)
        return torch.zeros_like(concepts) if gradient is None else gradient.abs()


class ExpectedInfluencePolicy(_Influence, ConceptStage):
    r"""Scores a concept by how far its correction is expected to move the target, to first order.

    ``|gradient| x |expected change|``: :math:`\sum_v p_v\,|g \cdot (w_v - c)|` over the states v of a concept, where
    :math:`w_v` is what a label v is written as, :math:`c` the concept's columns and :math:`g` the target's gradient by
    them. For a binary concept in space ``"probs"`` that is :math:`2\,p\,(1 - p)\,|g|`: certain concepts and those that
    do not matter come last. With ``change="value"`` it is :math:`|g \cdot (value - c)|`, for a strategy whose value is
    known beforehand; of the ground truth, only an oracle knows it.

    =======  =======================================================  ===========
    reads    ``"concepts"``, or what it is bound to                   ``[*B, C]``
    reads    as :class:`GradientPolicy` does
    reads    with ``change="value"``: ``("intervention", "value")``   ``[*B, C]``
    writes   ``("intervention", "score")``                            ``[*B, C]``
    =======  =======================================================  ===========

    Args:
        target: as in :class:`GradientPolicy`.
        key: as in :class:`GradientPolicy`.
        change: ``"predicted"`` (default), over the states that the prediction thinks possible, or ``"value"``.

    Raises:
        BadKey, BadValue: as :class:`GradientPolicy`; and for ``"predicted"`` where a concept is continuous.

    Source: the expected change of the target of Shin et al., ICML 2023 (ECTP), to first order; Chauhan et al.,
    Interactive Concept Bottleneck Models, AAAI 2023.

    Examples:
        >>> from tensordict import TensorDict
        >>> gradient = torch.tensor([1.0, -2.0, 9.0])
        >>> td = TensorDict({"concepts": torch.tensor([0.5, 0.5, 1.0]), ("gradient", "concepts"): gradient})
        >>> ExpectedInfluencePolicy()(td)["intervention", "score"].tolist()
        [0.5, 1.0, 0.0]
    """

    def __init__(
        self,
        target: Target | None = None,
        key: NestedKey | None = None,
        change: Literal["predicted", "value"] = "predicted",
    ) -> None:
        if change not in ("predicted", "value"):
            raise BadValue("not a change", got=repr(change), needed='"predicted" or "value"')
        self.change = change
        self._gradients = _Gradients(target, key, None)
        super().__init__()

    def bind(self, splice: Splice) -> ConceptStage:
        if self.change == "predicted" and splice.continuous is not None:
            needed, fix = "binary and categorical concepts", 'change="value"'
            raise BadValue("a continuous prediction has no states", got="continuous concepts", needed=needed, fix=fix)
        return super().bind(splice)

    def reads(self, splice: Splice) -> list[NestedKey]:
        return [*super().reads(splice), *([splice.key("value")] if self.change == "value" else [])]

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        gradient = cast(Tensor, self._gradients.at(concepts, tensordict, self.splice, self._source))
        sizes = self.splice.cardinalities or (1,) * concepts.shape[-1]
        if self.change == "value":
            value = read_block(tensordict, self.splice.key("value")).detach().to(concepts)
            moved = gradient * (value - concepts)
            if self.splice.owner is not None:
                parts = moved.split(list(sizes), dim=-1)
                moved = torch.cat([part.sum(-1, keepdim=True).expand(part.shape) for part in parts], dim=-1)
            return moved.abs()
        is_logits = self.splice.space == "logits"
        if self.splice.owner is None:
            return _binary(concepts, gradient, is_logits)
        pairs = zip(concepts.split(list(sizes), dim=-1), gradient.split(list(sizes), dim=-1), sizes, strict=True)
        return torch.cat([_binary(c, g, is_logits) if n == 1 else _states(c, g, is_logits) for c, g, n in pairs], -1)


def _binary(concepts: Tensor, gradient: Tensor, is_logits: bool) -> Tensor:
    """The expected change over the labels 0 and 1."""
    p = concepts.sigmoid() if is_logits else concepts
    low, high = (to_logits(torch.tensor([0.0, 1.0])).tolist()) if is_logits else (0.0, 1.0)
    return gradient.abs() * (p * (high - concepts).abs() + (1 - p) * (low - concepts).abs())


def _states(concepts: Tensor, gradient: Tensor, is_logits: bool) -> Tensor:
    """The expected change over the states of one categorical concept, the same for all of its columns."""
    here = (gradient * concepts).sum(-1, keepdim=True)
    if is_logits:  # state v is written as 0 at v and log(EPS) elsewhere
        p, there = concepts.softmax(-1), torch.tensor(EPS).log().item() * (gradient.sum(-1, keepdim=True) - gradient)
    else:
        p, there = concepts, gradient
    return (p * (there - here).abs()).sum(-1, keepdim=True).expand(concepts.shape)


def _with_batch(tensordict: TensorDictBase, keys: Sequence[NestedKey], concepts: Tensor) -> TensorDictBase:
    """``tensordict`` itself, or what tensors that were passed without a batch size (by dispatch) would be with one."""
    batch = concepts.shape[:-1]
    entries = {key: tensordict.get(key, None) for key in keys}
    if tensordict.batch_dims or not batch or any(e is None or e.shape[: len(batch)] != batch for e in entries.values()):
        return tensordict
    return TensorDict(entries, batch)
