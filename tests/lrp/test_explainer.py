"""LRP as an explainer: entries and sites, many targets, starts, the report, compiling, kinds of policies."""

import pytest
import torch
import torch.utils.checkpoint
from lrp.nets import TransformerBlock, as_td
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import tdconcepts as tdc
from tdconcepts import Site, Target
from tdconcepts.errors import BadType, BadValue
from tdconcepts.lrp import (
    CPLRP,
    LRP,
    AttnLRP,
    Composite,
    EpsilonAlpha2Beta1Flat,
    EpsilonPlus,
    EpsilonPlusFlat,
    EpsilonRule,
    FlatRule,
    FoldedBatchNorm,
    ZPlusRule,
)


def mlp():
    return as_td(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double())


def cnn():
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()
    return as_td(nn.Sequential(*layers, nn.Linear(16, 3)).double())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-2)


def transformer(bias=True):
    blocks = TransformerBlock(bias=bias), TransformerBlock(bias=bias)
    return as_td(nn.Sequential(*blocks, Mean(), nn.Linear(8, 3, bias=bias)).double())


SHAPES = {mlp: (4,), cnn: (1, 8, 8), transformer: (5, 8)}
CASES = [
    (mlp, EpsilonPlusFlat()),
    (cnn, EpsilonAlpha2Beta1Flat()),
    (cnn, EpsilonPlus()),
    (transformer, AttnLRP()),
    (transformer, CPLRP()),
]


def batch(make, n=3):
    torch.manual_seed(1)
    return TensorDict(x=torch.randn(n, *SHAPES[make], dtype=torch.float64), batch_size=[n])


def explained(net, composite, target, td, *args, **options):
    return LRP(net, composite, target, *args, **options)(td.copy())["attribution", "x"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(("make", "composite"), CASES)
def test_many_targets_are_each_target(make, composite, convention):
    net, td = make(), batch(make)
    together = explained(net, composite, Target("logits", [0, 2]), td, convention=convention)
    for i, target in enumerate((0, 2)):
        one = explained(net, composite, Target("logits", target), td, convention=convention)
        assert together[:, i].allclose(one, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning")
@pytest.mark.parametrize("target", [Target("logits", 1), Target("logits", [0, 1])], ids=["one", "two"])
@pytest.mark.parametrize(("make", "composite"), CASES[:-1])
def test_compiled_in_one_graph(make, composite, target):
    torch._dynamo.reset()
    net, td = make(), batch(make)
    explainer = LRP(net, composite, target)
    expected = explainer(td.copy())["attribution", "x"]
    found = torch.compile(explainer, fullgraph=True, backend="eager")(td.copy())["attribution", "x"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_sites(convention):
    net, td = cnn(), batch(cnn)
    wrt = ["x", Site("0", "input"), Site("1"), Site("4")]
    td = LRP(net, EpsilonPlus(), Target("logits", 1), wrt, outputs=True, convention=convention)(td)
    assert td["attribution", "x"].allclose(td["attribution", "0:in"])
    head = net.module[6]
    activation = net.module[:5](td["x"]).flatten(1)
    value = td["logits"][:, 1:2]
    wanted = activation * head.weight[1] * value / (value + value.sign() * 1e-6)
    assert td["attribution", "4"].flatten(1).allclose(wanted)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_starts(convention):
    net, td = mlp(), batch(mlp)
    value = explained(net, EpsilonPlus(), Target("logits", 1), td, convention=convention)
    ones = explained(net, EpsilonPlus(), Target("logits", 1), td, convention=convention, start="ones")
    assert value.allclose(ones * net(td)["logits"][:, 1:2])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("start", ["value", "ones"])
@pytest.mark.parametrize("target", [1, [0, 2]])
def test_what_was_added_or_lost(convention, start, target):
    net, td = mlp(), batch(mlp)
    wrt = ["x", Site("1")]
    explainer = LRP(
        net,
        EpsilonPlus(),
        Target("logits", target),
        wrt,
        convention=convention,
        start=start,
        convergence_delta=True,
    )
    assert explainer.out_keys[2:] == [("convergence_delta", "x"), ("convergence_delta", "1")]
    out = explainer(td.copy())
    value = net(td.copy())["logits"][:, target]
    began = value if start == "value" else torch.ones_like(value)
    for key in ("x", "1"):
        delta = out["attribution", key].sum(-1) - began
        assert out["convergence_delta", key].allclose(delta)
    plain = LRP(net, EpsilonPlus(), Target("logits", target), wrt, convention=convention, start=start)(td.copy())
    assert plain["attribution", "x"].allclose(out["attribution", "x"])


def test_entries_share_a_delta():
    net = TensorDictModule(nn.Bilinear(2, 3, 2, bias=False), ["a", "b"], ["logits"])
    td = TensorDict(a=torch.randn(4, 2), b=torch.randn(4, 3), batch_size=[4])
    out = LRP(net, EpsilonPlus(), Target("logits", 0), convergence_delta=True)(td)
    assert out["convergence_delta", "joint"].abs().max() < 1e-4


def test_zero_inputs_get_flat_relevance():
    net, td = mlp(), batch(mlp)
    td["x"][:, 0] = 0
    for convention in ("gradient", "relevance"):
        found = explained(net, EpsilonPlusFlat(), Target("logits", 1), td, convention=convention)
        assert found.allclose(found[:, :1].expand(3, 4))
        assert (found != 0).all()


def test_conservation_of_cp_lrp_without_biases():
    net, td = transformer(bias=False), batch(transformer)
    found = explained(net, CPLRP(), Target("logits", 1), td).sum((1, 2))
    assert (found / net(td)["logits"][:, 1] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_the_report(convention):
    net, td = cnn(), batch(cnn)
    explainer = LRP(net, EpsilonPlus(), Target("logits", 1), convention=convention, check=True)
    found = explainer(td.copy())["attribution", "x"]
    assert found.equal(explained(net, EpsilonPlus(), Target("logits", 1), td, convention=convention))
    lines = explainer.report.lines
    assert list(lines) == ["6", "4", "3", "1", "0"] or set(lines) == {"0", "1", "3", "4", "6"}
    assert lines["0"].r_in == pytest.approx(float(found.sum()))
    assert lines["6"].r_out == pytest.approx(float(net(td)["logits"][:, 1].sum().detach()))
    assert lines["1"].kept == pytest.approx(1)


def test_chunks_create_graph_and_batch_dims():
    net, td = mlp(), batch(mlp, 4)
    whole = explained(net, EpsilonPlus(), Target("logits", [0, 1]), td)
    assert whole.allclose(explained(net, EpsilonPlus(), Target("logits", [0, 1]), td, chunk_size=3))
    assert explained(net, EpsilonPlus(), Target("logits", [0, 1]), td.reshape(2, 2)).flatten(0, 1).allclose(whole)
    assert explained(net, EpsilonPlus(), Target("logits", 1), td, create_graph=True).requires_grad


def test_recurrent_and_attention_policies():
    class Policy(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 2, bias=False)

        def forward(self, x):
            out = self.body(x)
            return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])

    td = batch(transformer)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, bias=False)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for body in (nn.LSTM(8, 8, batch_first=True, bias=False), nn.GRU(8, 8, batch_first=True, bias=False), encoder):
        net = as_td(Policy(body).double().eval())
        value = net(td.copy())["logits"][:, 1]
        found = explained(net, CPLRP(1e-12), Target("logits", 1), td).sum((1, 2))
        assert found.allclose(value, rtol=1e-4), type(body)


def test_embeddings():
    body = TensorDictModule(nn.Embedding(7, 4), ["tokens"], ["embedded"])
    head = TensorDictModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), ["embedded"], ["logits"])
    net, td = TensorDictSequential(body, head), TensorDict(tokens=torch.tensor([[1, 2, 3]]), batch_size=[1])
    with pytest.raises(BadType, match="no gradient"):
        LRP(net, EpsilonPlus(), Target("logits", 1))(td)
    td = LRP(net, EpsilonPlus(), Target("logits", 1), Site("0"))(td)
    assert td["attribution", "0"].shape == (1, 3, 4)


def test_refusals():
    net = mlp()
    with pytest.raises(BadType, match=r"Composite\(\{nn\.Linear"):
        LRP(net, EpsilonRule(), Target("logits", 1))
    for arguments in ((Target("logits", 1),), (None, Target("logits", 1)), ()):
        with pytest.raises(BadType, match=r"needs a composite[\s\S]*EpsilonPlus\(\)"):
            LRP(net, *arguments)
    with pytest.raises(BadType, match="not a Target"):
        LRP(net, EpsilonPlus())
    with pytest.raises(BadValue, match="no such start"):
        LRP(net, EpsilonPlus(), Target("logits", 1), start="two")
    with pytest.raises(BadType, match="no option"):
        LRP(net, EpsilonPlus(), Target("logits", 1), epsilon=1)
    with pytest.raises(BadType, match="bare"):
        LRP(net.module, EpsilonPlus(), Target("logits", 1))
    with pytest.raises(BadValue, match="middle of the model"):
        explained(net, EpsilonPlus() | {"2": FlatRule()}, Target("logits", 1), batch(mlp))
    with pytest.raises(BadValue, match="without a rule"):
        LRP(net, Composite({nn.ReLU: EpsilonRule()}), Target("logits", 1))


def test_an_explained_policy_is_a_policy():
    net, td = mlp(), batch(mlp)
    out = LRP(net, EpsilonPlus(), Target("logits", "argmax"), outputs=True)(td)
    assert out["logits"].equal(net(td)["logits"])
    assert tdc.Target("logits", 1) == Target("logits", 1)


def test_the_settings_of_the_composite():
    net, td = mlp(), TensorDict(x=torch.randn(3, 4, dtype=torch.float64), batch_size=[3])
    plain = LRP(net, EpsilonPlusFlat(0.25), Target("logits", 0))
    assert [tunable.name for tunable in plain.tunables] == ["epsilon"]
    changed = plain.replace(epsilon=0.5, outputs=True)
    expected = LRP(net, EpsilonPlusFlat(0.5), Target("logits", 0))(td.copy())["attribution", "x"]
    assert changed.module is net
    assert torch.equal(changed(td.copy())["attribution", "x"], expected)
    assert not torch.allclose(plain(td.copy())["attribution", "x"], expected)
    assert changed.replace(composite=EpsilonPlus()).tunables == plain.tunables
    assert LRP(net, Composite({nn.Linear: EpsilonRule()}, {"relu": EpsilonRule()}), Target("logits", 0)).tunables == ()
    with pytest.raises(BadType, match="LRP has no argument 'epsylon'"):
        plain.replace(epsylon=1.0)
    with pytest.raises(BadValue):
        plain.replace(epsilon=-1.0)


class Recomputed(nn.Module):
    def __init__(self, recompute=True):
        super().__init__()
        self.a, self.b, self.recompute = nn.Linear(4, 4), nn.Linear(4, 3), recompute

    def forward(self, x):
        def block(x):
            return self.a(x).relu()

        return self.b(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_activations_that_are_recomputed(convention):
    """What rules keep apart from torch is right, what torch keeps for them is missed and refused."""
    net, plain, target = as_td(Recomputed().double()), as_td(Recomputed(False).double()), Target("logits", 0)
    plain.load_state_dict(net.state_dict())
    found, wanted = (
        explained(each, EpsilonPlus(0.1), target, batch(mlp), convention=convention) for each in (net, plain)
    )
    assert found.equal(wanted)
    with pytest.raises(BadValue, match="recomputes activations"):
        explained(
            net, EpsilonPlus() | Composite({}, {"linear": ZPlusRule()}) | {nn.Linear: ZPlusRule()}, target, batch(mlp)
        )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.norm.running_mean.normal_()

    def forward(self, x):
        h = torch.nn.functional.silu(self.norm(self.conv(x)))
        h += x
        return self.head(h.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), (4,), EpsilonPlus(0.1)),
    "cnn": (lambda: cnn().module, (1, 8, 8), EpsilonAlpha2Beta1Flat(0.1, 0.1)),
    "residual": (Residual, (1, 6, 6), EpsilonPlus(0.1) | FoldedBatchNorm()),
    "attention": (lambda: transformer().module, (5, 8), AttnLRP()),
    "constant attention": (lambda: transformer().module, (5, 8), CPLRP(0.1)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 8), EpsilonPlus(0.1)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 8), EpsilonPlus(0.1)),
}


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("name", NETS)
def test_the_derivative_of_an_explanation(name, convention):
    torch.manual_seed(0)
    make, shape, composite = NETS[name]
    net = as_td(make().double().eval())
    x = torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
    weight, step = torch.randn_like(x), 1e-6 * torch.randn_like(x)

    def weighted(x):
        explainer = LRP(net, composite, Target("logits", 0), convention=convention, create_graph=True)
        return (explainer(TensorDict(x=x, batch_size=[2]))["attribution", "x"] * weight).sum()

    (found,) = torch.autograd.grad(weighted(x), x)
    moved = weighted(x + step) - weighted(x - step)
    assert torch.allclose((found * step).sum() * 2, moved, rtol=1e-5)
