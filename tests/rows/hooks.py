"""The conformance rows of the hooks room."""

import contextlib
from collections.abc import Iterator

import torch
from tensordict.nn import TensorDictModuleBase
from world import DIFFERENTIABLE, World, row

import tdconcepts as tdc
from tdconcepts import Site, Target
from tdconcepts.interventions import RemoveDirection
from tdconcepts.lrp import EpsilonPlus


@contextlib.contextmanager
def anchored(w: World) -> Iterator[TensorDictModuleBase]:
    """A capture and a patch on a model that holds anchors, made for compiling."""
    program = tdc.Patch({Site("0.0"): tdc.Scale(0.5)}) + tdc.Capture("2.0")
    with tdc.anchor(w.model, "0.0", "2.0", entries=[w("hidden")]), program.on(w.model) as m:
        yield m


ROWS = [
    row(
        "composite of rules",
        lambda w: EpsilonPlus().on(w.model),
        detached="it changes the backward pass, and keeps the graph for it",
    ),
    row("capture", lambda w: tdc.capture(w.model, "0.*", Site("2.0", "input"))),
    row(
        "capture with gradients",
        lambda w: tdc.capture(w.model, "0.0", "1", gradients=Target(w("logits"), [0, 1])),
        detached="the model's own outputs keep their graph",
    ),
    row("capture that stops", lambda w: tdc.capture(w.model, "0.2", stop=True)),
    row(
        "patch",
        lambda w: tdc.patch(
            w.model,
            {Site("0.0"): tdc.Replace(w("donor")), w("hidden"): tdc.Ablate([0, 2]), Site("2.0", "input"): tdc.Add(0.3)},
        ),
    ),
    row("patch of an input", lambda w: tdc.patch(w.model, {w("observation"): tdc.Scale(0.5)})),
    row(
        "patch with a direction removed",
        lambda w: tdc.patch(w.model, {w("hidden"): RemoveDirection(torch.arange(1.0, 6.0))}),
    ),
    row(
        "patch with the batch's mean",
        lambda w: tdc.patch(w.model, {Site("0.0"): tdc.Ablate([1], to="mean")}),
        rows="the mean is over the batch, by definition",
        batch_dims="the mean is over the batch, by definition",
    ),
    row("Capture and Patch", lambda w: (tdc.Patch({Site("0.0"): tdc.Scale(2.0)}) + tdc.Capture("0.0")).on(w.model)),
    row("Compiled", lambda w: tdc.Compiled(w.model, backend="eager"), detached=DIFFERENTIABLE),
    row("anchor", anchored, copies="made by a generator function, which has no copies"),
]
