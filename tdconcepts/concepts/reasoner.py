"""The memory reasoner: concepts, a rule chosen from a memory, and its truth."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdconcepts.concepts.activation import ConceptActivation
from tdconcepts.concepts.encoders import ConceptEncoder
from tdconcepts.concepts.rules import LogicRules, RuleLikelihood, RuleSelector
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import ConceptModel, as_spec, beside, wrapped
from tdconcepts.keys import NestedKey, as_key, join

__all__ = ["ConceptMemoryReasoner"]


class ConceptMemoryReasoner(ConceptModel):
    r"""Input -> latent -> concepts, and a rule for each task; the task is what the chosen rule says of the concepts.

    :math:`p_t = \sum_m p(m \mid z)\, y_{tm}(c)`, see :class:`~tdconcepts.concepts.LogicRules`. The stages are
    ``"encoder"``, ``"concepts"``, ``"activation"``, ``"selector"`` and ``"rules"``. The rules can be read
    (``model["rules"].text()``) and checked before anything is run. Train with the loss of the concepts and with
    :meth:`likelihood`.

    =======  ============================================  ==================
    reads    ``in_keys`` (default ``"observation"``)       as the encoder
    writes   ``"latent"``                                  ``[*B, H]``
    writes   ``key + "_logits"``                           ``[*B, C]``
    writes   ``key`` (default ``"concepts"``)              ``[*B, C]``
    writes   ``"selection"``, ``"rules"``                  ``[*B, T, M]``
    writes   ``"probs"``                                   ``[*B, T]``
    =======  ============================================  ==================

    Args:
        encoder: a bare ``nn.Module`` to the latent, or a TensorDictModule that writes ``"latent"``.
        tasks: number of yes-or-no tasks, T.
        concepts: what the columns mean: a :class:`ConceptSpec`, or the names of binary concepts.
        in_features: width of the latent, H.
        memory_size: number of rules for each task, M.
        in_keys: what a bare encoder reads.
        key: the entry of the concepts; the other entries lie beside it.

    Raises:
        BadKey: for an encoder that has keys and does not write the latent.
        BadType: for an encoder that is no module.
        BadValue: for a size below 1, and for ``in_keys`` of an encoder that has keys.

    Source: Debot et al., Interpretable Concept-Based Memory Reasoning, NeurIPS 2024.

    Examples:
        >>> import torch
        >>> model = ConceptMemoryReasoner(nn.Linear(8, 16), 1, ["wing", "beak"], in_features=16, memory_size=4)
        >>> model(observation=torch.zeros(3, 8))[-1].shape, model.likelihood().in_keys
        (torch.Size([3, 1]), ['selection', 'labels', 'task'])
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: int,
        concepts: ConceptSpec | Sequence[str],
        in_features: int,
        memory_size: int = 10,
        in_keys: NestedKey | list[NestedKey] | None = None,
        key: NestedKey = "concepts",
    ) -> None:
        spec, key = as_spec(concepts), as_key(key)
        names = ("latent", "selection", "rules", "probs")
        latent, selection, rules, probs = (beside(key, name) for name in names)
        logits = beside(key, join(key)[-1] + "_logits")
        keys = {"concepts": key, "selection": selection, "rules": rules, "probs": probs}
        stages = {
            "encoder": wrapped(encoder, "encoder", in_keys or "observation", latent, given=in_keys),
            "concepts": ConceptEncoder(in_features, spec, keys={latent: logits}),
            "activation": ConceptActivation(spec, logits, key),
            "selector": RuleSelector(in_features, memory_size, tasks, keys={latent: selection}),
            "rules": LogicRules(spec, tasks, memory_size, keys=keys),
        }
        super().__init__(stages, spec, key)

    def likelihood(
        self, labels: NestedKey = "labels", task: NestedKey = "task", reconstruction: float = 1.0
    ) -> RuleLikelihood:
        """The stage that writes ``("loss", "rules")``, to be run after the model in training."""
        return RuleLikelihood(self["rules"], [beside(self.key, "selection"), labels, task], reconstruction)
