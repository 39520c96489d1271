"""What is known of a tensor's sign: never of one that was written to, and rules see what they would see by looking."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.hooks import signs
from tdconcepts.hooks.signs import known_positive, note_sign
from tdconcepts.lrp import LRP, Composite, EpsilonPlus, signed


def noted(name, x, output):
    note_sign(name, (x,), output)
    return known_positive(output)


def test_what_is_known():
    x = torch.randn(2, 3, 4, 4)
    assert not known_positive(x)
    assert not known_positive(None)
    gone = x.relu()
    note_sign("relu", (x,), gone)
    del gone
    assert not known_positive(None)  # what a reference to it gives now
    y = x.relu()
    assert not known_positive(y)
    assert noted("relu", x, y)
    assert noted("max_pool2d", y, F.max_pool2d(y, 2))
    assert not noted("max_pool2d", x, F.max_pool2d(x, 2))
    assert not noted("sub", y, y - 1)
    assert not noted("split", y, y.split(1))
    with torch.inference_mode():  # where versions are not counted
        assert not noted("relu", x, x.relu())
    assert not vars(y)  # nothing is left on a caller's tensor
    note_sign("mean", (), y)  # its argument had a name
    view = y.view(-1)
    assert noted("view", y, view)
    view.sub_(1)  # and so all that share its memory
    assert not known_positive(view)
    assert not known_positive(y)


@pytest.mark.parametrize("name", sorted(signs._KNOWN))
def test_what_is_known_is_so(name):
    function = next(getattr(home, name) for home in (F, torch, torch.Tensor) if hasattr(home, name))
    n = int(name[-2]) if "pool" in name else 2
    more = {"pool": (2,), "softmax": (-1,), "reshape": ((-1,),), "view": (-1,), "dropout": (0.5, True)}
    args = next((more[part] for part in more if part in name), ())
    x = torch.randn(2, *[4] * n)
    output = function(x if name in signs._MAKE else x.abs(), *args)
    assert (output >= 0).all()


class Net(nn.Module):
    """What the second layer sees is made of a magnitude, by an operation in place or not."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.change = nn.Linear(4, 6), nn.Linear(6, 3), change

    def forward(self, x):
        return self.two(self.change(self.one(x).abs()))


CHANGES = {
    "nothing": lambda x: x,
    "in place": lambda x: x.sub_(0.3),
    "subtracted": lambda x: x - 0.3,
    "a product": lambda x: x.mul_(torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0])),
    "a view": lambda x: x.view(-1, 2, 3).sub_(0.3).view(-1, 6),
    "a view of all": lambda x: (x[:, :2].mul_(-1), x)[1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rules_see_what_they_would_see_by_looking(change, monkeypatch):
    net = TensorDictModule(Net(change).double(), ["x"], ["y"])
    td = TensorDict(x=torch.randn(3, 4).double(), batch_size=[3])
    composite = EpsilonPlus() | Composite({nn.Linear: signed.ZPlusRule()}, on_missing="gradient")
    explain = LRP(net, composite, Target("y", 0))
    found = explain(td.copy())["attribution", "x"]
    monkeypatch.setattr(signed, "known_positive", lambda x: False)
    torch.testing.assert_close(found, explain(td.copy())["attribution", "x"], rtol=0, atol=0)


def test_what_is_known_spares_a_look(monkeypatch):
    looked = []
    look = signed._is_positive
    monkeypatch.setattr(signed, "_is_positive", lambda x: looked.append(known_positive(x)) or look(x))
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(True), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2)
    net = TensorDictModule(nn.Sequential(*layers, nn.Flatten()), ["x"], ["y"])
    LRP(net, EpsilonPlus(), Target("y", 0))(TensorDict(x=torch.randn(2, 1, 10, 10), batch_size=[2]))
    assert looked == [False, True, True]
