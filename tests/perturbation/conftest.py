"""A small network in double precision with two inputs, and the slow way to take features away."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture
def net():
    """``x [4] -> hidden [5] -> logits [3]``, with an in-place ReLU."""
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5)).double()
    head = nn.Sequential(nn.Tanh(), nn.Linear(5, 3)).double()
    return TensorDictSequential(
        TensorDictModule(body, ["x"], ["hidden"]), TensorDictModule(head, ["hidden"], ["logits"])
    )


@pytest.fixture
def pair():
    """``x [4], z [2] -> y``: two inputs that interact."""
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    model = TensorDictModule(lambda x, z: body(torch.cat([x, z], -1)), ["x", "z"], ["y"])
    model.body = body
    return model


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
def played():
    """``played(net, td, kept)``: logit 1 for each subset ``kept [E, 4]`` of ``x``, the rest is 0; a forward each."""

    def values(net, td, kept):
        points = [torch.where(s, td["x"], 0.0) for s in torch.as_tensor(kept)]
        return torch.stack([net(td.copy().set("x", x))["logits"][..., 1] for x in points]).detach()

    return values


@pytest.fixture
def image_net():
    """``image [2, 6, 6] -> logits [3]``."""
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 3)).double()
    return TensorDictModule(layers, ["image"], ["logits"])


@pytest.fixture
def images():
    return TensorDict(image=torch.randn(3, 2, 6, 6, dtype=torch.float64), batch_size=[3])
