"""Predictors: from concepts, or from their mixed embeddings, to the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tdconcepts.concepts.encoders import mlp, one_pair
from tdconcepts.concepts.stage import BlockStage, as_size, check_block
from tdconcepts.errors import BadValue
from tdconcepts.keys import NestedKey

__all__ = ["HyperLinearPredictor", "LinearPredictor", "MixturePredictor"]


class LinearPredictor(BlockStage):
    """The task as a weighted sum of concepts: ``logits = W c + b``.

    =======  ==============  =================
    reads    ``"concepts"``  ``[*B, C]``
    writes   ``"logits"``    ``[*B, out]``
    =======  ==============  =================

    Args:
        in_features: the number of columns, C.
        out_features: the number of task outputs.
        keys: the entry to read and the entry to write.
        bias: whether there is a ``b``.

    Raises:
        BadValue: for a size below 1, or a block of another width.

    Examples:
        >>> LinearPredictor(3, 2)(concepts=torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keys: Mapping[NestedKey, NestedKey] | None = None,
        bias: bool = True,
    ) -> None:
        as_size(in_features=in_features, out_features=out_features)
        in_key, out_key = one_pair(keys or {"concepts": "logits"})
        super().__init__([in_key], [out_key])
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def compute(self, *entries: Tensor) -> Tensor:
        return self.linear(check_block(entries[0], (self.linear.in_features,), self._read[0]))


class MixturePredictor(BlockStage):
    r"""The task from the mixed embeddings of K concepts: a head on all of them side by side, or on their sum.

    ``"concat"``: :math:`\mathrm{head}([m_1; \ldots; m_K])`; ``"sum"``: :math:`\mathrm{head}(\sum_k m_k)`, whose size
    does not grow with K.

    =======  ==============  ================
    reads    ``"mixture"``   ``[*B, K, E]``
    writes   ``"logits"``    as the head
    =======  ==============  ================

    Args:
        head: a bare module from ``[*B, K * E]`` (``"sum"``: ``[*B, E]``) to the task.
        reduce: ``"concat"`` (default) or ``"sum"``.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for another ``reduce``, or embeddings without two dims.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, section 3.1 (concatenation).

    Examples:
        >>> MixturePredictor(nn.Linear(6, 2))(mixture=torch.zeros(4, 3, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        head: nn.Module,
        reduce: Literal["concat", "sum"] = "concat",
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        if reduce not in ("concat", "sum"):
            raise BadValue("not a way to join embeddings", got=repr(reduce), needed='"concat" or "sum"')
        in_key, out_key = one_pair(keys or {"mixture": "logits"})
        super().__init__([in_key], [out_key])
        self.head, self.reduce = head, reduce

    def compute(self, *entries: Tensor) -> Tensor:
        mixture = entries[0]
        if mixture.ndim < 2:
            raise BadValue("embeddings have two dims", got=list(mixture.shape), needed="[*B, K, E]")
        return self.head(mixture.flatten(-2) if self.reduce == "concat" else mixture.sum(-2))


class HyperLinearPredictor(BlockStage):
    r"""A linear predictor whose weights are predicted: each row and each task has its own, and they can be read.

    :math:`W_t = \mathrm{MLP}(e_t),\ y_t = \sum_c W_{tc} c_c + b_t`, one MLP for all tasks.

    =======  ================  ========================
    reads    ``"concepts"``    ``[*B, C]``
    reads    ``"exogenous"``   ``[*B, T, E]``
    writes   ``"weights"``     ``[*B, T, C]``
    writes   ``"logits"``      ``[*B, T]``
    =======  ================  ========================

    Args:
        in_features: the number of columns, C.
        exogenous_size: width of an embedding, E.
        out_features: the number of tasks, T.
        hidden_size: width of the MLP's hidden layer.
        bias: whether there is a ``b``.
        keys: the entries, by the names above.

    Raises:
        BadValue: for a size below 1, a name that is none, or entries of another shape.

    Source: Debot et al. 2024; De Felice et al., Causally Reliable Concept Bottleneck Models, NeurIPS 2025, section 4.

    Examples:
        >>> predictor = HyperLinearPredictor(3, 4, 2)
        >>> weights, logits = predictor(concepts=torch.ones(5, 3), exogenous=torch.zeros(5, 2, 4))
        >>> weights.shape, torch.allclose(weights.sum(-1) + predictor.bias, logits)
        (torch.Size([5, 2, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        exogenous_size: int,
        out_features: int,
        hidden_size: int = 32,
        bias: bool = True,
        keys: Mapping[str, NestedKey] | None = None,
    ) -> None:
        as_size(in_features=in_features, exogenous_size=exogenous_size, out_features=out_features)
        names: dict[str, NestedKey] = {n: n for n in ("concepts", "exogenous", "weights", "logits")}
        if set(keys or {}) - set(names):
            raise BadValue("not the entries of this stage", got=repr(keys), needed=f"keys for {list(names)}")
        names |= keys or {}
        super().__init__([names["concepts"], names["exogenous"]], [names["weights"], names["logits"]])
        self._shapes = (in_features,), (out_features, exogenous_size)
        self.hyper = mlp(exogenous_size, [hidden_size], in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def compute(self, *entries: Tensor) -> tuple[Tensor, ...]:
        block, exogenous = (check_block(e, s, k) for e, s, k in zip(entries, self._shapes, self._read, strict=True))
        if block.shape[:-1] != exogenous.shape[:-2]:
            got = f"{list(block.shape)} and {list(exogenous.shape)}"
            raise BadValue("concepts and embeddings of different batches", got=got, needed="[*B, C] and [*B, T, E]")
        weights = self.hyper(exogenous)
        logits = (weights @ block.unsqueeze(-1)).squeeze(-1)
        return weights, logits if self.bias is None else logits + self.bias
