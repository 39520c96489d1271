"""The stages of an intervention: where it sits, what a policy or strategy is, and the one that replaces."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import INTERVENTION, NestedKey, as_key, join, key_text

__all__ = ["CallableStage", "ConceptStage", "ReplaceStage", "Splice", "read_block", "write"]


@dataclasses.dataclass(frozen=True)
class Splice:
    """Where an intervention sits in a pipeline: what a policy or a strategy is bound to.

    Args:
        at: the entry with the concepts, ``[*B, C]``.
        rest: the stages that run after the one that writes ``at``.
        names: the names of the concepts, where they are known.
        cardinalities: columns of each concept, where they are known: 1 for binary, n for n states.
        space: what the entry holds, ``"probs"`` or ``"logits"``, where it is known.
        out_key: the first name of the entries that the intervention writes.

    Examples:
        >>> splice = Splice("concepts", names=("wing", "colour"), cardinalities=(1, 3))
        >>> splice.key("score"), splice.columns, splice.owner
        (('intervention', 'score'), 4, (0, 1, 1, 1))
    """

    at: NestedKey = "concepts"
    rest: tuple[TensorDictModuleBase, ...] = ()
    names: tuple[str, ...] | None = None
    cardinalities: tuple[int, ...] | None = None
    space: str | None = None
    out_key: NestedKey = INTERVENTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", as_key(self.at))

    def key(self, name: str) -> tuple[str, ...]:
        """The entry of one stage: ``("intervention", name)``."""
        return join(self.out_key, name)

    @property
    def columns(self) -> int | None:
        """C, where the cardinalities are known."""
        return None if self.cardinalities is None else sum(self.cardinalities)

    @property
    def owner(self) -> tuple[int, ...] | None:
        """The concept of each column where a concept has several, else None: then column i is concept i."""
        if self.cardinalities is None or all(n == 1 for n in self.cardinalities):
            return None
        return tuple(i for i, n in enumerate(self.cardinalities) for _ in range(n))


class ConceptStage(TensorDictModuleBase):
    """A policy or a strategy: computes one tensor from the concepts.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", writes)``                  ``[*B, C]``
    =======  ============================================  ===========

    A subclass says what it :attr:`writes`, ``"score"`` (a policy: high = replaced first) or ``"value"`` (a strategy:
    what is written instead), computes it in :meth:`compute`, and names in :meth:`reads` what it needs besides. Built
    without keys, it is bound to an entry by :meth:`bind`, which :func:`~tdconcepts.interventions.intervene` calls.

    Examples:
        >>> class Largest(ConceptStage):
        ...     writes = "score"
        ...     def compute(self, concepts, tensordict):
        ...         return concepts.abs()
        >>> Largest()(concepts=torch.tensor([0.5, -2.0])).tolist()
        [0.5, 2.0]
    """

    writes: ClassVar[str] = "score"

    def __init__(self) -> None:
        super().__init__()
        self._place(Splice())

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        """The score or value of each column, ``[*B, C]``; ``concepts`` is detached."""
        raise NotImplementedError

    def reads(self, splice: Splice) -> list[NestedKey]:
        """The entries that :meth:`compute` needs besides the concepts."""
        return []

    def bind(self, splice: Splice) -> ConceptStage:
        """A copy of this stage that works on ``splice.at``; parameters are shared."""
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound._buffers = dict(self._buffers)
        bound._parameters = dict(self._parameters)
        bound._place(splice)
        return bound

    def _place(self, splice: Splice) -> None:
        self.splice = dataclasses.replace(splice, rest=())  # holds no modules: they belong to the pipeline
        self.in_keys = [splice.at, *(key for key in self.reads(splice) if key != splice.at)]
        self.out_keys = [splice.key(self.writes)]
        self._at, self._out = splice.at, self.out_keys[0]

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        concepts = read_block(tensordict, self._at)
        return write(tensordict, self._out, self.compute(concepts.detach(), tensordict))


class CallableStage(ConceptStage):
    """A plain function ``(concepts, tensordict) -> tensor or number`` as a policy or a strategy.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", writes)``                  ``[*B, C]``
    =======  ============================================  ===========

    Args:
        function: takes the concepts (detached) and the TensorDict.
        writes: ``"score"`` or ``"value"``.

    Examples:
        >>> CallableStage(lambda concepts, td: 1 - concepts, "value")(concepts=torch.tensor([0.25])).tolist()
        [0.75]
    """

    def __init__(self, function: Callable[[Tensor, TensorDictBase], Any], writes: str) -> None:
        self.writes = writes  # type: ignore[misc]
        super().__init__()
        self.function = function

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        result = self.function(concepts, tensordict)
        if isinstance(result, Tensor):
            return result.expand(concepts.shape) if result.ndim <= 1 else result
        if isinstance(result, (int, float)):
            return torch.full_like(concepts, result)
        kind = type(result).__name__
        raise BadType(f"a {self.writes} is no tensor", got=kind, needed=f"a tensor {list(concepts.shape)} or a number")


class ReplaceStage(TensorDictModuleBase):
    """Writes the value where the mask is True: ``concepts = where(mask, value, concepts)``.

    =======  ==================================================================  =================
    reads    ``"concepts"``                                                      ``[*B, C]``
    reads    ``("intervention", "mask")``                                        ``[*B, C]``, bool
    reads    ``("intervention", "value")``                                       ``[*B, C]``
    writes   ``("intervention", "before")``: what was there                      ``[*B, C]``
    writes   ``"concepts"``, in the dtype that it had                            ``[*B, C]``
    =======  ==================================================================  =================

    A NaN on the side that is not taken stays out of the result and of the gradient. No gradient reaches a prediction
    that was replaced, unless ``straight_through`` is on: then it gets the gradient that the new value gets (a
    prediction that is not finite gets none).

    Args:
        splice: where the intervention sits.
        straight_through: whether replaced predictions get a gradient.

    Raises:
        BadKey: when an entry is missing.
        BadValue: for a mask or value of another shape than the concepts.
        BadType: for a mask that is not bool.
    """

    def __init__(self, splice: Splice, *, straight_through: bool = False) -> None:
        super().__init__()
        self.straight_through = straight_through
        self.concepts = dataclasses.replace(splice, rest=())  # so that the next intervention here knows the names
        self._keys = splice.at, splice.key("mask"), splice.key("value"), splice.key("before")
        self.in_keys, self.out_keys = list(self._keys[:3]), [self._keys[3], splice.at]

    @property
    def space(self) -> str | None:
        """What the entry holds, ``"probs"`` or ``"logits"``, where it is known."""
        return self.concepts.space

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        at, mask_key, value_key, before = self._keys
        concepts = read_block(tensordict, at)
        mask, value = read_block(tensordict, mask_key), read_block(tensordict, value_key)
        if mask.dtype is not torch.bool:
            raise BadType("a mask is bool", got=f"{key_text(mask_key)} of {mask.dtype}", needed="True where to replace")
        if mask.shape != concepts.shape or value.shape != concepts.shape:
            raise BadValue(
                "mask, value and concepts differ in shape",
                got=f"mask {list(mask.shape)}, value {list(value.shape)}",
                needed=f"{list(concepts.shape)}, as {key_text(at)}",
            )
        new = value.to(concepts)
        if self.straight_through:
            finite = concepts.nan_to_num(0.0, 0.0, 0.0)
            new = new + (finite - finite.detach())
        write(tensordict, before, concepts)
        return tensordict.set(at, torch.where(mask, new, concepts))


def read_block(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The tensor ``[*B, C]`` at ``key``.

    Raises:
        BadKey: when it is missing, with the nearest names.
        BadValue: when it has no columns.
    """
    block = tensordict.get(key, None)
    if not isinstance(block, Tensor):
        have = [k for k in tensordict.keys(True, True) if k != key]
        raise BadKey(f"no entry {key_text(key)} in the TensorDict", got=f"entries {have}", needed=nearest(key, have))
    if block.ndim == tensordict.batch_dims:
        raise BadValue(
            f"{key_text(key)} has no columns",
            got=f"shape {list(block.shape)} in a TensorDict of batch size {list(tensordict.batch_size)}",
            needed=f"{[*tensordict.batch_size, 'C']}",
        )
    return block


def write(tensordict: TensorDictBase, key: NestedKey, value: Tensor) -> TensorDictBase:
    """Set an entry.

    Raises:
        BadValue: when the TensorDict is locked.
    """
    if tensordict.is_locked:
        fix = "pass td.copy(), which is shallow and not locked"
        raise BadValue("the TensorDict is locked", got=f"an entry {key_text(key)} to write", fix=fix)
    return tensordict.set(key, value)
