"""The conformance rows of the perturbation room."""

import torch
from tensordict import TensorDict
from world import GENERATOR, GROUPS, argmax, explainer

from tdconcepts import Site, Target
from tdconcepts.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyExact,
    ShapleySampling,
)

ROWS = [
    explainer(
        "FeatureAblation",
        lambda w: FeatureAblation(w.model, argmax(w), [w("observation"), Site("0.1")], **w.chunk),
        "0.1",
    ),
    explainer(
        "Occlusion with outputs",
        lambda w: Occlusion(w.model, argmax(w), window=2, outputs=True, **w.chunk),
    ),
    explainer(
        "FeaturePermutation",
        lambda w: FeaturePermutation(w.model, argmax(w), generator=w.generator, **w.chunk),
        **dict.fromkeys(["rows", "called_with_tensors", "batch_dims"], "rows depend on each other, by definition"),
        compiled=GENERATOR,
    ),
    explainer(
        "ShapleySampling",
        lambda w: ShapleySampling(
            w.model, Target(w("logits"), [0, 2]), n_samples=3, generator=w.generator, mask=GROUPS, **w.chunk
        ),
        compiled=GENERATOR,
    ),
    explainer("ShapleyExact", lambda w: ShapleyExact(w.model, argmax(w), **w.chunk)),
    explainer(
        "KernelShap from rows",
        lambda w: KernelShap(
            w.model,
            Target(w("logits"), by=w("action")),
            n_samples=6,
            generator=w.generator,
            baseline=TensorDict({w("observation"): torch.linspace(-1, 1, 8).view(2, 4)}, [2]),
            **w.chunk,
        ),
        compiled=GENERATOR,
    ),
    explainer(
        "Lime", lambda w: Lime(w.model, argmax(w), n_samples=9, generator=w.generator, **w.chunk), compiled=GENERATOR
    ),
]
