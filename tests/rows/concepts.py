"""The conformance rows of the concepts room."""

from tensordict.nn import TensorDictSequential
from torch import nn
from world import DIFFERENTIABLE, GENERATOR, STREAM, TENSORDICTS, row, seeded

from tdconcepts.concepts import (
    CompletenessLoss,
    ConceptBottleneck,
    ConceptEmbedding,
    ConceptEncoder,
    ConceptLoss,
    ConceptSpec,
    ExogenousEncoder,
    HyperLinearPredictor,
    LeakageLoss,
    LinearPredictor,
    MemorySelector,
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
