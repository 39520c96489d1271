"""Kinds of layers, and the one function that each layer of torch calls."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tdconcepts.hooks.flows import operation_name
from tdconcepts.lrp import kinds


class Names(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(operation_name(func))
        return func(*args, **(kwargs or {}))


LAYERS = [
    (nn.Linear(4, 2), (3, 4)),
    (nn.Conv2d(1, 2, 2), (1, 1, 4, 4)),
    (nn.ConvTranspose1d(1, 2, 2), (1, 1, 4)),
    (nn.BatchNorm1d(4).eval(), (3, 4)),
    (nn.LayerNorm(4), (3, 4)),
    (nn.GroupNorm(2, 4), (3, 4)),
    (nn.RMSNorm(4), (3, 4)),
    (nn.Softmax(-1), (3, 4)),
    (nn.AvgPool2d(2), (1, 1, 4, 4)),
    (nn.AdaptiveAvgPool2d(1), (1, 1, 4, 4)),
    *(
        (getattr(nn, name)(), (3, 4))
        for name in ["ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "ELU", "Softplus", "Mish", "Hardswish"]
    ),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__)
def test_the_one_function(layer, shape):
    with Names() as seen:
        layer(torch.randn(shape))
    assert kinds.operation_of(layer) in seen.names


def test_no_one_function():
    class Mine(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert kinds.operation_of(Mine(1, 1)) == ""
    assert kinds.operation_of(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) == ""


def test_predicates():
    assert kinds.activation(nn.Mish())
    assert not kinds.activation(nn.Softmax(-1))
    assert kinds.average(nn.AdaptiveAvgPool1d(1))
    assert kinds.batch_norm(nn.BatchNorm3d(1))
    assert kinds.rms_norm(nn.RMSNorm(2))
    assert not kinds.rms_norm(nn.LayerNorm(2))
    assert not set(kinds.ELEMENTWISE) & {"add", "view"}
