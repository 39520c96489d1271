"""The reference cases, arrays in ``reference.npz`` (float64), and slow re-derivations of the layers."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

ARRAYS = np.load(Path(__file__).parent / "reference.npz")
NAMES = sorted({name.split("/")[0] for name in ARRAYS.files})


def case(name):
    return {key.split("/")[1]: torch.tensor(ARRAYS[key]) for key in ARRAYS.files if key.startswith(f"{name}/")}


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs, **named):
        return self.function(*inputs, **named)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def convolution(arrays, kind, weight="w", bias="b"):
    w, transposed = arrays[weight], "Transpose" in kind.__name__
    groups = int(arrays.get("groups", torch.tensor(1)))
    numbers = {k: int(arrays[k]) for k in ("stride", "padding", "dilation", "output_padding") if k in arrays}
    channels = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
    layer = kind(*channels, tuple(w.shape[2:]), groups=groups, bias=bias in arrays, dtype=w.dtype, **numbers)
    layer.weight.data = w.clone()
    if bias in arrays:
        layer.bias.data = arrays[bias].clone()
    return layer


def relevance(rule, module, inputs, r_out, convention="relevance"):
    """What a rule on one module gives for ``r_out``, one tensor for each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with rule.on(module, convention=convention) as m:
        out = m(*leaves)
    return torch.autograd.grad(out, leaves, r_out)


def close(found, expected, tolerance=1e-9):
    """Relative to the largest number."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()) + 1e-15


def dense(layer, x):
    """A layer as ``(M, b)`` of rows: column i of M is what input i alone writes, the bias what zero writes."""
    with torch.no_grad():
        shape = x.shape[1:]
        unit = torch.eye(shape.numel(), dtype=x.dtype).reshape(-1, *shape)
        b = layer(torch.zeros(1, *shape, dtype=x.dtype))
        return (layer(unit) - b).flatten(1).T, b.flatten()


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d strided": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 7)),
    "conv1d same": (lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2), (2, 2, 4, 4)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2, padding=(1, 0)), (2, 4, 3, 3)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), (2, 3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 4)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), (2, 4, 2, 2)),
}


def layer_and_inputs(name, positive=False):
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    x = x.abs() if positive else x
    return layer, x, torch.randn_like(layer(x)).detach()


def stab(z, epsilon=1e-6):
    return z + epsilon * torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
