"""The conformance rows of the rl room; none where torchrl is not installed."""

import importlib.util

import torch
from tensordict import TensorDict
from world import DATA_DEPENDENT, DIFFERENTIABLE, TENSORDICTS, argmax, explainer, row

import tdconcepts as tdc
from tdconcepts import Target

ROWS = []

if importlib.util.find_spec("torchrl") is not None:
    from tdconcepts.rl import (
        Greydanus,
        Marked,
        RewardDifference,
        RolloutExplainer,
        Sarfa,
        SquaredError,
        StateImportance,
        Sverl,
        TemporalProbe,
        TracIn,
    )

    def temporal(w):
        """A probe that was fitted to rollouts of its own."""
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(4, 10, 4, generator=generator, dtype=torch.float64).to(w.device, w.dtype)
        rollouts = TensorDict({}, batch_size=[4, 10]).set(w("latent"), z).set("y", z[..., 1] + z[..., 2])
        return TemporalProbe(w("latent"), "y", [0, 1], name="sum").fit(rollouts)

    ROWS = [
        row("TemporalProbe", temporal),
        row(
            "Marked",
            lambda w: Marked(w.model),
            detached=DIFFERENTIABLE,
            nested="the mark is of the keys, too",
            bad_input=TENSORDICTS,
        ),
        row(
            "RolloutExplainer",
            lambda w: RolloutExplainer(
                tdc.Gradient(w.model, Target(w("logits"), by=w("action")), w("observation")), chunk_size=2
            ),
            compiled="a rollout is explained chunk by chunk, outside graphs; compile the explainer",
        ),
        explainer("Greydanus", lambda w: Greydanus(w.model, w("logits"), **w.chunk), compiled=DATA_DEPENDENT),
        explainer(
            "Sarfa",
            lambda w: Sarfa(w.model, w("logits"), w("action"), **w.chunk),
            compiled=DATA_DEPENDENT,
        ),
        explainer(
            "Sverl",
            lambda w: Sverl(
                w.model,
                argmax(w),
                TensorDict({w("observation"): torch.linspace(-1, 1, 8, dtype=w.dtype).view(2, 4)}, [2]),
                **w.chunk,
            ),
            compiled=DATA_DEPENDENT,
        ),
        row("StateImportance", lambda w: StateImportance(w("concepts_logits"))),
        row("RewardDifference", lambda w: RewardDifference(w("observation", group="noise"), w("action"))),
        explainer(
            "TracIn",
            lambda w: TracIn(
                w.model,
                SquaredError(w("logits"), w("concepts_logits")),
                Target(w("logits"), 1),
                w.td().select(w("observation"))[:2],
                **w.chunk,
            ),
            frozen="parameters that are frozen don't count, by definition",
            compiled="gradients of parameters by torch.func, which compile does not trace through a module",
        ),
    ]
