"""Encoders: from a latent to the logits of concepts, to draws of them, or to an embedding for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_size, as_spec, beside, check_block
from tdconcepts.errors import BadValue
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import NestedKey, join

__all__ = ["ConceptEncoder", "ExogenousEncoder", "StochasticEncoder", "mlp", "one_pair"]

FLOOR = 1e-3
"""The least standard deviation of a drawn logit."""


class ConceptEncoder(BlockStage):
    """One logit for each column from a latent: linear, or an MLP.

    ``logits = W_n ReLU(... ReLU(W_1 z + b_1)) + b_n``.

    =======  =======================  ====================
    reads    ``"latent"``             ``[*B, in_features]``
    writes   ``"concepts_logits"``    ``[*B, C]``
    =======  =======================  ====================

    Args:
        in_features: width of the latent.
        concepts: what the columns mean: a spec, or the names of binary concepts.
        hidden: widths of the hidden layers; none (default) is a linear encoder.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, or a latent of another width.

    Source: Koh et al., Concept Bottleneck Models, ICML 2020.

    Examples:
        >>> encoder = ConceptEncoder(8, ["wing", "beak"], hidden=[16])
        >>> encoder(latent=torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        concepts: ConceptSpec | Sequence[str],
        hidden: Sequence[int] = (),
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        in_key, out_key = one_pair(keys or {"latent": "concepts_logits"})
        super().__init__([in_key], [out_key])
        self.concepts = as_spec(concepts)
        self.in_features = in_features
        self.layers = mlp(in_features, hidden, self.concepts.size)

    def compute(self, *entries: Tensor) -> Tensor:
        return self.layers(check_block(entries[0], (self.in_features,), self._read[0]))


class ExogenousEncoder(BlockStage):
    """An embedding for each of T concepts, all from one dense layer: ``LeakyReLU(W_t z + b_t)``.

    It can stand where :class:`~tdconcepts.concepts.MemorySelector` stands, which picks them from learned slots.

    =======  ================  ====================================
    reads    ``"latent"``      ``[*B, in_features]``
    writes   ``"exogenous"``   ``[*B, out_features, exogenous_size]``
    =======  ================  ====================================

    Args:
        in_features: width of the latent.
        exogenous_size: width of an embedding, E.
        out_features: number of embeddings, T; :func:`~tdconcepts.concepts.vectors` says how many a spec needs.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, or a latent of another width.

    Source: Espinosa Zarlenga et al., Concept Embedding Models, NeurIPS 2022, section 3.1.

    Examples:
        >>> ExogenousEncoder(8, 4, 5)(latent=torch.zeros(3, 8)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        in_features: int,
        exogenous_size: int,
        out_features: int,
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        as_size(in_features=in_features, exogenous_size=exogenous_size, out_features=out_features)
        in_key, out_key = one_pair(keys or {"latent": "exogenous"})
        super().__init__([in_key], [out_key])
        self.in_features, self.exogenous_size, self.out_features = in_features, exogenous_size, out_features
        self.linear = nn.Linear(in_features, out_features * exogenous_size)

    def compute(self, *entries: Tensor) -> Tensor:
        latent = check_block(entries[0], (self.in_features,), self._read[0])
        return F.leaky_relu(self.linear(latent)).unflatten(-1, (self.out_features, self.exogenous_size))


class StochasticEncoder(BlockStage):
    r"""Gaussian logits: a mean and a covariance from the latent, and in training a reparameterised draw.

    :math:`\eta = \mu(z) + L(z)\,\epsilon,\ \epsilon \sim N(0, I)`; ``L`` is diagonal with
    :math:`\mathrm{softplus}(\cdot) + 10^{-3}` on it, or (``"full"``) lower triangular too, so that concepts depend on
    each other. At evaluation :math:`\eta = \mu(z)`.

    =======  ===============================  =======================================
    reads    ``"latent"``                     ``[*B, in_features]``
    writes   ``"concepts_mean"``              ``[*B, C]``
    writes   ``"concepts_scale"``             ``[*B, C]``; ``"full"``: ``[*B, C, C]``
    writes   ``"concepts_logits"``            ``[*B, C]``
    =======  ===============================  =======================================

    Args:
        in_features: width of the latent.
        concepts: what the columns mean: a spec, or the names of binary concepts.
        covariance: ``"diagonal"`` (default) or ``"full"``.
        draw: ``"training"`` (default), ``"always"`` or ``"never"``; the attribute may be changed later.
        generator: what the draws come from. Default: torch's own.
        keys: the entry to read, and the one with the logits; mean and scale are named after its block.

    Raises:
        BadValue: for a size below 1, an unknown word, or a latent of another width.
        BadType: for a generator that is none.

    Source: Vandenhirtz et al., Stochastic Concept Bottleneck Models, NeurIPS 2024, eq. 3 to 5.

    Examples:
        >>> encoder = StochasticEncoder(8, ["wing", "beak"], generator=torch.Generator().manual_seed(0))
        >>> mean, scale, logits = encoder(latent=torch.zeros(3, 8))
        >>> torch.equal(mean, logits), torch.equal(*encoder.eval()(latent=torch.zeros(3, 8))[::2])
        (False, True)
    """

    def __init__(
        self,
        in_features: int,
        concepts: ConceptSpec | Sequence[str],
        covariance: Literal["diagonal", "full"] = "diagonal",
        draw: Literal["training", "always", "never"] = "training",
        generator: torch.Generator | None = None,
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        if covariance not in ("diagonal", "full"):
            raise BadValue("not a covariance", got=repr(covariance), needed='"diagonal" or "full"')
        if draw not in ("training", "always", "never"):
            raise BadValue("not a time to draw", got=repr(draw), needed='"training", "always" or "never"')
        as_size(in_features=in_features)
        in_key, out_key = one_pair(keys or {"latent": "concepts_logits"})
        name = join(out_key)[-1].removesuffix("_logits")
        super().__init__([in_key], [beside(out_key, name + "_mean"), beside(out_key, name + "_scale"), out_key])
        self.concepts = as_spec(concepts)
        self.in_features, self.covariance, self.draw = in_features, covariance, draw
        self.source = Source(generator)
        size = self.concepts.size
        self.mean = nn.Linear(in_features, size)
        self.scale = nn.Linear(in_features, size if covariance == "diagonal" else size * size)

    def compute(self, *entries: Tensor) -> tuple[Tensor, ...]:
        latent = check_block(entries[0], (self.in_features,), self._read[0])
        mean, scale = self.mean(latent), self.scale(latent)
        if self.covariance == "full":
            square = scale.unflatten(-1, (self.concepts.size, self.concepts.size))
            diagonal = F.softplus(square.diagonal(dim1=-2, dim2=-1)) + FLOOR
            scale = square.tril(-1) + torch.diag_embed(diagonal)
        else:
            scale = F.softplus(scale) + FLOOR
        if self.draw == "never" or (self.draw == "training" and not self.training):
            return mean, scale, mean.clone()
        noise = self.source.normal(*mean.shape).to(mean)
        moved = (scale @ noise.unsqueeze(-1)).squeeze(-1) if self.covariance == "full" else scale * noise
        return mean, scale, mean + moved


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Module:
    """A linear layer, or several with ReLUs between them.

    Examples:
        >>> mlp(4, [], 2), len(mlp(4, [8, 8], 2))
        (Linear(in_features=4, out_features=2, bias=True), 5)
    """
    widths = [in_features, *hidden, out_features]
    as_size(**{f"width {i}": width for i, width in enumerate(widths)})
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in itertools.pairwise(widths[1:]):
        layers += [nn.ReLU(), nn.Linear(before, after)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def one_pair(keys: Mapping[NestedKey, NestedKey]) -> tuple[NestedKey, NestedKey]:
    """The one entry to read and the one to write.

    Examples:
        >>> one_pair({"latent": "concepts_logits"})
        ('latent', 'concepts_logits')
    """
    if not isinstance(keys, Mapping) or len(keys) != 1:
        raise BadValue("a stage of one entry to read and one to write", got=repr(keys), needed="{read: write}")
    return next(iter(keys.items()))
