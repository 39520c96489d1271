"""Strategies: what is written in place of a concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.calling import get_entry
from tdconcepts.interventions.spaces import Space, as_space, check_range, known_places, written
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import ConceptStage, in_kind
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Do", "GroundTruth"]


class Do(ConceptStage):
    """Writes a constant: do(concept = value).

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  ===========

    Args:
        value: a number for all concepts, or one for each column (a list or a tensor ``[C]``; an ``nn.Parameter`` is
            learned). Broadcast to ``[*B, C]``. A NaN leaves its concept alone.
        space: None (default) or ``"continuous"``: the value is written as it is, in the entry's own units. Else the
            value is a label, a probability or a state for each concept, and is converted to what the entry holds:
            ``"probs"``, ``"logits"`` (clamped as in :func:`~tdconcepts.interventions.to_logits`) or ``"onehot"``.

    Raises:
        BadType: for a value that is no number, list or tensor.
        BadValue: for a value that does not broadcast to the concepts, an unknown space, or a label outside [0, 1].

    Examples:
        >>> Do(0.0)(concepts=torch.tensor([0.9, 0.2])).tolist()
        [0.0, 0.0]
        >>> Do([1.0, 0.5], space="logits")(concepts=torch.zeros(2))
        tensor([9.21..., 0.0000])
        >>> Do([1], space="onehot")(concepts=torch.zeros(3)).tolist()
        [0.0, 1.0, 0.0]
    """

    writes = "value"

    def __init__(self, value: float | Sequence[float] | Tensor, space: Space | None = None) -> None:
        super().__init__()
        try:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            needed = "a number, a list of numbers or a tensor"
            raise BadType("not a value to write", got=f"{value!r}", needed=needed) from None
        self.space = as_space(space)
        probs = space in ("probs", "logits") and not isinstance(value, nn.Parameter) and not tensor.ndim
        if probs and not 0 <= tensor <= 1:
            raise BadValue("not a probability", got=f"{value!r}", needed=f"a number in [0, 1], as space={space!r} says")
        self.misses = bool(tensor.isnan().any()) or type(self).compute is not Do.compute
        if isinstance(tensor, nn.Parameter):
            self.constant: Tensor = tensor
        else:
            self.register_buffer("constant", tensor.detach().clone(), persistent=False)  # a setting, no state

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        value = self.constant
        if value.dtype is not concepts.dtype or value.device != concepts.device:
            value = in_kind(value, concepts)
        if self.space is not None and self.space != "continuous":
            like = concepts.new_zeros(concepts.shape[-1])
            label = value.expand_as(like) if not value.ndim and self.space != "onehot" else value
            lead = () if label.ndim < 2 else label.shape[:-1]
            value = written(label, like.expand(*lead, -1), self.splice, self.space, "the values")
        elif value is self.constant and not value.requires_grad:
            value = value.clone()  # who writes into the entry does not change what is done next
        try:
            return value.expand_as(concepts)
        except RuntimeError:
            got, needed = list(value.shape), f"what broadcasts to {list(concepts.shape)}"
            states = value.shape[-1:] == (len(self.splice.cardinalities or ()),)
            fix = 'space="onehot", where these are states' if states else None
            raise BadValue("the value does not fit the concepts", got=got, needed=needed, fix=fix) from None


class GroundTruth(ConceptStage):
    """Writes the true concepts, read from an entry of the same TensorDict.

    =======  ============================================  =========================================================
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    reads    ``key``                                       ``[*B, C]``, or ``[*B, K]``: the states of K concepts
    writes   ``("intervention", "value")``                 ``[*B, C]``, NaN where a label is not known
    =======  ============================================  =========================================================

    A label is a probability (0, 1, or soft in between). ``space`` says what the *concepts* entry holds, and so what is
    written: ``"probs"`` the label itself, ``"logits"`` its logit (a ground truth of 1 is not the logit 1: it is clamped
    as in :func:`~tdconcepts.interventions.to_logits`, 9.21), ``"onehot"`` the one-hot block of states, ``"continuous"``
    the number as it is. Where the model has categorical concepts, states ``[*B, K]`` are spread to one-hot columns in
    every space. A label that is NaN, or ``missing``, is not known: that concept of that row keeps its prediction, and
    the mask is False there.

    Args:
        key: the entry with the labels.
        space: ``"probs"``, ``"logits"``, ``"onehot"`` or ``"continuous"``. Default: what the model declares, else
            ``"probs"``.
        missing: a number, often -1, that stands for "not known" besides NaN. Default: none does.

    Raises:
        BadKey: when the labels are missing.
        BadValue: for labels of another shape, labels outside [0, 1], states out of range (these two are not checked
            under ``torch.compile`` and ``vmap``), or a space that is not the model's.

    Examples:
        >>> truth = GroundTruth("labels", space="logits")
        >>> truth(concepts=torch.zeros(2), labels=torch.tensor([1, 0]))
        tensor([ 9.21..., -9.21...])
        >>> GroundTruth("labels", missing=-1)(concepts=torch.zeros(2), labels=torch.tensor([1, -1]))
        tensor([1., nan])
    """

    writes = "value"

    def __init__(self, key: NestedKey, space: Space | None = None, *, missing: float | None = None) -> None:
        self.key, self.space, self.missing = as_key(key), as_space(space), missing
        if not (missing is None or type(missing) in (int, float)):
            raise BadType("not a number", got=f"missing={missing!r}", needed="the number that stands for not known")
        super().__init__()
        self._wrong = f"the labels in {self.key!r} are no probabilities"

    def reads(self, splice: Splice) -> list[NestedKey]:
        return [self.key]

    def _place(self, splice: Splice) -> None:
        super()._place(splice)
        plain = (self.space or splice.space) in (None, "probs") and splice.continuous is None
        self._direct = plain and type(self).compute is GroundTruth.compute

    def bind(self, splice: Splice) -> ConceptStage:
        known = {self.space, splice.space}
        if None not in known and len(known) > 1 and ("logits" in known or "continuous" in known):
            raise BadValue(
                f"the model holds other numbers in {key_text(splice.at)}",
                got=f"GroundTruth({self.key!r}, space={self.space!r})",
                needed=f"space={splice.space!r}",
                fix="leave space out to take the model's",
            )
        return super().bind(splice)

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        return self._written(self._labels(concepts, tensordict), concepts)

    def known(self, concepts: Tensor, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        labels = self._labels(concepts, tensordict) if self._direct else None
        if labels is None or labels.shape != concepts.shape:
            return super().known(concepts, tensordict)
        complete = check_range(labels, 0, 1, self._wrong)  # one look for both
        value = in_kind(labels, concepts)
        return value, None if complete else known_places(value)

    def _labels(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        labels = get_entry(tensordict, self.key)
        if not isinstance(labels, Tensor):
            if labels is not None:
                raise BadType("the labels are no tensor", got=type(labels).__name__, needed=f"numbers in {self.key!r}")
            have = list(tensordict.keys(True, True))
            raise BadKey("the labels are missing", got=f"no entry {key_text(self.key)}", needed=nearest(self.key, have))
        if self.missing is not None:
            labels = torch.where(
                labels == self.missing, torch.nan, labels.to(torch.promote_types(concepts.dtype, torch.float32))
            )
        return labels

    def _written(self, labels: Tensor, concepts: Tensor) -> Tensor:
        space = self.space or as_space(self.splice.space) or "probs"
        return written(labels, concepts, self.splice, space, f"the labels in {key_text(self.key)}")
