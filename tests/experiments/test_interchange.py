"""Interchange interventions against patches by hand, and against a causal model that is known."""

import functools

import pytest
import torch
from experiments.models import language, mlp, residual
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import ReplaceWithin, every, interchange
from tdconcepts.hooks import Site, Target, capture, patch


def pairs(make, rows=4):
    model, base = make(rows)
    return model, TensorDict({"base": base, "source": base.flip(0)}, batch_size=[rows])


@pytest.mark.parametrize(("make", "site"), [(mlp, Site("2.0")), (residual, Site("blocks.1"))])
def test_it_is_the_base_with_the_sources_activation(make, site):
    model, td = pairs(make)
    with capture(model, site, clone=True) as m:
        taken = m(td["source"].copy())["activation", str(site)]
    with patch(model, {site: lambda value, _: taken}) as m:
        expected = m(td["base"].copy())["y"]
    torch.testing.assert_close(interchange(model, site)(td)["sweep", "y"][:, 0], expected.detach())


class Sum(nn.Module):
    """(a + b) + c: the first two features are added before the third; by construction one hidden unit holds a + b."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 2, bias=False)
        self.hidden.weight.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    def forward(self, x):
        total = self.hidden(x).sum(-1, keepdim=True)
        return -((total - torch.arange(7.0)) ** 2)


def test_the_accuracy_of_a_causal_model():
    net = TensorDictModule(Sum(), ["x"], ["logits"])
    base, source = torch.randint(0, 3, (2, 50, 3)).float()
    label = (source[:, :2].sum(-1) + base[:, 2]).long()  # what the causal model says: the source's a + b, the base's c
    td = TensorDict({"base": {"x": base}, "source": {"x": source}, "label": label}, batch_size=[50])
    out = interchange(net, Site("hidden"), label="label", split=every)(td)["interchange", "agreement"]
    assert out.shape == (50, 2)
    assert out.dtype == torch.bool
    assert out[:, 0].all()
    assert out[:, 1].float().mean() < 0.5
    each_label = torch.stack([label, (base[:, :2].sum(-1) + source[:, 2]).long()], 1)
    both = interchange(net, Site("hidden"), label="label", split=every)(td.set("label", each_label))
    assert both["interchange", "agreement"].all()


def test_subspace():
    model, td = pairs(mlp)
    basis = torch.linalg.qr(torch.randn(5, 2).double())[0]
    mix = torch.randn(2, 2).double()
    with capture(model, "1", clone=True) as m:
        base, source = (m(td[name].copy())["activation", "1"].clone() for name in ("base", "source"))
    new = base + (source - base) @ basis @ basis.T
    with patch(model, {Site("1"): lambda value, _: new}) as m:
        expected = m(td["base"].copy())["y"]
    found = interchange(model, Site("1"), subspace=(basis @ mix).T)(td)  # the subspace, whichever directions span it
    torch.testing.assert_close(found["sweep", "y"][:, 0], expected.detach())
    whole = interchange(model, Site("1"), subspace=torch.randn(5, 5).double())(td.clone())["sweep", "y"]
    torch.testing.assert_close(whole, interchange(model, Site("1"))(td.clone())["sweep", "y"])


def test_heads_of_a_language_model():
    model, td = pairs(language)
    heads = functools.partial(every, groups=2)
    sites = Site("blocks.*.out", "input")
    sweep = interchange(model, sites, Target("logits", (-1, 3)), split=heads)
    out = sweep(td)
    assert out["patching", "effect"].shape == (4, 6)
    assert sweep.names(td)[1] == "blocks.0.out:in[1]"


@pytest.mark.parametrize("shape", [[], [2, 2]])
def test_batch_dims(shape):
    model, td = pairs(mlp)
    sweep = interchange(model, Site("1"), Target("y", 1), label="label", split=every)
    td["label"] = torch.tensor([0, 1, 1, 0])
    flat = sweep(td.clone())
    part = td[0] if not shape else td.reshape(shape)
    out = sweep(part.clone())
    for key in ("agreement",):
        expected = flat["interchange", key][0] if not shape else flat["interchange", key].reshape(*shape, 5)
        assert out["interchange", key].equal(expected)


def test_errors():
    model, td = pairs(mlp)
    with pytest.raises(BadKey, match="label"):
        interchange(model, Site("0"), label="label")(td.clone())
    with pytest.raises(BadType, match="classes"):
        interchange(model, Site("0"), label="label")(td.clone().set("label", torch.zeros(4)))
    with pytest.raises(BadValue, match="fit"):
        interchange(model, Site("0"), label="label")(td.clone().set("label", torch.zeros(4, 3).long()))
    with pytest.raises(BadValue, match="depend"):
        interchange(model, Site("0"), subspace=torch.ones(2, 5))
    with pytest.raises(BadValue, match=r"subspace\.mT"):  # a basis in columns, where directions are rows
        interchange(model, Site("0"), subspace=torch.randn(5, 2))
    with pytest.raises(BadType, match="subspace"):
        interchange(model, Site("0"), subspace=[1.0])
    with pytest.raises(BadValue, match="features"):
        interchange(model, Site("0"), subspace=torch.randn(1, 4))(td.clone())
    with pytest.raises(BadKey, match="source"):
        interchange(model, Site("0"))(td.select("base"))
    with pytest.raises(BadKey, match="subspace"):
        ReplaceWithin("s", torch.eye(2))(torch.zeros(1, 2), TensorDict({}, batch_size=[1]))


def test_one_label_of_which_output():
    net = TensorDictModule(lambda x: (x, x), ["x"], ["y", "z"])
    with pytest.raises(BadValue, match="which output"):
        interchange(net, "x", label="label")
    assert interchange(net, "x", Target("z", 0), label="label").out_keys[-1] == ("interchange", "agreement")
