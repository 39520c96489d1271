"""The conformance rows of the concepts room."""

from torch import nn
from world import DIFFERENTIABLE, GENERATOR, STREAM, TENSORDICTS, row, seeded

from tdconcepts.concepts import ConceptActivation, ConceptBottleneck, ConceptSpec, MemorySelector

SPEC = ConceptSpec(["wing", "colour"], [1, 2])

ROWS = [
    row(
        "ConceptActivation",
        lambda w: ConceptActivation(SPEC, w("concepts_logits"), w("concepts")),
        detached=DIFFERENTIABLE,
    ),
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
]
