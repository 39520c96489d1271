"""Strategies: what is written in place of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.interventions.stages import ConceptStage, Splice
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Do", "GroundTruth", "to_logits"]

EPS = 1e-4
"""How far a probability is kept from 0 and 1 when it is written as a logit: 1 becomes logit(1 - 1e-4) = 9.21."""


def to_logits(probs: Tensor, cardinalities: Sequence[int] | None = None, eps: float = EPS) -> Tensor:
    """``probs [*B, C] -> logits [*B, C]`` that the sigmoid (binary) or softmax (categorical) takes back.

    ``logit(clamp(p, eps, 1 - eps))`` for a binary concept, ``log(max(p, eps))`` for the states of a categorical one.
    Computed in float32 at least: in bfloat16, ``1 - eps`` would be 1.

    Examples:
        >>> to_logits(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-9.21...,  0.0000,  9.21...])
    """
    wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
    binary = wide.clamp(eps, 1 - eps).logit()
    if cardinalities is None or all(n == 1 for n in cardinalities):
        return binary.to(probs.dtype)
    is_binary = torch.tensor([n == 1 for n in cardinalities for _ in range(n)], device=probs.device)
    return torch.where(is_binary, binary, wide.clamp(min=eps).log()).to(probs.dtype)


class Do(ConceptStage):
    """Writes a constant: do(concept = value).

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        value: a number for all concepts, or one for each column (a list or a tensor ``[C]``; an ``nn.Parameter`` is
            learned). Broadcast to ``[*B, C]``.
        space: None (default): the value is written as it is, in the entry's own units. ``"logits"``: the value is a
            probability, and its logit is written (clamped as in :func:`to_logits`).

    Raises:
        BadType: for a value that is no number, list or tensor.
        BadValue: for a value that does not broadcast to the concepts, an unknown space, or, with ``space="logits"``, a
            number outside [0, 1].

    Examples:
        >>> Do(0.0)(concepts=torch.tensor([0.9, 0.2])).tolist()
        [0.0, 0.0]
        >>> Do([1.0, 0.5], space="logits")(concepts=torch.zeros(2))
        tensor([9.21..., 0.0000])
    """

    writes = "value"

    def __init__(self, value: float | Sequence[float] | Tensor, space: Literal["logits"] | None = None) -> None:
        super().__init__()
        if space not in (None, "logits"):
            raise BadValue("not a space to convert to", got=repr(space), needed='"logits" or None')
        try:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            needed = "a number, a list of numbers or a tensor"
            raise BadType("not a value to write", got=f"{value!r}", needed=needed) from None
        if space == "logits" and tensor.numel() and not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise BadValue(
                "not probabilities", got=f"{value!r}", needed='numbers in [0, 1], as space="logits" converts'
            )
        self.space = space
        if isinstance(tensor, nn.Parameter):
            self.constant = tensor
        else:
            self.register_buffer("constant", tensor.detach().clone(), persistent=False)  # a setting, no state

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        constant = self.constant.to(concepts)
        if self.space == "logits":
            constant = to_logits(constant, self.splice.cardinalities if constant.ndim else None)
        try:
            return constant.expand(concepts.shape)
        except RuntimeError:
            got, needed = list(constant.shape), f"what broadcasts to {list(concepts.shape)}"
            raise BadValue("the value does not fit the concepts", got=got, needed=needed) from None


class GroundTruth(ConceptStage):
    """Writes the true concepts, read from an entry of the same TensorDict.

    =======  ============================================  =========================================================
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    reads    ``key``                                       ``[*B, C]``, or ``[*B, K]`` ints: the states of K concepts
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  =========================================================

    A label is a probability (0, 1, or soft in between). ``space`` says what the *concepts* entry holds, and so what is
    written: ``"probs"`` the label itself, ``"logits"`` its logit (a ground truth of 1 is not the logit 1: it is clamped
    as in :func:`to_logits`, 9.21), ``"onehot"`` the one-hot block of integer states. Where the model has categorical
    concepts, integer states ``[*B, K]`` are spread to one-hot columns in the other spaces too. A NaN label at a
    selected place is written as it is.

    Args:
        key: the entry with the labels.
        space: ``"probs"``, ``"logits"`` or ``"onehot"``. Default: what the model declares, else ``"probs"``.

    Raises:
        BadKey: when the labels are missing.
        BadValue: for labels of another shape, labels outside [0, 1], states out of range (these two are not checked
            under ``torch.compile`` and ``vmap``), or a space that is not the model's.

    Examples:
        >>> truth = GroundTruth("labels", space="logits")
        >>> truth(concepts=torch.zeros(2), labels=torch.tensor([1, 0]))
        tensor([ 9.21..., -9.21...])
    """

    writes = "value"

    def __init__(self, key: NestedKey, space: Literal["probs", "logits", "onehot"] | None = None) -> None:
        if space not in (None, "probs", "logits", "onehot"):
            raise BadValue("not a space", got=repr(space), needed='"probs", "logits" or "onehot"')
        self.key, self.space = as_key(key), space
        super().__init__()

    def reads(self, splice: Splice) -> list[NestedKey]:
        return [self.key]

    def bind(self, splice: Splice) -> ConceptStage:
        if (
            self.space is not None
            and splice.space is not None
            and (self.space == "logits") != (splice.space == "logits")
        ):
            raise BadValue(
                f"the model holds other numbers in {key_text(splice.at)}",
                got=f"GroundTruth({self.key!r}, space={self.space!r})",
                needed=f"space={splice.space!r}",
                fix="leave space out to take the model's",
            )
        return super().bind(splice)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        labels = tensordict.get(self.key, None)
        if not isinstance(labels, Tensor):
            have = list(tensordict.keys(True, True))
            raise BadKey("the labels are missing", got=f"no entry {key_text(self.key)}", needed=nearest(self.key, have))
        cardinalities = self.splice.cardinalities
        columns = concepts.shape[-1]
        if self.space == "onehot" and cardinalities is None:
            cardinalities = (columns,)
        if cardinalities is not None and len(cardinalities) < columns and not labels.is_floating_point():
            labels = _one_hot(labels, concepts, cardinalities)
        if labels.shape != concepts.shape:
            fix = "labels.unsqueeze(-1)" if labels.shape == concepts.shape[:-1] and columns == 1 else None
            raise BadValue(
                "labels and concepts differ in shape", got=list(labels.shape), needed=list(concepts.shape), fix=fix
            )
        _check_range(labels, 0, 1, "labels are probabilities", self.key)
        probs = labels.to(concepts)
        is_logits = (self.space or self.splice.space) == "logits"
        return to_logits(probs, cardinalities) if is_logits else probs


def _one_hot(states: Tensor, concepts: Tensor, cardinalities: Sequence[int]) -> Tensor:
    """``states [*B, K]`` (``[*B]`` for one concept) to columns ``[*B, C]``; a binary concept's state is its label."""
    if len(cardinalities) == 1 and states.shape == concepts.shape[:-1]:
        states = states.unsqueeze(-1)
    if states.shape == concepts.shape:
        return states
    if states.shape != (*concepts.shape[:-1], len(cardinalities)):
        needed = f"{[*concepts.shape[:-1], len(cardinalities)]} states or {list(concepts.shape)} columns"
        raise BadValue("labels and concepts differ in shape", got=list(states.shape), needed=needed)
    parts = []
    for i, n in enumerate(cardinalities):
        state = states[..., i : i + 1]
        _check_range(state, 0, max(n - 1, 1), f"the states of concept {i}", None)
        parts.append(state == torch.arange(n, device=states.device) if n > 1 else state == 1)
    return torch.cat(parts, dim=-1)


def _check_range(labels: Tensor, low: int, high: int, what: str, key: NestedKey | None) -> None:
    """Refuse numbers outside ``[low, high]`` (NaN passes), where the numbers can be looked at."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(labels) or not labels.numel():
        return
    if labels.dtype is not torch.bool:
        least, most = labels.detach().aminmax()
        if least < low or most > high:
            got = f"{least.item():g} to {most.item():g}" + ("" if key is None else f" in {key_text(key)}")
            raise BadValue(what, got=got, needed=f"{low} to {high}")
