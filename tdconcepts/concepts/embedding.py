"""The concept embedding model: each concept is a vector between two learned ones, placed by its probability."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdconcepts.concepts.activation import ConceptActivation
from tdconcepts.concepts.encoders import ExogenousEncoder
from tdconcepts.concepts.mixing import ConceptMixing, ConceptScore, vectors
from tdconcepts.concepts.predictors import MixturePredictor
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import ConceptModel, as_size, as_spec, beside, task_head, wrapped
from tdconcepts.keys import NestedKey, as_key, join

__all__ = ["ConceptEmbedding"]


class ConceptEmbedding(ConceptModel):
    r"""Input -> latent -> an embedding for each state of each concept -> probabilities -> mixture -> task.

    :math:`e = \mathrm{LeakyReLU}(W z + b),\ p_k = \sigma(w \cdot [e_k^+; e_k^-] + b),\
    m_k = p_k e_k^+ + (1 - p_k) e_k^-,\ \mathrm{logits} = \mathrm{head}([m_1; \ldots; m_K])`.
    The stages are ``"encoder"``, ``"exogenous"``, ``"score"``,
    ``"activation"``, ``"mixing"`` and ``"head"``. The task sees more than K numbers, and still a concept that is
    corrected changes what it sees. Train it with ``teach(model, how="randint")``.

    =======  ============================================  ================
    reads    ``in_keys`` (default ``"observation"``)       as the encoder
    writes   ``"latent"``                                  ``[*B, H]``
    writes   ``"exogenous"``                               ``[*B, V, E]``
    writes   ``key + "_logits"``                           ``[*B, C]``
    writes   ``key`` (default ``"concepts"``)              ``[*B, C]``
    writes   ``"mixture"``                                 ``[*B, K, E]``
    writes   ``"logits"``                                  as the head
    =======  ============================================  ================

    Args:
        encoder: a bare ``nn.Module`` to the latent, or a TensorDictModule that writes ``"latent"``.
        head: a bare ``nn.Module`` from the K E numbers of the mixture to the task; or the number of task outputs, for
            a linear one.
        concepts: what the columns mean: a :class:`ConceptSpec`, or the names of binary concepts.
        in_features: width of the latent, H.
        embedding_size: width of an embedding, E.
        in_keys: what a bare encoder reads.
        key: the entry of the concepts; the other entries lie beside it.

    Raises:
        BadKey: for an encoder that has keys and does not write the latent.
        BadType: for an encoder or head that is no module.
        BadValue: for a size below 1, and for ``in_keys`` of an encoder that has keys.

    Source: Espinosa Zarlenga et al., Concept Embedding Models: Beyond the Accuracy-Explainability Trade-Off, NeurIPS
    2022, section 3.

    Examples:
        >>> import torch
        >>> model = ConceptEmbedding(nn.Linear(8, 16), 5, ["wing", "beak"], in_features=16, embedding_size=4)
        >>> td = model(observation=torch.zeros(3, 8))
        >>> list(model.module), model.out_keys[-1], td[-1].shape
        (['encoder', 'exogenous', 'score', 'activation', 'mixing', 'head'], 'logits', torch.Size([3, 5]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | int,
        concepts: ConceptSpec | Sequence[str],
        in_features: int,
        embedding_size: int = 16,
        in_keys: NestedKey | list[NestedKey] | None = None,
        key: NestedKey = "concepts",
    ) -> None:
        spec, key = as_spec(concepts), as_key(key)
        latent, exogenous, mixture = (beside(key, name) for name in ("latent", "exogenous", "mixture"))
        logits = beside(key, join(key)[-1] + "_logits")
        as_size(embedding_size=embedding_size, in_features=in_features)
        last = task_head(len(spec) * embedding_size, head)
        stages = {
            "encoder": wrapped(encoder, "encoder", in_keys or "observation", latent, given=in_keys),
            "exogenous": ExogenousEncoder(in_features, embedding_size, vectors(spec), {latent: exogenous}),
            "score": ConceptScore(spec, embedding_size, {exogenous: logits}),
            "activation": ConceptActivation(spec, logits, key),
            "mixing": ConceptMixing(spec, key, exogenous, mixture),
            "head": MixturePredictor(last, keys={mixture: beside(key, "logits")}),
        }
        super().__init__(stages, spec, key)
