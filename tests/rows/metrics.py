"""The conformance rows of the metrics room."""

from world import row

from tdconcepts.concepts import ConceptSpec
from tdconcepts.metrics import ConceptAccuracy

ROWS = [
    row("ConceptAccuracy", lambda w: ConceptAccuracy(ConceptSpec(3), w("concepts"), w("labels"))),
]
