"""The conformance rows of the experiments room."""

import torch
from world import argmax, explainer, row

import tdconcepts as tdc
from tdconcepts import Site, Target
from tdconcepts.experiments import (
    Sweep,
    ablation_effects,
    activation_patching,
    attribution_patching,
    each,
    every,
    interchange,
    path_patching,
    product,
)

PLANNED = "a plan is chosen by trying it, which torch.compile can't trace"

ROWS = [
    explainer(
        "Sweep over units",
        lambda w: Sweep(w.model, every([Site("0.0"), w("hidden")], tdc.Ablate()), outputs=w("logits"), **w.chunk),
        compiled=PLANNED,
    ),
    explainer(
        "Sweep over pairs, with a donor",
        lambda w: Sweep(
            w.model,
            product(every(Site("0.0"), tdc.Replace(w("donor")), [0, -1]), every(w("concepts"), tdc.Scale(2.0)))
            + each(w("observation"), [tdc.Scale(0.5), tdc.Add(1.0)]),
            **w.chunk,
        ),
        compiled=PLANNED,
    ),
    explainer(
        "activation_patching",
        lambda w: activation_patching(
            w.model, [Site("0.0"), w("hidden")], Target(w("logits"), 1), split=every, direction="noise", **w.chunk
        ),
        compiled=PLANNED,
    ),
    explainer(
        "interchange",
        lambda w: interchange(
            w.model, Site("0.0"), Target(w("logits"), 1), label=w("action"), subspace=torch.eye(6)[:2], **w.chunk
        ),
        compiled=PLANNED,
    ),
    explainer(
        "path_patching",
        lambda w: path_patching(
            w.model, Site("0.0"), w("hidden"), Target(w("logits"), 1), split=every, frozen=[], **w.chunk
        ),
        compiled=PLANNED,
    ),
    row(
        "attribution_patching",
        lambda w: attribution_patching(w.model, [Site("0.0"), w("hidden")], argmax(w), n_steps=2),
        compiled=PLANNED,
    ),
    explainer(
        "ablation_effects",
        lambda w: ablation_effects(w.model, Site("1.*"), Target(w("logits"), by=w("action")), **w.chunk),
        compiled=PLANNED,
    ),
]
