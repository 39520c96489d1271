"""Composites of ReLU rules against Zennit, and the flat first layer."""

import pytest
import torch
from lrp.cases import close
from lrp.nets import as_td, prepared, vgg11
from oracles import oracle
from tensordict import TensorDict

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.lrp import LRP, BetaSmooth, DeconvNet, EpsilonPlus, EpsilonPlusFlat, GuidedBackprop


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("composite", [GuidedBackprop, DeconvNet, BetaSmooth])
@pytest.mark.parametrize("inplace", [False, True])
def test_zennit(composite, inplace):
    """Zennit 0.5.1, which in front of an in-place ReLU keeps for beta-smooth what the ReLU has overwritten."""
    inplace = inplace and composite is not BetaSmooth
    theirs = getattr(oracle("zennit.composites"), composite.__name__)
    net = prepared(vgg11(width=4, inplace=inplace))
    x, r = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    with theirs().context(net) as m:
        (wanted,) = torch.autograd.grad(m(leaf), leaf, r)
    with composite().on(net) as m:
        close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)
    td = TensorDict(x=x, batch_size=[2])
    found = LRP(as_td(net), composite(), Target("logits", 1), start="ones")(td)["attribution", "x"]
    with theirs().context(net) as m:
        (wanted,) = torch.autograd.grad(m(leaf)[:, 1].sum(), leaf)
    close(found, wanted)


def test_convention():
    with pytest.raises(BadValue, match="mix two conventions"):
        GuidedBackprop().on(vgg11(width=4), convention="gradient")
    assert EpsilonPlusFlat().first is not None
    assert EpsilonPlus().first is None
