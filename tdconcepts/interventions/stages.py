"""The stages of an intervention: what a policy or strategy is, and the stage that replaces."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.calling import get_entry
from tdconcepts.interventions.spaces import is_visible, known_places
from tdconcepts.interventions.splice import Splice
from tdconcepts.keys import NestedKey, key_text

__all__ = ["CallableStage", "ConceptStage", "ReplaceStage", "check_unlocked", "in_kind", "read_block", "write"]


class ConceptStage(TensorDictModuleBase):
    """A policy or a strategy: computes one tensor from the concepts.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", writes)``                  ``[*B, C]``
    =======  ============================================  ===========

    A subclass says what it :attr:`writes`, ``"score"`` (a policy: high = replaced first) or ``"value"`` (a strategy:
    what is written instead), computes it in :meth:`compute`, and names in :meth:`reads` what it needs besides. Built
    without keys, it is bound to an entry by :meth:`bind`, which :func:`~tdconcepts.interventions.intervene` calls. A
    strategy that can write NaN, for "no value here", leaves :attr:`misses` on; a policy whose scores are the same for
    every row and prediction says so by :attr:`fixed`, and is asked once; one that looks at nothing but the concepts and
    what it :meth:`reads` says so by ``sees_value = False``. A subclass with a :meth:`compute` of its own says it anew.

    Raises:
        BadKey: when the concepts are missing. BadValue: where the TensorDict is locked, or the entry has no columns.

    Examples:
        >>> class Largest(ConceptStage):
        ...     writes = "score"
        ...     def compute(self, concepts, tensordict):
        ...         return concepts.abs()
        >>> Largest()(concepts=torch.tensor([0.5, -2.0])).tolist()
        [0.5, 2.0]
    """

    writes: ClassVar[str] = "score"
    misses: bool = True
    fixed: bool = False
    sees_value: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "compute" in vars(cls):  # what was said of another one does not hold
            for name in ("misses", "fixed", "sees_value"):
                if name not in vars(cls):
                    setattr(cls, name, getattr(ConceptStage, name))

    def __init__(self) -> None:
        super().__init__()
        self._place(Splice())

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        """The score or value of each column, ``[*B, C]``; ``concepts`` is detached."""
        needed = "compute(self, concepts, tensordict), which gives a tensor [*B, C]"
        raise BadType(f"{type(self).__name__} computes nothing", got="no compute", needed=needed)

    def known(self, concepts: Tensor, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """What :meth:`compute` gives, and where that is no NaN (bool; None: everywhere)."""
        value = self.compute(concepts, tensordict)
        return value, known_places(value) if self.misses else None

    def reads(self, splice: Splice) -> list[NestedKey]:
        """The entries that :meth:`compute` needs besides the concepts."""
        return []

    def bind(self, splice: Splice) -> ConceptStage:
        """A copy of this stage that works on ``splice.at``; parameters are shared."""
        bound = copy.copy(self)
        for name, kept in vars(self).items():  # its modules, parameters, buffers and hooks: what is added stays there
            if name in _OF_MODULES:
                bound.__dict__[name] = kept.copy()
        bound._place(splice)
        return bound

    def _place(self, splice: Splice) -> None:
        self.splice = splice.bare()
        self.in_keys = [splice.at, *(key for key in self.reads(splice) if key != splice.at)]
        self.out_keys = [splice.key(self.writes)]
        self._at, self._out = splice.at, self.out_keys[0]

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        concepts = read_block(tensordict, self._at)
        return write(tensordict, self._out, self.compute(concepts.detach(), tensordict))


_OF_MODULES = frozenset(name for name, kept in vars(nn.Module()).items() if isinstance(kept, dict))


class CallableStage(ConceptStage):
    """A plain function ``(concepts, tensordict) -> tensor or number`` as a policy or a strategy.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", writes)``                  ``[*B, C]``
    =======  ============================================  ===========

    Args:
        function: takes the concepts (detached) and the TensorDict; a policy finds the value there, which comes first.
        writes: ``"score"`` or ``"value"``.

    Examples:
        >>> CallableStage(lambda concepts, td: 1 - concepts, "value")(concepts=torch.tensor([0.25])).tolist()
        [0.75]
    """

    def __init__(self, function: Callable[[Tensor, TensorDictBase], Any], writes: str) -> None:
        self.writes = writes  # type: ignore[misc]
        got = repr(function)
        with contextlib.suppress(ValueError):  # no signature is known
            try:
                got = f"{getattr(function, '__name__', function)}{inspect.signature(function)}"
                inspect.signature(function).bind(None, None)
            except TypeError as error:
                raise BadType(f"not a {writes}", got=got, needed="a function (concepts, td)") from error
        super().__init__()
        self.function = function

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        result = self.function(concepts, tensordict)
        if isinstance(result, Tensor):
            fits = result.ndim == 0 or (result.ndim == 1 and result.shape[0] in (1, concepts.shape[-1]))
            return result.expand(concepts.shape) if fits else result
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
    reads    ``("intervention", "score")``, with a ``temperature``               ``[*B, C]``
    writes   ``("intervention", "before")``: what was there                      ``[*B, C]``
    writes   ``"concepts"``, in the dtype that it had                            ``[*B, C]``
    =======  ==================================================================  =================

    A NaN on the side that is not taken stays out of the result and of the gradient. No gradient reaches a prediction
    that was replaced, unless ``straight_through`` is on: then it gets the gradient that the new value gets (a
    prediction that is not finite gets none).

    Args:
        splice: where the intervention sits.
        straight_through: whether replaced predictions get a gradient.
        temperature: T, in units of the score. With it, a score gets the gradient of the expected concepts if one of
            them were chosen by ``softmax(score / T)``: the result is the same, a policy can learn. Default: none.

    Raises:
        BadKey: when an entry is missing.
        BadValue: for a mask or value of another shape than the concepts.
        BadType: for a mask that is not bool.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"concepts": torch.tensor([0.9, 0.2])})
        >>> td["intervention", "mask"] = torch.tensor([True, False])
        >>> td["intervention", "value"] = torch.tensor([0.0, float("nan")])
        >>> ReplaceStage(Splice("concepts"))(td)["concepts"]
        tensor([0.0000, 0.2000])
    """

    def __init__(self, splice: Splice, *, straight_through: bool = False, temperature: float | None = None) -> None:
        super().__init__()
        self.straight_through, self.temperature = straight_through, temperature
        self.concepts = splice.bare()  # so that the next intervention here knows the names
        self.keys = splice.at, splice.key("mask"), splice.key("value"), splice.key("before"), splice.key("score")
        self.in_keys, self.out_keys = list(self.keys[:3]), [self.keys[3], splice.at]
        if temperature is not None:
            self.in_keys.append(self.keys[4])

    @property
    def space(self) -> str | None:
        """What the entry holds, ``"probs"`` or ``"logits"``, where it is known."""
        return self.concepts.space

    def replaced(self, concepts: Tensor, mask: Tensor, value: Tensor, score: Tensor | None = None) -> Tensor:
        """``concepts [*B, C]`` with the values where the mask is True."""
        if mask.dtype is not torch.bool:
            got = f"{key_text(self.keys[1])} of {mask.dtype}"
            raise BadType("a mask is bool", got=got, needed="True where to replace")
        if mask.shape != concepts.shape or value.shape != concepts.shape:
            raise self._other_shapes(f"mask {list(mask.shape)}, value {list(value.shape)}", concepts)
        new = self._as(value, concepts)
        if self.straight_through:
            finite = concepts.nan_to_num(0.0, 0.0, 0.0)
            new = new + (finite - finite.detach())
        result = torch.where(mask, new, concepts)
        if self.temperature is not None and score is not None and score.requires_grad:
            result = result + self._towards(
                score, (new - concepts).detach().nan_to_num(0.0, 0.0, 0.0), self.temperature
            )
        return result

    def needs_no_mask(self, concepts: Tensor) -> bool:
        """Whether :meth:`all_replaced` says it all where every concept is replaced: no gradient is asked for."""
        return self.temperature is None and not (concepts.requires_grad and torch.is_grad_enabled())

    def all_replaced(self, concepts: Tensor, value: Tensor) -> Tensor:
        """The values, as the concepts are: a copy takes a quarter of the time of a choice."""
        if value.shape != concepts.shape:
            raise self._other_shapes(f"value {list(value.shape)}", concepts)
        new = self._as(value, concepts)
        return new.clone()

    def _as(self, value: Tensor, concepts: Tensor) -> Tensor:
        """The values in the concepts' dtype and on their device, which must hold them."""
        if value.dtype is concepts.dtype and value.device == concepts.device:
            return value
        new = value.to(concepts)
        if value.is_floating_point() and not concepts.is_floating_point() and is_visible(value):
            lost = value[(new != value) & (value == value)]  # a NaN is not written
            if lost.numel():
                got = f"{lost[0].item():g} for {key_text(self.keys[0])} of {concepts.dtype}"
                needed, fix = "whole numbers that this dtype has", "concepts of a floating dtype"
                raise BadValue("the value does not fit the concepts", got=got, needed=needed, fix=fix)
        return new

    def _other_shapes(self, got: str, concepts: Tensor) -> BadValue:
        needed = f"{list(concepts.shape)}, as {key_text(self.keys[0])}"
        return BadValue("mask, value and concepts differ in shape", got=got, needed=needed)

    def _towards(self, score: Tensor, change: Tensor, temperature: float) -> Tensor:
        """Zeros ``[*B, C]`` with the gradient of ``change * softmax(score / T)``; columns share a concept's weight."""
        sizes, owner = self.concepts.cardinalities, self.concepts.owner
        logits = score / temperature
        if sizes is not None and owner is not None:
            first = [sum(sizes[:i]) for i in range(len(sizes))]
            weights = logits[..., first].softmax(-1)[..., list(owner)]
        else:
            weights = logits.softmax(-1)
        return ((weights - weights.detach()) * change).to(change.dtype)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        at, mask_key, value_key, before, score_key = self.keys
        concepts = read_block(tensordict, at)
        mask, value = read_block(tensordict, mask_key), read_block(tensordict, value_key)
        score = None if self.temperature is None else read_block(tensordict, score_key)
        result = self.replaced(concepts, mask, value, score)
        write(tensordict, before, concepts)
        return tensordict.set(at, result)


def in_kind(value: Tensor, concepts: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of the concepts; in its own dtype where theirs has no NaN."""
    keeps = value.is_floating_point() and not concepts.is_floating_point()
    return value.to(concepts.device) if keeps else value.to(concepts)


def read_block(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The tensor ``[*B, C]`` at ``key``.

    Raises:
        BadKey: when it is missing, with the nearest names.
        BadValue: when it has no columns.
    """
    block = get_entry(tensordict, key)
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
    check_unlocked(tensordict, key)
    return tensordict.set(key, value)


def check_unlocked(tensordict: TensorDictBase, key: NestedKey) -> None:
    """Refuse to write to a locked TensorDict.

    Raises:
        BadValue: when it is locked.
    """
    if tensordict.is_locked:
        fix = "pass td.copy(), which is shallow and not locked"
        raise BadValue("the TensorDict is locked", got=f"an entry {key_text(key)} to write", fix=fix)
