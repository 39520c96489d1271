"""The conformance rows of the interventions room."""

import torch
from torch import nn
from world import DIFFERENTIABLE, GENERATOR, RANDOM32, STREAM, TENSORDICTS, Row, argmax, row, seeded

from tdconcepts import Site
from tdconcepts.interventions import (
    Do,
    ExpectedInfluencePolicy,
    FromDistribution,
    GradientPolicy,
    GroundTruth,
    Intervention,
    InterventionPipeline,
    LearnedPolicy,
    OrderPolicy,
    PositiveWeights,
    RandomPolicy,
    Resample,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)

NO_BATCH = "a TensorDictSequential gives tensors no batch size, and so all rows are one"


def learned(w):
    return LearnedPolicy(seeded(nn.Linear, w, 3, 3), temperature=1.0)


ROWS = [
    row(
        "InterventionPipeline",
        lambda w: InterventionPipeline(UniformPolicy(), GroundTruth(w("labels")), w("concepts"), fraction=0.5),
        detached=DIFFERENTIABLE,
    ),
    row(
        "InterventionPipeline that learns whom to ask",
        lambda w: InterventionPipeline(learned(w), GroundTruth(w("labels")), w("concepts"), k=2),
        detached=DIFFERENTIABLE,
    ),
    row(
        "intervene where uncertain",
        lambda w: intervene(
            w.model, w("concepts"), policy=UncertaintyPolicy(), strategy=GroundTruth(w("labels"), "probs"), k=2
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene where influential",
        lambda w: intervene(w.model, w("concepts"), policy=GradientPolicy(argmax(w)), strategy=Do(0.0), k=1),
        detached=DIFFERENTIABLE,
        called_with_a_batch=NO_BATCH,
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene one at a time",
        lambda w: intervene(
            w.model,
            w("concepts"),
            policy=ExpectedInfluencePolicy(argmax(w)),
            strategy=GroundTruth(w("labels")),
            k=2,
            sequential=True,
        ),
        detached=DIFFERENTIABLE,
        called_with_a_batch=NO_BATCH,
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene with positive weights",
        lambda w: intervene(
            w.model, w("concepts"), policy=OrderPolicy([2, 0]), strategy=PositiveWeights(), budget=2, cost=[2, 1, 1]
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene at random",
        lambda w: intervene(
            w.model, w("hidden"), policy=RandomPolicy(w.generator), strategy=Do([0.0, 1.0, 0.0, 1.0, 0.5]), k=2
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
        rows=STREAM,
        compiled=GENERATOR,
        dtypes=RANDOM32,
    ),
    row(
        "InterventionPipeline with a draw",
        lambda w: InterventionPipeline(
            UniformPolicy(),
            FromDistribution(torch.distributions.Bernoulli(0.5), generator=w.generator),
            w("concepts"),
            k=2,
        ),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        compiled=GENERATOR,
    ),
    row(
        "InterventionPipeline with rows of a pool",
        lambda w: InterventionPipeline(
            UniformPolicy(), Resample(torch.linspace(0, 1, 12).reshape(4, 3), generator=w.generator), w("concepts"), k=2
        ),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        compiled=GENERATOR,
    ),
    Row(
        "Intervention at a site",
        lambda w: Intervention(GroundTruth(w("labels")), UncertaintyPolicy(), Site("1.0"), k=2).on(w.model),
        anchors=("1.0",),
        exempt={"detached": DIFFERENTIABLE},
    ),
]
