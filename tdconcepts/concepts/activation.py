"""From concept logits to probabilities, or to hard decisions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey

__all__ = ["ConceptActivation", "harden"]


class ConceptActivation(BlockStage):
    """From concept logits to probabilities: a sigmoid for binary concepts, a softmax for each categorical one.

    Continuous concepts stay as they are. ``hard=True`` decides: 1 where a binary concept's probability is above one
    half, the most probable state of a categorical one.

    =======  ==========================  ==============
    reads    ``in_key``                  ``[*B, C]``
    writes   ``out_key``                 ``[*B, C]``
    =======  ==========================  ==============

    Args:
        concepts: what the columns mean.
        in_key: the entry with the logits.
        out_key: the entry for the probabilities.
        hard: False (default); True, which has no gradient; or ``"straight_through"``, which has that of the
            probabilities.

    Raises:
        BadKey: when the entry is missing.
        BadValue: when its width is not that of the spec, the TensorDict is locked, or for another ``hard``.

    Examples:
        >>> import torch
        >>> stage = ConceptActivation(ConceptSpec(["wing", "beak"]), "concepts_logits", "concepts")
        >>> stage(concepts_logits=torch.zeros(2)).tolist()
        [0.5, 0.5]
    """

    space = "probs"

    def __init__(
        self,
        concepts: ConceptSpec,
        in_key: NestedKey = "concepts_logits",
        out_key: NestedKey = "concepts",
        hard: bool | Literal["straight_through"] = False,
    ) -> None:
        if hard not in (True, False, "straight_through"):
            raise BadValue("not a kind of activation", got=f"hard={hard!r}", needed='True, False or "straight_through"')
        super().__init__([in_key], [out_key])
        self.concepts, self.hard = concepts, hard

    def compute(self, *entries: Tensor) -> Tensor:
        probs = self.concepts.probs(check_block(entries[0], (self.concepts.size,), self._read[0]))
        if not self.hard:
            return probs
        hard = harden(self.concepts, probs)
        return hard + (probs - probs.detach()) if self.hard == "straight_through" else hard


def harden(concepts: ConceptSpec, probs: Tensor) -> Tensor:
    """``probs [*B, C]`` as decisions: 1 above one half, one-hot at the most probable state; continuous as they are.

    Args:
        concepts: what the columns mean.
        probs: ``[*B, C]``.

    Examples:
        >>> harden(ConceptSpec(["wing", "colour"], [1, 3]), torch.tensor([0.6, 0.2, 0.5, 0.3])).tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    parts = []
    for run in concepts.runs:
        part = probs[..., run.start : run.stop].detach()
        if run.kind == "binary":
            part = (part > 0.5).to(probs.dtype)
        elif run.kind == "categorical":
            best = part.unflatten(-1, (run.last - run.first, run.cardinality)).argmax(-1)
            part = F.one_hot(best, run.cardinality).to(probs.dtype).flatten(-2)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
