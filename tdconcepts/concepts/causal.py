"""Bottlenecks along a graph: concepts that depend on concepts, with tasks as leaves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdconcepts.concepts.encoders import ConceptEncoder, ExogenousEncoder
from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.propagation import GraphPropagation, HyperEquations, LinearEquations, graph_layout
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import ConceptModel, as_spec, beside, wrapped
from tdconcepts.keys import NestedKey, as_key, join

__all__ = ["CausalBottleneck", "GraphBottleneck"]


class GraphBottleneck(ConceptModel):
    r"""Input -> latent -> the roots of a graph; every other concept is linear in its parents' probabilities.

    :math:`\ell_j = w_j \cdot z + b_j` for a root, :math:`\ell_j = b_j + \sum_{i \in pa(j)} W_{ji} c_i` for the others,
    tasks among them. The stages are ``"encoder"``, ``"roots"`` and ``"propagation"``. Set concepts with the entry
    ``"do"`` (``[*B, C]``, NaN where nothing is set): what depends on them follows.

    =======  ============================================  =============
    reads    ``in_keys`` (default ``"observation"``)       as the encoder
    reads    ``"do"``, where it is there                   ``[*B, C]``
    writes   ``"latent"``                                  ``[*B, H]``
    writes   ``"roots"``                                   ``[*B, R]``
    writes   ``key + "_logits"``                           ``[*B, C]``
    writes   ``key`` (default ``"concepts"``)              ``[*B, C]``
    =======  ============================================  =============

    Args:
        encoder: a bare ``nn.Module`` to the latent, or a TensorDictModule that writes ``"latent"``.
        dag: which concept depends on which.
        concepts: what the columns mean; the names of the dag, tasks among them. Default: all binary.
        in_features: width of the latent, H.
        in_keys: what a bare encoder reads.
        key: the entry of the concepts; the other entries lie beside it.

    Raises:
        BadType: for an encoder that is no module.
        BadKey: for an encoder that has keys and does not write the latent.
        BadValue: for a size below 1, other names in the dag, and ``in_keys`` of an encoder that has keys.

    Source: Dominici et al., Causal Concept Graph Models, ICLR 2025.

    Examples:
        >>> import torch
        >>> dag = Dag(["wing", "beak", "bird"], [("wing", "bird"), ("beak", "bird")])
        >>> model = GraphBottleneck(nn.Linear(8, 16), dag, in_features=16)
        >>> model(observation=torch.zeros(3, 8))[-1].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dag: Dag,
        concepts: ConceptSpec | Sequence[str] | None = None,
        *,
        in_features: int,
        in_keys: NestedKey | list[NestedKey] | None = None,
        key: NestedKey = "concepts",
    ) -> None:
        spec, key = as_spec(dag.names if concepts is None else concepts), as_key(key)
        latent, roots, do = (beside(key, name) for name in ("latent", "roots", "do"))
        layout = graph_layout(spec, dag)
        equations = LinearEquations(layout)
        keys = [roots, beside(key, join(key)[-1] + "_logits"), key]
        stages = {
            "encoder": wrapped(encoder, "encoder", in_keys or "observation", latent, given=in_keys),
            "roots": ConceptEncoder(in_features, layout.specs[0], keys={latent: roots}),
            "propagation": GraphPropagation(spec, dag, equations, keys, do),
        }
        super().__init__(stages, spec, key)
        self.dag, self.latent_key, self.do_key, self.optional_keys = dag, latent, do, [do]


class CausalBottleneck(ConceptModel):
    r"""Input -> latent -> an embedding for each column -> structural equations, whose weights the embeddings predict.

    See :class:`~tdconcepts.concepts.HyperEquations`. The stages are ``"encoder"``, ``"exogenous"`` and
    ``"propagation"``. Tasks are leaves of the graph. Every row has its own linear equations, which can be read:
    ``model["propagation"].equations.weights(td["exogenous"])`` is ``[*B, C, C]``, at (j, i) the weight of column i in
    the equation of column j. Set concepts with the entry ``"do"``, as in :class:`GraphBottleneck`.

    =======  ============================================  ==============
    reads    ``in_keys`` (default ``"observation"``)       as the encoder
    reads    ``"do"``, where it is there                   ``[*B, C]``
    writes   ``"latent"``                                  ``[*B, H]``
    writes   ``"exogenous"``                               ``[*B, C, E]``
    writes   ``key + "_logits"``                           ``[*B, C]``
    writes   ``key`` (default ``"concepts"``)              ``[*B, C]``
    =======  ============================================  ==============

    Args:
        encoder: a bare ``nn.Module`` to the latent, or a TensorDictModule that writes ``"latent"``.
        dag: which concept depends on which.
        concepts: what the columns mean; the names of the dag, tasks among them. Default: all binary.
        in_features: width of the latent, H.
        embedding_size: width of an embedding, E, and of the hidden layer of the equations.
        in_keys: what a bare encoder reads.
        key: the entry of the concepts; the other entries lie beside it.

    Raises:
        BadType: for an encoder that is no module.
        BadKey: for an encoder that has keys and does not write the latent.
        BadValue: for a size below 1, other names in the dag, and ``in_keys`` of an encoder that has keys.

    Source: De Felice et al., Causally Reliable Concept Bottleneck Models, NeurIPS 2025.

    Examples:
        >>> import torch
        >>> dag = Dag(["wing", "beak", "bird"], [("wing", "bird"), ("beak", "bird")])
        >>> model = CausalBottleneck(nn.Linear(8, 16), dag, in_features=16)
        >>> model(observation=torch.zeros(3, 8))[-1].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dag: Dag,
        concepts: ConceptSpec | Sequence[str] | None = None,
        *,
        in_features: int,
        embedding_size: int = 8,
        in_keys: NestedKey | list[NestedKey] | None = None,
        key: NestedKey = "concepts",
    ) -> None:
        spec, key = as_spec(dag.names if concepts is None else concepts), as_key(key)
        latent, exogenous, do = (beside(key, name) for name in ("latent", "exogenous", "do"))
        layout = graph_layout(spec, dag)
        equations = HyperEquations(layout, embedding_size, embedding_size)
        keys = [exogenous, beside(key, join(key)[-1] + "_logits"), key]
        stages = {
            "encoder": wrapped(encoder, "encoder", in_keys or "observation", latent, given=in_keys),
            "exogenous": ExogenousEncoder(in_features, embedding_size, spec.size, {latent: exogenous}),
            "propagation": GraphPropagation(spec, dag, equations, keys, do),
        }
        super().__init__(stages, spec, key)
        self.dag, self.latent_key, self.do_key, self.optional_keys = dag, latent, do, [do]
