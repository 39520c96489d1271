"""The conformance rows of the concepts room."""

import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from world import DIFFERENTIABLE, GENERATOR, STREAM, TENSORDICTS, row, seeded

from tdconcepts.concepts import (
    CausalBottleneck,
    CompletenessLoss,
    ConceptActivationVectors,
    ConceptBottleneck,
    ConceptEmbedding,
    ConceptEncoder,
    ConceptGraph,
    ConceptLoss,
    ConceptMemoryReasoner,
    ConceptPrior,
    ConceptSpec,
    ConceptWhitening,
    Dag,
    ExogenousEncoder,
    GraphBottleneck,
    HyperLinearPredictor,
    LabelsAsDo,
    LeakageLoss,
    LearnedGraph,
    LinearPredictor,
    LogicRules,
    MemorySelector,
    RuleLikelihood,
    RuleSelector,
    StochasticEncoder,
    TeacherForcing,
    TotalLoss,
)

SPEC = ConceptSpec(["wing", "colour"], [1, 2])
BINARY = ConceptSpec(3)
WRITTEN = "the first stage has written when the second finds its entry missing"

ROWS = [
    row(
        "ConceptBottleneck",
        lambda w: ConceptBottleneck(
            nn.Sequential(w.body, w.bottleneck[0]),
            w.head,
            SPEC,
            in_keys=[w("observation")],
            key=w("concepts"),
            out_keys=[w("logits")],
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
    ),
    row(
        "ConceptEmbedding",
        lambda w: seeded(
            lambda: ConceptEmbedding(
                ConceptEncoder(4, 5, [4], {w("observation"): w("latent")}), 2, SPEC, 5, 3, key=w("concepts")
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "HyperLinearPredictor after encoders",
        lambda w: seeded(
            lambda: TensorDictSequential(
                ConceptEncoder(4, BINARY, keys={w("latent"): w("concepts_logits")}),
                ExogenousEncoder(4, 2, 5, {w("latent"): "exogenous"}),
                HyperLinearPredictor(3, 2, 5, keys={"concepts": w("concepts_logits")}),
                LinearPredictor(5, 2, {"logits": "task"}),
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "MemorySelector",
        lambda w: seeded(MemorySelector, w, 4, 3, 2, 5, 0.5, keys={w("latent"): w("exogenous")}),
        detached=DIFFERENTIABLE,
    ),
    row(
        "MemorySelector that draws",
        lambda w: seeded(MemorySelector, w, 4, 3, 2, 5, selection=w.generator, keys={w("latent"): w("exogenous")}),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        batch_dims=STREAM,
        compiled=GENERATOR,
    ),
    row(
        "StochasticEncoder",
        lambda w: seeded(
            StochasticEncoder, w, 4, SPEC, "full", "always", w.generator, {w("latent"): w("concepts_logits")}
        ),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        compiled=GENERATOR,
    ),
    row(
        "TeacherForcing",
        lambda w: TeacherForcing(BINARY, w("labels"), 0.5, generator=w.generator, key=w("concepts")),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        compiled=GENERATOR,
    ),
    row(
        "ConceptLoss and others",
        lambda w: TensorDictSequential(
            ConceptLoss(BINARY, {w("concepts_logits"): w("labels")}),
            CompletenessLoss(ConceptSpec(["digit"], [3]), {w("concepts_logits"): w("concepts")}),
            TotalLoss({"concepts": 1.0, "completeness": 0.5}),
        ),
        detached=DIFFERENTIABLE,
        bad_input=WRITTEN,
        select_out_keys="tensordict's own pipeline copies the whole group in which a selected entry lies",
    ),
    row(
        "LeakageLoss",
        lambda w: LeakageLoss(BINARY, BINARY, [w("concepts"), w("labels"), w("labels")]),
        detached=DIFFERENTIABLE,
        rows="a correlation over the batch",
        precision="a squared correlation of five rows",
    ),
]

DAG = Dag(["wing", "colour", "beak"], [("wing", "colour"), ("beak", "colour")])
GRAPH_SPEC = ConceptSpec(["wing", "colour", "beak"], [1, 2, 1])

ROWS += [
    row(
        "ConceptMemoryReasoner",
        lambda w: seeded(
            lambda: ConceptMemoryReasoner(
                ConceptEncoder(4, 5, keys={w("observation"): w("latent")}), 2, SPEC, 5, 3, key=w("concepts")
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "RuleLikelihood after a selector",
        lambda w: seeded(
            lambda: TensorDictSequential(
                RuleSelector(4, 3, 3, keys={w("latent"): w("selection")}),
                RuleLikelihood(LogicRules(BINARY, 3, 3), [w("selection"), w("labels"), w("labels")]),
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
        bad_input=WRITTEN,
        precision="logarithms of small numbers",
    ),
    row(
        "GraphBottleneck",
        lambda w: seeded(
            lambda: GraphBottleneck(
                ConceptEncoder(4, 5, keys={w("observation"): w("latent")}),
                DAG,
                GRAPH_SPEC,
                in_features=5,
                key=w("concepts"),
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "CausalBottleneck",
        lambda w: seeded(
            lambda: CausalBottleneck(
                ConceptEncoder(4, 5, keys={w("observation"): w("latent")}),
                DAG,
                GRAPH_SPEC,
                in_features=5,
                embedding_size=3,
                key=w("concepts"),
            ),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "ConceptGraph with a SetStage",
        lambda w: seeded(
            lambda: ConceptGraph(
                {
                    "b": LinearPredictor(3, 2, {"a": "b"}),
                    "a": ConceptEncoder(4, 3, keys={w("latent"): "a"}),
                    "c": LinearPredictor(2, 1, {"b": "c"}),
                }
            ).do({"b": torch.tensor([0.5, -0.5])}),
            w,
        ),
        detached=DIFFERENTIABLE,
    ),
    row(
        "LabelsAsDo",
        lambda w: LabelsAsDo(BINARY, w("labels"), 1.0, w.generator, (w("latent"), w("do"))),
        compiled=GENERATOR,
    ),
    row(
        "LearnedGraph",
        lambda w: seeded(LearnedGraph, w, GRAPH_SPEC.names, keys={w("concepts"): w("explained")}),
        detached=DIFFERENTIABLE,
    ),
    row(
        "ConceptPrior",
        lambda w: seeded(ConceptPrior, w, SPEC, out_key=w("prior")),
        detached=DIFFERENTIABLE,
        called_with_tensors="it reads no tensor",
        called_with_a_batch="it reads no tensor",
        bad_input="it reads nothing but the batch",
    ),
]


def fitted(w):
    cavs = ConceptActivationVectors(4, BINARY, keys={w("latent"): w("concepts_logits")})
    cavs.fit(w.entries[w("latent")].double(), torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]]))
    return cavs.to(w.device, w.dtype)


ROWS += [
    row("ConceptActivationVectors", fitted, detached=DIFFERENTIABLE),
    row(
        "ConceptWhitening",
        lambda w: ConceptWhitening(4, BINARY, keys={w("latent"): w("whitened")}).to(w.device, w.dtype).eval(),
        detached=DIFFERENTIABLE,
    ),
]
