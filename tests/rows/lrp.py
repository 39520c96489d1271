"""The conformance rows of the lrp room."""

from world import argmax, explainer

from tdconcepts import Site, Target
from tdconcepts.lrp import LRP, EpsilonPlus, EpsilonPlusFlat

ROWS = [
    explainer("LRP by EpsilonPlus", lambda w: LRP(w.model, EpsilonPlus(), argmax(w), **w.chunk)),
    explainer(
        "LRP of several targets, to entries and sites",
        lambda w: LRP(
            w.model, EpsilonPlus(), Target(w("logits"), [0, 2]), [w("observation"), Site("0.0"), w("hidden")], **w.chunk
        ),
        "0.0",
        "0",
    ),
    explainer(
        "LRP under several conditions",
        lambda w: LRP(
            w.model, EpsilonPlus(), argmax(w), condition=[{Site("0.0"): [0, 2]}, {Site("0.0"): w("action")}], **w.chunk
        ),
        "0.0",
    ),
    explainer(
        "LRP in the relevance convention, with outputs and deltas",
        lambda w: LRP(
            w.model,
            EpsilonPlusFlat(),
            Target(w("logits"), by=w("action")),
            convention="relevance",
            outputs=True,
            convergence_delta=True,
            **w.chunk,
        ),
    ),
]
