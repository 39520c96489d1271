"""The conformance rows of the interventions room."""

from world import DIFFERENTIABLE, GENERATOR, RANDOM32, STREAM, TENSORDICTS, argmax, row

from tdconcepts.interventions import (
    Do,
    GradientPolicy,
    GroundTruth,
    InterventionPipeline,
    RandomPolicy,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)

ROWS = [
    row(
        "InterventionPipeline",
        lambda w: InterventionPipeline(UniformPolicy(), GroundTruth(w("labels")), w("concepts"), fraction=0.5),
        detached=DIFFERENTIABLE,
        bad_input="a sequential writes as it goes",
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
        called_with_a_batch="a TensorDictSequential gives tensors no batch size, and so all rows are one",
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
]
