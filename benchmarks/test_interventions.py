"""The intervention pipeline against hand-written PyTorch for the same values (the aim: at most 1.5 at F >= 112).

The hand-written forms replace the least certain half of each row by the truth, in three ways of PyTorch; one with numpy
is shown beside them. All give the pipeline's values on these data; only kthvalue and sort break ties by index on any
data. At small F what counts is the difference in microseconds, not the ratio: the aim is to be within 45 of the bare
operations, half of the least that others saw torch_concepts take more than they do (90 to 120; here it took 180 to
350), and within half of what it takes more in this run. Its rows are there where it is installed (``pip install
pytorch-concepts==1.0.0a7``); it selects ``1 + floor(q (F - 1))``, so that q is chosen for half here.

Compiled rows compare graph with graph: to call what ``torch.compile`` makes takes some 25 us before anything is done.

Where all concepts are replaced the reference is ``torch.where`` alone, with a mask that is there. The pipeline writes
the score, the mask, the value and what was there besides; rows "concepts only" are of a pipeline with
``select_out_keys("concepts")``, which writes what ``torch.where`` gives and no more.

Ten batches take turns: on one batch again and again, the branch predictor learns the selection by heart, and every form
looks up to four times faster than it is.
"""

import dataclasses
import importlib
import warnings

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdconcepts import Compiled
from tdconcepts.interventions import Do, GroundTruth, InterventionPipeline, UncertaintyPolicy, UniformPolicy

ROWS, BATCHES = 256, 10
BARE = 45e-6  # seconds above the bare operations
PEER = "torch_concepts' InterventionModule"


def by_kthvalue(concepts, truth, k):
    score = -(concepts - 0.5).abs()
    last = score.kthvalue(score.shape[-1] - k + 1, -1, keepdim=True).values
    above, tied = score > last, score == last
    mask = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return torch.where(mask, truth, concepts)


def by_topk(concepts, truth, k):
    nearest = (concepts - 0.5).abs().topk(k, -1, largest=False, sorted=False).indices
    mask = torch.zeros(concepts.shape, dtype=torch.bool).scatter_(-1, nearest, True)
    return torch.where(mask, truth, concepts)


def by_sort(concepts, truth, k):
    nearest = (concepts - 0.5).abs().sort(dim=-1, stable=True).indices[..., :k]
    mask = torch.zeros(concepts.shape, dtype=torch.bool).scatter_(-1, nearest, True)
    return torch.where(mask, truth, concepts)


def by_partition(concepts, truth, k):
    distance = (concepts - 0.5).abs()
    mask = distance <= torch.from_numpy(np.partition(distance.numpy(), k - 1, axis=-1)[..., k - 1 : k])
    return torch.where(mask, truth, concepts)


HAND = {form.__name__: form for form in (by_topk, by_kthvalue, by_sort)}


def batches_of(columns):
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        concepts = torch.rand(ROWS, columns, generator=generator)
        labels = torch.randint(0, 2, (ROWS, columns), generator=generator).float()
        yield TensorDict({"concepts": concepts, "labels": labels}, [ROWS])


def torch_concepts():
    """Its layers, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch_concepts.nn")
    except ImportError:
        return None


def pyc(strategy, policy, columns, quantile=1.0):
    """An InterventionModule around nothing, as a form; it gets a new one for each batch's truth."""
    them = torch_concepts()
    if them is None:
        return {}
    modules = {}

    def form(td):
        truth = td.get("labels")
        module = modules.get(id(truth))
        if module is None:
            new = them.DoIntervention(1.0) if strategy == "do" else them.GroundTruthIntervention(truth)
            made = them.UniformPolicy() if policy == "uniform" else them.UncertaintyInterventionPolicy(0.5)
            module = modules[id(truth)] = them.InterventionModule(
                nn.Identity(), new, made, list(range(columns)), quantile=quantile
            )
        return (module(td.get("concepts")),)

    return {PEER: form}


SIZES = [(columns, "eager") for columns in (4, 16, 112, 1000)] + [(4, "compiled"), (112, "compiled")]


def measured(compare, name, pipeline, hand, columns, mode, peers):
    """One row; at small F the aim is the difference in microseconds."""
    data, few = list(batches_of(columns)), columns < 112
    if mode == "compiled":
        torch._dynamo.reset()
        hand = {f"{each}, compiled": torch.compile(form, fullgraph=True) for each, form in hand.items()}
        name, pipeline, peers = f"{name}, compiled", Compiled(pipeline), None
    options = {"at_most": None if few else 1.5, "tolerance": 0}
    compare(f"{name}, F={columns}", pipeline, hand, data, ["concepts"], peers=peers, **options)
    if few:
        at = max(i for i, row in enumerate(compare.rows) if row.name.startswith(name))
        row, *peer = compare.rows[at : at + 2 if peers else at + 1]
        limit, aim = BARE, f"+ {1e6 * BARE:.0f} us"
        if peer and peer[0].name.strip().startswith(PEER):
            theirs = peer[0].ours - peer[0].reference
            limit, aim = min(limit, theirs / 2), f"{aim} and half of + {1e6 * theirs:.0f} us"
        compare.rows[at] = dataclasses.replace(row, aim=aim, met=row.ours - row.reference <= limit)


@pytest.mark.parametrize("strategy", [Do(1.0), GroundTruth("labels")], ids=["do", "ground truth"])
@pytest.mark.parametrize(("columns", "mode"), SIZES)
@pytest.mark.benchmark(group="interventions: pipeline / hand-written")
def test_uncertainty_half(compare, columns, mode, strategy):
    k, one = round(0.5 * columns), torch.ones(())

    def hand(form):
        return lambda td: form(td.get("concepts"), one if isinstance(strategy, Do) else td.get("labels"), k)

    kind = "do" if isinstance(strategy, Do) else "truth"
    peers = pyc(kind, "uncertainty", columns, quantile=(k - 1) / (columns - 1) + 1e-9)
    measured(
        compare,
        f"InterventionPipeline, {type(strategy).__name__}",
        InterventionPipeline(UncertaintyPolicy(), strategy, fraction=0.5),
        {name: hand(form) for name, form in HAND.items()},
        columns,
        mode,
        peers | {"numpy's partition by hand": hand(by_partition)},
    )


@pytest.mark.parametrize("only", [False, True], ids=["every entry", "concepts only"])
@pytest.mark.parametrize("strategy", [Do(1.0), GroundTruth("labels")], ids=["do", "ground truth"])
@pytest.mark.parametrize(("columns", "mode"), SIZES)
@pytest.mark.benchmark(group="interventions: pipeline / the bare torch.where")
def test_all(compare, columns, mode, strategy, only):
    """Every concept is replaced: no selection, so the reference is torch.where alone, with a mask that is there."""
    if mode == "compiled" and isinstance(strategy, Do):
        pytest.skip("one row of it")
    mask, one = torch.ones(ROWS, columns, dtype=torch.bool), torch.ones(())
    pipeline = InterventionPipeline(UniformPolicy(), strategy)
    is_do = isinstance(strategy, Do)
    measured(
        compare,
        f"InterventionPipeline, all, {type(strategy).__name__}{', concepts only' if only else ''}",
        pipeline.select_out_keys("concepts") if only else pipeline,
        {"torch.where": lambda td: torch.where(mask, one if is_do else td.get("labels"), td.get("concepts"))},
        columns,
        mode,
        {} if only else pyc("do" if is_do else "truth", "uniform", columns),
    )
