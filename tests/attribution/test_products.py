"""Products, quotients and matrix products of two values that change, by hand; what can't be followed says so."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.attribution import DeepLift
from tdconcepts.errors import BadValue


class Pair(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, a, b):
        return self.function(a, b).flatten(1).sum(1)


def lifted(function, a, b, a0, b0, **options):
    base = TensorDict(a=a0, b=b0, batch_size=[len(a)])
    td = TensorDict(a=a, b=b, baseline=base, batch_size=[len(a)])
    module = TensorDictModule(Pair(function), ["a", "b"], ["y"])
    td = DeepLift(module, Target("y"), convergence_delta=True, **options)(td)
    return td["attribution", "a"], td["attribution", "b"], td["convergence_delta", "joint"]


def rows(*shapes):
    return [torch.randn(5, *shape, dtype=torch.float64) + 3 for shape in shapes]


def test_a_product_by_hand():
    a, a0, b, b0 = rows([4], [4], [4], [4])
    by_a, by_b, _ = lifted(torch.mul, a, b, a0, b0)
    torch.testing.assert_close(by_a, (a - a0) * (b + b0) / 2)
    torch.testing.assert_close(by_b, (b - b0) * (a + a0) / 2)


def test_a_quotient_by_hand():
    a, a0, b, b0 = rows([4], [4], [4], [4])
    by_a, by_b, _ = lifted(torch.div, a, b, a0, b0)
    torch.testing.assert_close(by_a, (a - a0) * (1 / b + 1 / b0) / 2)
    torch.testing.assert_close(by_b, (1 / b - 1 / b0) * (a + a0) / 2)


@pytest.mark.parametrize(
    ("function", "one", "other"),
    [
        (lambda a, b: a * b, [4], [1]),
        (lambda a, b: a * b.unsqueeze(1), [3, 4], [4]),
        (lambda a, b: a / (1 + b * b), [4], [4]),
        (lambda a, b: 2 / a + b, [4], [4]),
        (lambda a, b: a @ b, [2, 3], [3, 4]),
        (lambda a, b: torch.bmm(a, b), [2, 3], [3, 4]),
        (lambda a, b: a.unsqueeze(1) @ b, [2, 3], [6, 3, 4]),
        (lambda a, b: torch.baddbmm(a @ b, a, b, beta=0.5, alpha=2.0), [2, 3], [3, 4]),
        (lambda a, b: torch.stack([x @ y for x, y in zip(a, b, strict=True)])[:, None], [3], [3]),
        (lambda a, b: torch.stack([x @ y for x, y in zip(a, b, strict=True)]), [2, 3], [3]),
        (lambda a, b: a**2 + torch.sqrt(b), [4], [4]),
        (lambda a, b: torch.where(a > -99, a, b) * b, [4], [4]),
        (lambda a, b: F.normalize(a, dim=-1) * b, [4], [4]),
        (lambda a, b: F.scaled_dot_product_attention(a, b, b), [2, 3, 4], [2, 5, 4]),
    ],
)
def test_products_are_complete(function, one, other):
    a, a0, b, b0 = rows(one, one, other, other)
    by_a, by_b, delta = lifted(function, a, b, a0, b0)
    assert delta.abs().max() < 1e-12
    assert by_a.abs().sum() > 0
    assert by_b.abs().sum() > 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a, b: torch.cumprod(a, -1) + b, "'cumprod'"),
        (lambda a, b: torch.where(a > b, a, 0 * a), "other elements at the baseline"),
        (lambda a, b: F.dropout(a, 0.5) + b, r"model.eval\(\)"),
        (lambda a, b: F.batch_norm(a, None, None, training=True) + b, r"model.eval\(\)"),
        (lambda a, b: torch.stack([F.linear(x, y[None]) for x, y in zip(a, b, strict=True)]), "weights depend"),
    ],
)
def test_what_cannot_be_followed(function, reason):
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    with pytest.raises(BadValue, match=reason):
        lifted(function, a, b, b, a)
    by_a, _, _ = lifted(function, a, b, b, a, on_missing="gradient")
    assert by_a.shape == (5, 4)
