"""Every rule of a linear layer on every kind of layer, with bias and without, for inputs of any sign."""

import functools
import itertools

import pytest
import torch
from lrp.cases import close, dense
from torch import nn

from tdconcepts.lrp import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    NormRule,
    RAPRule,
    Stabilizer,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

LAYERS = {
    "linear": (functools.partial(nn.Linear, 5, 4), (3, 5)),
    "one output": (functools.partial(nn.Linear, 5, 1), (3, 5)),
    "conv1d": (functools.partial(nn.Conv1d, 2, 3, 3, stride=2, padding=1), (2, 2, 7)),
    "conv1d same": (functools.partial(nn.Conv1d, 2, 3, 3, padding="same", dilation=3), (2, 2, 7)),
    "conv1d valid": (functools.partial(nn.Conv1d, 2, 3, 3, padding="valid"), (2, 2, 7)),
    "conv2d": (functools.partial(nn.Conv2d, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 2, 5, 4)),
    "conv2d rest": (functools.partial(nn.Conv2d, 2, 3, 2, stride=3), (2, 2, 7, 6)),
    "conv2d dilated": (functools.partial(nn.Conv2d, 2, 4, 2, dilation=(2, 1), groups=2), (2, 2, 4, 4)),
    "conv2d depthwise": (functools.partial(nn.Conv2d, 3, 6, 2, groups=3, padding=2), (2, 3, 3, 3)),
    "conv2d same": (functools.partial(nn.Conv2d, 2, 4, (1, 3), padding="same", groups=2), (2, 2, 4, 4)),
    "conv3d": (functools.partial(nn.Conv3d, 2, 2, 2, stride=2, padding=1, groups=2), (2, 2, 3, 3, 3)),
    "transposed 1d": (functools.partial(nn.ConvTranspose1d, 2, 3, 3, 2, 1, output_padding=1), (2, 2, 4)),
    "transposed 2d": (
        functools.partial(nn.ConvTranspose2d, 4, 6, (2, 3), (1, 2), (0, 1), dilation=(2, 1), groups=2),
        (2, 4, 3, 3),
    ),
    "transposed 3d": (
        functools.partial(nn.ConvTranspose3d, 1, 2, 2, (1, 2, 1), output_padding=(0, 1, 0)),
        (2, 1, 2, 2, 2),
    ),
}

SIGNS = {
    "any": lambda x: x,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "some zero": lambda x: x * (x.abs() > 0.5),
    "all zero": torch.zeros_like,
}
STABILIZERS = [1e-6, 0.0, 0.25, Stabilizer(0.1, clip=True), Stabilizer(0.1, norm_scale=True), lambda z: z + 3.0]


def over(r, z, by):
    """``R / stab(z)``, with 0 / 0 = 0."""
    sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
    if isinstance(by, Stabilizer):
        epsilon = by.epsilon * (z.square().mean(tuple(range(1, z.ndim)), keepdim=True).sqrt() if by.norm_scale else 1.0)
        z = sign * z.abs().clamp(min=epsilon) if by.clip else z + epsilon * sign
    else:
        z = by(z) if callable(by) else z + by * sign
    return torch.where(z == 0, 0.0, r / z)


def epsilon(m, ones, b, x, r, over):
    return x * (over(r, x @ m.T + b) @ m)


def alpha_beta(alpha, beta):
    def formula(m, ones, b, x, r, over):
        p, n, up, down = m.clamp(min=0), m.clamp(max=0), x.clamp(min=0), x.clamp(max=0)
        s, t = over(r, up @ p.T + down @ n.T + b.clamp(min=0)), over(r, up @ n.T + down @ p.T + b.clamp(max=0))
        return alpha * (up * (s @ p) + down * (s @ n)) - (beta * (up * (t @ n) + down * (t @ p)) if beta else 0)

    return formula


def gamma(g):
    def formula(m, ones, b, x, r, over):
        big, small, up, down = m + g * m.clamp(min=0), m + g * m.clamp(max=0), x.clamp(min=0), x.clamp(max=0)
        z = x @ m.T + b
        s = torch.where(z > 0, over(r, up @ big.T + down @ small.T + b + g * b.clamp(min=0)), 0.0)
        t = torch.where(z < 0, over(r, up @ small.T + down @ big.T + b + g * b.clamp(max=0)), 0.0)
        return up * (s @ big) + down * (s @ small) + up * (t @ small) + down * (t @ big)

    return formula


def flat(m, ones, b, x, r, over):
    return over(r, ones.sum(1).expand_as(r)) @ ones


def wsquare(m, ones, b, x, r, over):
    return over(r, (m.square().sum(1) + b.square()).expand_as(r)) @ m.square()


def zbox(m, ones, b, x, r, over):
    p, n, low, high = m.clamp(min=0), m.clamp(max=0), torch.full_like(x, -3.0), torch.full_like(x, 4.0)
    s = over(r, x @ m.T - low @ p.T - high @ n.T)
    return x * (s @ m) - low * (s @ p) - high * (s @ n)


RULES = {
    "epsilon": (EpsilonRule, epsilon),
    "uniform epsilon": (UniformEpsilonRule, epsilon),
    "norm": (NormRule, epsilon),
    "z-plus": (ZPlusRule, alpha_beta(1.0, 0.0)),
    "alpha 1": (functools.partial(AlphaBetaRule, 1.0, 0.0), alpha_beta(1.0, 0.0)),
    "alpha 2": (functools.partial(AlphaBetaRule, 2.0, 1.0), alpha_beta(2.0, 1.0)),
    "alpha 3": (functools.partial(AlphaBetaRule, 3.0, 2.0), alpha_beta(3.0, 2.0)),
    "gamma": (functools.partial(GammaRule, 0.25), gamma(0.25)),
    "gamma 0": (functools.partial(GammaRule, 0.0), gamma(0.0)),
    "gamma 100": (functools.partial(GammaRule, 100.0), gamma(100.0)),
    "flat": (FlatRule, flat),
    "w-square": (WSquareRule, wsquare),
    "z-box": (functools.partial(ZBoxRule, -3.0, 4.0), zbox),
}


@pytest.mark.parametrize("name", RULES)
def test_formula(name):
    make_rule, formula = RULES[name]
    choices = itertools.cycle(itertools.product(SIGNS, STABILIZERS, (True, False)))  # 60, five for each layer
    for make, shape in LAYERS.values():
        structure = make(bias=False).double()
        nn.init.ones_(structure.weight)
        ones = dense(structure, torch.zeros(shape, dtype=torch.float64))[0].round()
        for sign, by, bias in itertools.islice(choices, 5):
            layer = make(bias=bias).double()
            for p in layer.parameters():
                nn.init.normal_(p)
            x = SIGNS[sign](torch.randn(shape, dtype=torch.float64)).requires_grad_()
            m, b = dense(layer, x)
            rule, z = make_rule(by), layer(x).detach()
            r = torch.randn_like(z) * (z != 0)  # an output of 0 has no ratio to it
            divide = lambda r, z: over(r.reshape(out), z.reshape(out), by).flatten(1)  # noqa: B023, E731
            out = z.shape
            expected = formula(m, ones, b, x.flatten(1), r.flatten(1), divide)
            with rule.on(layer, convention="relevance") as ruled:
                (found,) = torch.autograd.grad(ruled(x), x, r)
            close(found.flatten(1), expected)
            with rule.on(layer, convention="gradient") as ruled:
                (found,) = torch.autograd.grad(ruled(x), x, r / torch.where(z == 0, 1.0, z))
            close((found if rule.terminal else found * x).flatten(1), expected)


PADDED = {
    "circular": (functools.partial(nn.Conv1d, 2, 3, 3, padding=2, padding_mode="circular"), (2, 5)),
    "reflect": (functools.partial(nn.Conv2d, 2, 3, (3, 2), (2, 1), padding=(1, 2), padding_mode="reflect"), (2, 4, 4)),
    "replicate": (functools.partial(nn.Conv3d, 2, 2, 2, padding=1, padding_mode="replicate", groups=2), (2, 2, 3, 2)),
    "same": (functools.partial(nn.Conv2d, 1, 2, (2, 3), padding="same", padding_mode="circular"), (1, 3, 4)),
}
ALL = {**{name: make for name, (make, _) in RULES.items()}, "rap": lambda by: RAPRule()}


@pytest.mark.parametrize("name", ALL)
def test_one_row_without_a_batch_dim(name):
    for make, shape in (*LAYERS.values(), *((make, (1, *shape)) for make, shape in PADDED.values())):
        layer, x = make().double(), torch.randn(1, *shape[1:], dtype=torch.float64).requires_grad_()
        rule, z = ALL[name](1e-6), layer(x).detach()
        r = torch.randn_like(z)
        for convention in rule.forms:
            with rule.on(layer, convention=convention) as ruled:
                (wanted,) = torch.autograd.grad(ruled(x), x, r)
                (found,) = torch.autograd.grad(ruled(x[0]), x, r[0])
            close(found, wanted)


@pytest.mark.parametrize("name", [name for name in RULES if name != "rap"])
@pytest.mark.parametrize("mode", PADDED)
def test_padding_that_is_not_zero(mode, name):
    """The layer is a convolution of the padded input, whose relevance goes back to where the padding was taken from."""
    make, shape = PADDED[mode]
    layer, x = make().double(), torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
    inner = make(padding=0, padding_mode="zeros").double()
    inner.load_state_dict(layer.state_dict())
    pad = functools.partial(nn.functional.pad, pad=layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    rule = RULES[name][0](1e-6)
    r = torch.randn_like(layer(x))
    for convention in rule.forms:
        with rule.on(inner, convention=convention) as ruled:
            (wanted,) = torch.autograd.grad(ruled(pad(x)), x, r)
        with rule.on(layer, convention=convention) as ruled:
            close(torch.autograd.grad(ruled(x), x, r)[0], wanted)


def test_bounds_in_the_shape_of_an_input_that_is_padded():
    layer, x = PADDED["circular"][0]().double(), torch.randn(2, 2, 5, dtype=torch.float64).requires_grad_()
    low, high = -3 - torch.rand(2, 5, dtype=torch.float64), 3 + torch.rand(2, 5, dtype=torch.float64)
    with ZBoxRule(low, high).on(layer, convention="relevance") as ruled:
        (found,) = torch.autograd.grad(ruled(x), x, torch.ones(2, 3, 7, dtype=torch.float64))
    assert found.sum((1, 2)).allclose(torch.tensor(21.0, dtype=torch.float64), atol=1e-4)
