"""Priors: what concepts are before anything is seen."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor, nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import as_spec
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["ConceptPrior"]


class ConceptPrior(TensorDictModuleBase):
    """The same logits for each row, learned or fixed: the equation of concepts that nothing is known about.

    =======  ======================  ============
    reads    nothing but the batch
    writes   ``"concepts_logits"``   ``[*B, C]``
    =======  ======================  ============

    Args:
        concepts: what the columns mean.
        probs: the probabilities ``[C]`` (numbers, where a concept is continuous), as :meth:`ConceptSpec.logits` takes
            them. Default: one half, or all states alike.
        learned: whether the logits are parameters (default) or a buffer.
        out_key: the entry to write.

    Raises:
        BadValue: for probabilities of another shape, or outside [0, 1].

    Examples:
        >>> from tensordict import TensorDict
        >>> prior = ConceptPrior(ConceptSpec(["rain"]), torch.tensor([0.25]), learned=False)
        >>> prior(TensorDict({}, [2]))["concepts_logits"].sigmoid().tolist()
        [[0.25], [0.25]]
    """

    def __init__(
        self,
        concepts: ConceptSpec,
        probs: Tensor | None = None,
        learned: bool = True,
        out_key: NestedKey = "concepts_logits",
    ) -> None:
        super().__init__()
        self.concepts = as_spec(concepts)
        self.in_keys: list[NestedKey] = []
        self.out_keys = [as_key(out_key)]
        self._key = self.out_keys[0]
        if probs is None:
            logits = torch.zeros(self.concepts.size)
        else:
            if probs.shape != (self.concepts.size,):
                raise BadValue("not a prior of these concepts", got=list(probs.shape), needed=f"[{self.concepts.size}]")
            logits = self.concepts.logits(self.concepts.targets(probs))
            if not bool(logits.isfinite().all()):
                raise BadValue("a prior is known", got="NaN or inf", needed="numbers")
        self.logits: Tensor
        if learned:
            self.logits = nn.Parameter(logits.detach().clone())
        else:
            self.register_buffer("logits", logits.detach().clone())

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if tensordict.is_locked:
            raise BadValue("the TensorDict is locked", got=f"{key_text(self._key)} to write", fix="pass td.copy()")
        return tensordict.set(self._key, self.logits.expand(*tensordict.batch_size, self.concepts.size).clone())
