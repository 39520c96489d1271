"""The intervention pipeline against hand-written PyTorch for the same values (the aim: at most 1.5 at F=112, B=256).

The hand-written forms replace the least certain half of each row by the truth, in three ways of PyTorch; one with numpy
is shown beside them. All give the pipeline's values on these data; only kthvalue and sort break ties by index on any
data. Ten batches take turns: on one batch again and again, the branch predictor learns the selection by heart, and
every form looks up to four times faster than it is.
"""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdconcepts.interventions import Do, GroundTruth, InterventionPipeline, UncertaintyPolicy

ROWS, BATCHES = 256, 10


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


def batches_of(columns):
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        concepts = torch.rand(ROWS, columns, generator=generator)
        labels = torch.randint(0, 2, (ROWS, columns), generator=generator).float()
        yield TensorDict({"concepts": concepts, "labels": labels}, [ROWS])


@pytest.mark.parametrize("strategy", [Do(1.0), GroundTruth("labels")], ids=["do", "ground truth"])
@pytest.mark.parametrize("columns", [4, 16, 112, 1000])
@pytest.mark.benchmark(group="interventions: pipeline / hand-written")
def test_uncertainty_half(compare, columns, strategy):
    k, one = round(0.5 * columns), torch.ones(())

    def hand(form):
        return lambda td: form(td.get("concepts"), one if isinstance(strategy, Do) else td.get("labels"), k)

    compare(
        f"InterventionPipeline, {type(strategy).__name__}, F={columns}",
        InterventionPipeline(UncertaintyPolicy(), strategy, fraction=0.5),
        {form.__name__: hand(form) for form in (by_topk, by_kthvalue, by_sort)},
        list(batches_of(columns)),
        ["concepts"],
        at_most=1.5 if columns >= 112 else None,
        peers={"numpy's partition by hand": hand(by_partition)},
        tolerance=0,
    )
