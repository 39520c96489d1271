"""A small network in double precision, and the rows that flow through its first layer."""

import contextlib

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture
def net():
    """``x [4] -> logits [3]``, with an in-place ReLU."""
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return TensorDictModule(layers.double(), ["x"], ["logits"])


@pytest.fixture
def pipeline():
    """``x [4], z [2] -> hidden [5] -> logits [3]``: two inputs, and an entry between two stages."""
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    head = nn.Sequential(nn.GELU(), nn.Linear(5, 3)).double()
    return TensorDictSequential(
        TensorDictModule(lambda x, z: body(torch.cat([x, z], -1)), ["x", "z"], ["hidden"]),
        TensorDictModule(head, ["hidden"], ["logits"]),
    )


@pytest.fixture
def batch():
    """``batch(5)``: a TensorDict of 5 rows with all entries that the networks here read."""

    def make(*size):
        return TensorDict(
            x=torch.randn(*size, 4, dtype=torch.float64),
            z=torch.randn(*size, 2, dtype=torch.float64),
            action=torch.randint(0, 3, size),
            batch_size=size,
        )

    return make


@pytest.fixture
def rows_seen():
    """``with rows_seen(layer) as seen``: how many rows each call of a layer was given."""

    @contextlib.contextmanager
    def watch(layer):
        seen = []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // args[0].shape[-1]))
        try:
            yield seen
        finally:
            handle.remove()

    return watch
