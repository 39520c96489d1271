"""The conformance rows of the metrics room."""

from world import GENERATOR, argmax, explainer, row

import tdconcepts as tdc
from tdconcepts.concepts import ConceptSpec
from tdconcepts.metrics import AIM, AUM, PGI, PGU, RIS, ConceptAccuracy

ROWS = [
    row("ConceptAccuracy", lambda w: ConceptAccuracy(ConceptSpec(3), w("concepts"), w("labels"))),
    row("AIM", lambda w: AIM(w.model, w("logits"), k=2, attribution="baseline")),
    row("AUM", lambda w: AUM(w.model, w("logits"), k=0.5, attribution="baseline")),
    explainer(
        "PGI",
        lambda w: PGI(w.model, argmax(w), n_samples=3, generator=w.generator, attribution="baseline", **w.chunk),
        compiled=GENERATOR,
    ),
    explainer(
        "PGU",
        lambda w: PGU(w.model, argmax(w), n_samples=3, generator=w.generator, attribution="baseline", **w.chunk),
        compiled=GENERATOR,
    ),
    explainer(
        "RIS",
        lambda w: RIS(
            tdc.Gradient(w.model, argmax(w)), w("observation"), n_samples=3, generator=w.generator, **w.chunk
        ),
        compiled=GENERATOR,
    ),
]
