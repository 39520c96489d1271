"""The named composites: reference cases, Zennit on VGG11 and ResNet18, and conservation without biases."""

import pytest
import torch
from lrp.cases import case, close, convolution, linear
from lrp.nets import Canonical, ResNet18, as_td, prepared, vgg11
from oracles import oracle
from tensordict import TensorDict
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.lrp import (
    CPLRP,
    LRP,
    AttnLRP,
    BaseRuleMapper,
    BetaSmooth,
    DeconvNet,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    EpsilonRule,
    ExcitationBackprop,
    FoldedBatchNorm,
    GuidedBackprop,
    IgnoreRule,
    Stabilizer,
    UniformEpsilon,
)


def cnn(c, norm=False):
    first, second = (convolution(c, nn.Conv2d, f"c{i}w", f"c{i}b") for i in (1, 2))
    first.padding = second.padding = (1, 1)
    layers = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    layers += [linear(c["l1w"], c["l1b"]), nn.ReLU(), linear(c["l2w"], c["l2b"])]
    if norm:
        bn = nn.BatchNorm2d(4).double().eval()
        bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var = c["bw"], c["bb"], c["bm"], c["bv"]
        layers.insert(1, bn)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("convention", ["relevance", "gradient"])
@pytest.mark.parametrize(
    ("name", "composite"),
    [
        ("cnn_EpsilonPlus", EpsilonPlus()),
        ("cnn_EpsilonGammaBox", EpsilonGammaBox(-1.5, 1.5)),
        ("bncnn_merged_EpsilonPlus", EpsilonPlus() | FoldedBatchNorm()),
    ],
)
def test_reference_of_cnns(name, composite, convention):
    c = case(name)
    net = cnn(c, "bncnn" in name)
    x = c["x"].clone().requires_grad_()
    with composite.on(net, convention=convention) as m:
        out = m(x)
    start = c["r_out"] if convention == "relevance" else c["r_out"] / out.detach()
    (found,) = torch.autograd.grad(out, x, start)
    found = found * x.detach() if convention == "gradient" and composite.first is None else found
    close(found, c["r_in"], 1e-6 if convention == "relevance" else 1e-4)


def test_reference_of_an_mlp():
    c = case("mlp_EpsilonPlusFlat")
    net = nn.Sequential(*(part for i in (1, 2, 3) for part in (linear(c[f"w{i}"], c[f"b{i}"]), nn.ReLU())))[:-1]
    for convention in ("relevance", "gradient"):
        x = c["x"].clone().requires_grad_()
        with EpsilonPlusFlat().on(net, convention=convention) as m:
            out = m(x)
        start = c["r_out"] if convention == "relevance" else c["r_out"] / out.detach()
        close(torch.autograd.grad(out, x, start)[0], c["r_in"], 1e-6)


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.fc = convolution(c, nn.Conv2d, "rw", "rb"), linear(c["fw"], c["fb"])
        self.conv.padding = (1, 1)

    def forward(self, x):
        return self.fc((torch.relu(self.conv(x)) + x).flatten(1))


def test_reference_of_a_residual():
    c = case("residual_EpsilonPlus")
    net, x = Residual(c), c["x"].clone().requires_grad_()
    assert net(x).allclose(c["y"])
    with EpsilonPlus().on(net, convention="relevance") as m:
        close(torch.autograd.grad(m(x), x, c["r_out"])[0], c["r_in"], 1e-6)


COMPOSITES = {
    "EpsilonPlus": (EpsilonPlus(), {}),
    "EpsilonPlusFlat": (EpsilonPlusFlat(), {}),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(), {}),
    "EpsilonAlpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(), {}),
    "EpsilonGammaBox": (EpsilonGammaBox(-3.0, 3.0), {"low": -3.0, "high": 3.0}),
    "ExcitationBackprop": (ExcitationBackprop(), {}),
    "GuidedBackprop": (GuidedBackprop(), {}),
    "DeconvNet": (DeconvNet(), {}),
    "BetaSmooth": (BetaSmooth(), {}),
}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 10))


NETS = {
    "mlp": (mlp, (2, 3, 2, 2)),
    "vgg11": (lambda: vgg11(width=4), (2, 3, 32, 32)),
    "vgg11bn": (lambda: vgg11(True, width=4), (2, 3, 32, 32)),
    "resnet18": (lambda: ResNet18(width=4, inplace=False), (2, 3, 32, 32)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("canonizer", [False, True])
@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("net", NETS)
def test_zennit(net, name, canonizer):
    """Zennit 0.5.1, for ResNet18 with sums as modules, with and without its SequentialMergeBatchNorm.

    Its canonizer merges a batch norm's epsilon into the layer and leaves it in the batch norm: the nets have none.
    """
    composites, canonizers, layers = map(oracle, ("zennit.composites", "zennit.canonizers", "zennit.layer"))
    make, shape = NETS[net]
    torch.manual_seed(0)
    plain = prepared(make())
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    ours, options = COMPOSITES[name]
    theirs = getattr(composites, name)
    x, r = torch.randn(shape, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    bounds = {k: torch.full_like(x, v) for k, v in options.items()}
    if canonizer:
        bounds["canonizers"] = [canonizers.SequentialMergeBatchNorm()]
        of_relus_only = name in ("GuidedBackprop", "DeconvNet", "BetaSmooth")
        ours = ours | FoldedBatchNorm(IgnoreRule() if of_relus_only else None)
    canonical = Canonical(plain, layers.Sum) if net == "resnet18" else plain
    assert canonical(x).allclose(plain(x))
    with theirs(**bounds).context(canonical) as m:
        (wanted,) = torch.autograd.grad(m(leaf), leaf, r)
    leaf = x.clone().requires_grad_()
    with ours.on(plain, convention="relevance") as m:
        close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted, 1e-9)


WITHOUT_BIASES = {
    "vgg11": lambda: vgg11(width=32),
    "vgg11bn": lambda: vgg11(True, width=32),
    "resnet18": lambda: ResNet18(width=32),
}


def kept(net, composite, convention="gradient", init=True):
    torch.manual_seed(1)
    model = prepared(WITHOUT_BIASES[net](), bias=False, init=init)
    td = TensorDict(x=torch.randn(2, 3, 32, 32, dtype=torch.float64), batch_size=[2])
    td = LRP(as_td(model), composite, Target("logits", "argmax"), convention=convention, outputs=True)(td)
    return td["attribution", "x"].sum((1, 2, 3)) / td["logits"].amax(1)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(
    "composite",
    [
        EpsilonPlus(),
        EpsilonPlusFlat(),
        EpsilonAlpha2Beta1Flat(),
        EpsilonPlusFlat() | FoldedBatchNorm(),
        UniformEpsilon(1e-6),
    ],
)
@pytest.mark.parametrize("net", WITHOUT_BIASES)
def test_conservation_without_biases(net, composite, convention):
    assert (kept(net, composite, convention) - 1).abs().max() < 2e-3


@pytest.mark.parametrize("net", WITHOUT_BIASES)
def test_the_stabiliser_takes_the_rest(net):
    """Of the values that torch's own initialisation gives, down to 1e-3, epsilon's part is seen; it goes with it."""
    lost = [(1 - kept(net, EpsilonPlusFlat(by, by), init=False)).abs().max() for by in (1e-6, 1e-9, 1e-12)]
    assert lost[0] < 1e-2
    assert lost[1] < 1.01e-3 * lost[0]
    assert lost[2] < 1e-8


@pytest.mark.parametrize("composite", [EpsilonPlus, EpsilonAlpha2Beta1Flat, UniformEpsilon])
@pytest.mark.parametrize("net", WITHOUT_BIASES)
def test_a_stabiliser_in_units_of_the_values(net, composite):
    """Then it is no matter how large the values of a net are: torch's own initialisation, three nets, both forms."""
    relative = Stabilizer(1e-6, norm_scale=True)
    for convention in ("gradient", "relevance"):
        assert (kept(net, composite(relative, relative), convention, init=False) - 1).abs().max() < 1e-4


def test_conservation_of_a_vgg_with_torchs_own_initialisation():
    """Of a VGG11 whose classifier reads the last 2x2 map, as the first ones did, 1e-6 absorbs .0014 to .0019."""
    torch.manual_seed(0)
    body = list(vgg11())[:-5]
    head = nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10)
    model = prepared(nn.Sequential(*body, *head), bias=False)
    td = TensorDict(x=torch.randn(2, 3, 64, 64, dtype=torch.float64), batch_size=[2])
    for composite in (EpsilonPlusFlat(), UniformEpsilon(1e-6)):
        out = LRP(as_td(model), composite, Target("logits", "argmax"), outputs=True)(td.copy())
        assert (out["attribution", "x"].sum((1, 2, 3)) / out["logits"].amax(1) - 1).abs().max() < 2e-3


def test_what_the_base_leaves_has_its_gradient():
    net, x = mlp().double(), torch.randn(2, 12, dtype=torch.float64).requires_grad_()
    with pytest.raises(BadValue, match=r"1 \(Linear\)"):
        BaseRuleMapper().on(net)
    with BaseRuleMapper(on_missing="gradient").on(net, convention="relevance") as m:
        (found,) = torch.autograd.grad(m(x)[:, 0].sum(), x)
    wanted = net[5].weight[0] @ net[3].weight @ net[1].weight  # activations pass
    close(found, wanted.expand(2, 12))


def test_what_they_share():
    assert ExcitationBackprop().convention == "relevance"
    assert BaseRuleMapper(0.5).operations["matmul"].epsilon == 0.5
    assert EpsilonPlus(rule_mapper={"0": EpsilonRule(7.0)}).rules[0] == ("0", EpsilonRule(7.0))
    assert CPLRP().operations["linear"] == AttnLRP().operations["linear"] == EpsilonRule(0.0)
