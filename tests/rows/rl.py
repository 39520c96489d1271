"""The conformance rows of the rl room; none where torchrl is not installed."""

import importlib.util

from world import row

import tdconcepts as tdc
from tdconcepts import Target

ROWS = []

if importlib.util.find_spec("torchrl") is not None:
    from tdconcepts.rl import RolloutExplainer

    ROWS = [
        row(
            "RolloutExplainer",
            lambda w: RolloutExplainer(
                tdc.Gradient(w.model, Target(w("logits"), by=w("action")), w("observation")), chunk_size=2
            ),
            compiled="a rollout is explained chunk by chunk, outside graphs; compile the explainer",
        ),
    ]
