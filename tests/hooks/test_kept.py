"""What formulas keep without a copy: right under every operation in place that is seen, loud where none was."""

import gc

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.hooks.kept import _HELD, Kept, overwrites, spare
from tdconcepts.lrp import LRP, Composite, EpsilonAlpha2Beta1, EpsilonPlus, EpsilonRule, UniformEpsilon


def test_kept():
    x = torch.ones(4)
    one, other, copied = Kept(x), Kept(x[:2]), Kept(x)
    assert one.get().data_ptr() == x.data_ptr()
    copied.copy()
    spare([x])
    assert not _HELD.by_storage
    x.zero_()
    assert one.get().sum() == copied.get().sum() == 4
    assert other.get().sum() == 2
    missed = Kept(x)
    x.add_(1)
    missed.copy()
    with pytest.raises(BadValue, match="overwritten where no rule could see it"):
        missed.get()
    del missed
    gc.collect()
    assert not _HELD.by_storage
    with torch.inference_mode():
        assert not Kept.can(torch.ones(1))


def test_what_overwrites():
    for function in (
        torch.relu_,
        torch.Tensor.__iadd__,
        torch.Tensor.copy_,
        F.dropout_ if hasattr(F, "dropout_") else torch.dropout_,
    ):
        assert overwrites(function, {})
    assert overwrites(F.relu, {"inplace": True})
    assert overwrites(torch.add, {"out": torch.ones(1)})
    assert not any(overwrites(function, {"inplace": False}) for function in (F.relu, torch.add, torch.Tensor.__add__))


class Net(nn.Module):
    """The same computation with operations in place and without."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.inplace, self.relu, self.tanh = inplace, nn.ReLU(inplace), nn.Tanh()
        self.one, self.norm, self.two = nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1)
        self.block, self.head = Block(inplace), nn.Linear(3, 2)
        self.norm.running_mean.normal_()

    def forward(self, x):
        h = self.relu(self.norm(self.one(x)))
        skip = h
        h = self.two(h)
        if self.inplace:
            h += skip
            h = F.silu(h, inplace=True)
            h[:, 0] = h[:, 1] * 2
            h.mul_(0.5)
        else:
            h = F.silu(h + skip)
            h = torch.stack([h[:, 1] * 2, h[:, 1], h[:, 2]], 1) * 0.5
        return self.head(self.block(h).mean(-1))


class Block(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(0.5).add_(1) if self.inplace else x * 0.5 + 1


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(
    "composite",
    [
        EpsilonPlus(0.1, 0.01),
        UniformEpsilon(0.1, 0.01),
        EpsilonAlpha2Beta1(0.1, 0.01, flat=True),
        EpsilonPlus(0.1, 0.01) | Composite({"block": EpsilonRule(0.1), "two": EpsilonRule(0.2)}),
    ],
    ids=["plus", "epsilon", "alpha-beta", "taps"],
)
def test_a_net_with_operations_in_place(composite, convention):
    x = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = TensorDict(x=x, batch_size=[3])
    found, wanted = (
        LRP(
            TensorDictModule(Net(inplace).double().eval(), ["x"], ["y"]),
            composite,
            Target("y", [0, 1]),
            convention=convention,
        )(given.copy())["attribution", "x"]
        for inplace in (True, False)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    gc.collect()
    assert not _HELD.by_storage
