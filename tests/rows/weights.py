"""The conformance rows of weights.py."""

from world import row

from tdconcepts.weights import prune

ROWS = [row("prune", lambda w: prune(w.model, 0.4))]
