"""The engine of rules: nothing stays behind, nesting, reuse, in-place operations, graphs, threads, refusals."""

import threading
import weakref

import pytest
import torch
from hooks.nets import hook_count, snapshot
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import Capture, Site, Target
from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import differentiable_once_more
from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import (
    LRP,
    AttnLRP,
    Composite,
    EpsilonAlpha2Beta1,
    EpsilonPlus,
    EpsilonPlusFlat,
    EpsilonRule,
    GuidedBackpropRule,
    IgnoreRule,
    PassRule,
    StopRule,
    ZPlusRule,
)


def mlp(inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 3)).double()


def flow(m, x, **kwargs):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(m(leaf, **kwargs).sum(), leaf)[0]


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_what_a_call_was_given_is_not_held_until_the_next_one():
    held = []

    class Net(nn.Module):
        def forward(self, x):
            h = 2 * x
            y, h = h.relu(), weakref.ref(h)
            held.append(h() is not None)
            return y

    with Rules((), {"relu": GuidedBackpropRule()}, "relevance").on(Net()) as m:
        flow(m, X)
    assert held == [False]


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_the_model_is_as_before(convention):
    net = mlp()
    before, out, plain = snapshot(net), net(X), flow(net, X)
    with EpsilonPlus().on(net, convention=convention) as m:
        assert m(X).equal(out)
        assert net(X).equal(out)
        flow(m, X)
    with pytest.raises(ZeroDivisionError), EpsilonPlus().on(net) as m:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), EpsilonPlus().on(net) as m:
        m(X[:, :2].clone().requires_grad_())
    assert snapshot(net) == before
    assert not hook_count(net)
    assert flow(net, X).equal(plain)


def test_nested_contexts_the_last_one_counts():
    net = mlp()
    by_zplus = flow(Composite({nn.Linear: ZPlusRule()}).on(net, convention="relevance"), X)
    first = Composite({nn.Linear: EpsilonRule(0.5)}).on(net, convention="relevance")
    with first, Composite({nn.Linear: ZPlusRule()}).on(net, convention="relevance") as m:
        assert flow(m, X).equal(by_zplus)
        assert flow(net, X).equal(by_zplus)


def test_overlapping_exits():
    net = mlp()
    plain = flow(net, X)
    first = EpsilonRule(0.5).on(net[0], convention="relevance")
    second = EpsilonRule(0.5).on(net[2], convention="relevance")
    first.__enter__()
    second.__enter__()
    both = flow(net, X)
    first.__exit__(None, None, None)
    one = flow(net, X)
    second.__exit__(None, None, None)
    assert len({tuple(v.flatten().tolist()) for v in (plain, both, one)}) == 3
    assert flow(net, X).equal(plain)
    assert not hook_count(net)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_a_module_that_runs_twice(convention):
    layer = nn.Linear(4, 4, bias=False).double()
    reused, apart = nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4, bias=False))
    apart[2].weight = nn.Parameter(layer.weight.data)
    apart.double()
    rules = Composite({nn.Linear: ZPlusRule(), nn.ReLU: PassRule()})
    assert flow(rules.on(reused, convention), X).allclose(flow(rules.on(apart, convention), X))


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("rule", [EpsilonRule(0.1), ZPlusRule()])
def test_inplace_activations(rule, convention):
    rules = Composite({nn.Linear: rule, nn.ReLU: PassRule()})
    assert flow(rules.on(mlp(True), convention), X).equal(flow(rules.on(mlp(), convention), X))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x, *, scale=1.0):
        h = self.a(input=x)
        h.relu_()
        h *= scale
        return self.b(h)


def test_inplace_functions_and_keywords():
    rules = EpsilonPlus()
    for convention in ("gradient", "relevance"):
        expected = flow(rules.on(mlp(), convention), X)
        assert flow(rules.on(Functional(), convention), X).allclose(expected)
        assert flow(rules.on(Functional(), convention), X, scale=1.0).allclose(expected)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_graphs(convention):
    net = mlp()
    leaf = X.clone().requires_grad_()
    with EpsilonPlus(0.1).on(net, convention) as m:
        out = m(leaf)
    seeds = torch.eye(3, dtype=torch.float64)
    one = [torch.autograd.grad(out, leaf, s.expand(5, 3), retain_graph=True)[0] for s in seeds]
    batched = torch.autograd.grad(
        out, leaf, seeds.unsqueeze(1).expand(3, 5, 3), is_grads_batched=True, retain_graph=True
    )
    assert torch.stack(one).allclose(batched[0])
    _, pull = torch.func.vjp(m, X)
    assert torch.vmap(pull)(seeds.unsqueeze(1).expand(3, 5, 3))[0].allclose(torch.stack(one))


@pytest.mark.parametrize(
    ("rule", "convention"),
    [(EpsilonRule(0.1), "gradient"), (ZPlusRule(0.1), "gradient"), (ZPlusRule(0.1), "relevance")],
)
def test_second_derivatives_of_a_layer_are_those_of_the_formula(rule, convention):
    layer, leaf = mlp()[0], X.clone().requires_grad_()
    m = rule.on(layer, convention)
    (first,) = torch.autograd.grad(m(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    step = 1e-6 * torch.randn_like(X)
    moved = flow(m, X + step).square().sum() - flow(m, X - step).square().sum()
    assert torch.allclose((second * step).sum() * 2, moved, rtol=1e-4)


def test_nothing_happens_without_gradients():
    net = mlp()
    with EpsilonPlus().on(net) as m, torch.no_grad():
        assert m(X).equal(net(X))
        assert not m(X).requires_grad


def test_threads():
    net, found = mlp(), {}
    plain = flow(net, X)
    with Composite({nn.Linear: ZPlusRule()}).on(net, convention="relevance") as m:
        thread = threading.Thread(target=lambda: found.update(other=flow(net, X)))
        thread.start()
        thread.join()
        here = flow(m, X)
    assert found["other"].equal(plain)
    assert not here.equal(plain)


def test_frozen_parameters_and_low_precision():
    net = mlp().requires_grad_(False)
    expected = flow(EpsilonPlus().on(net, "relevance"), X)
    assert expected.equal(flow(EpsilonPlus().on(mlp(), "relevance"), X))
    found = flow(EpsilonPlus().on(net.bfloat16(), "relevance"), X.bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_mixtures_are_refused():
    net = mlp()
    with pytest.raises(BadValue, match=r"mix two conventions[\s\S]*GuidedBackpropRule\(\) at '1'[\s\S]*at '0'"):
        Composite({nn.Linear: EpsilonRule(), nn.ReLU: GuidedBackpropRule()}).on(net)
    first, second = EpsilonRule().on(net[0], convention="relevance"), EpsilonRule().on(net[2])
    with first, second, pytest.raises(BadValue, match=r"two contexts mix two conventions"):
        net(X.clone().requires_grad_())


def test_programs_add_up():
    net = TensorDictModule(mlp(), ["x"], ["y"])
    with (Composite({nn.Linear: ZPlusRule(), nn.ReLU: IgnoreRule()}) + Capture("0")).on(net) as m:
        td = m(TensorDict(x=X.clone().requires_grad_(), batch_size=[5]))
    assert td["activation", "0"].shape == (5, 6)
    assert td["y"].requires_grad


def normed(inplace):
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace), nn.Conv1d(4, 3, 1), nn.ReLU(inplace)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 2)).double().eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(net[1].bias)
    return TensorDictModule(net, ["x"], ["y"])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonPlusFlat(), EpsilonAlpha2Beta1()])
def test_a_layer_and_what_passes_relevance_on_are_one_step(composite, inplace):
    """The quotients in between make the other form less exact, so it is compared by the relevance convention too."""
    net, td = normed(inplace), TensorDict(x=torch.randn(3, 2, 5, dtype=torch.float64), batch_size=[3])
    sites = ["x", Site("0"), Site("1"), Site("3")]
    for wrt in ("x", sites):
        found = LRP(net, composite, Target("y", 1), wrt)(td.copy())["attribution"]
        for options in ({"create_graph": True}, {"convention": "relevance"}):
            apart = LRP(net, composite, Target("y", 1), wrt, **options)(td.copy())["attribution"]
            for key in list(found.keys()):
                torch.testing.assert_close(found[key], apart[key].detach(), rtol=1e-4, atol=1e-6)
    if inplace:
        plain = LRP(normed(False), composite, Target("y", 1))(td.copy())["attribution", "x"]
        torch.testing.assert_close(LRP(net, composite, Target("y", 1))(td.copy())["attribution", "x"], plain)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
def test_second_derivatives_of_a_context(convention):
    """Those of the formulas, or true ones through all rules where they are asked for, after the context."""
    net, step = normed(False).module, 1e-6 * torch.randn(5, 2, 5, dtype=torch.float64)
    x = torch.randn(5, 2, 5, dtype=torch.float64, requires_grad=True)

    def total(x, wanted):
        with differentiable_once_more(wanted), EpsilonPlus(0.1, 0.01).on(net, convention) as m:
            return torch.autograd.grad(m(x)[:, 0].sum(), x, create_graph=True)[0].square().sum()

    moved = total(x + step, True) - total(x - step, True)
    for wanted in (True, False):
        (found,) = torch.autograd.grad(total(x, wanted), x)
        assert torch.allclose((found * step).sum() * 2, moved, rtol=1e-4, atol=0) == wanted


class Writes(nn.Module):
    """Several values, some of which hang together with the input."""

    def __init__(self, one, other=None):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return {"one": self.one(x), "more": [torch.ones(2), None if self.other is None else self.other(x)]}


def test_a_module_that_writes_a_dict():
    one, other = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    x, r = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64)
    for rule in (EpsilonRule(0.1), PassRule(), StopRule()):
        with rule.on(one, convention="relevance") as m:
            (wanted,) = torch.autograd.grad(m(x), x, r)
        with rule.on(Writes(one), convention="relevance") as m:
            written = m(x)
        assert set(written) == {"one", "more"}
        assert written["more"][1] is None
        torch.testing.assert_close(torch.autograd.grad(written["one"], x, r)[0], wanted)
    with EpsilonRule(0.1).on(Writes(one, other), convention="relevance") as m:
        written = m(x)
        (found,) = torch.autograd.grad([written["one"], written["more"][1]], x, [r, 2 * r])
    parts = []
    for layer, share in ((one, r), (other, 2 * r)):
        with EpsilonRule(0.1).on(layer, convention="relevance") as m:
            parts += torch.autograd.grad(m(x), x, share)
    torch.testing.assert_close(found, parts[0] + parts[1])
    for net in (Writes(one), Writes(one, other)):
        with pytest.raises(BadValue, match=r"zero_params[\s\S]*inside it"), EpsilonRule(0.1, "bias").on(net) as m:
            m(x)


def test_one_rule_on_a_module_with_keys():
    layer = nn.Linear(3, 2).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with EpsilonRule(0.5).on(layer, convention="relevance") as m:
        (wanted,) = torch.autograd.grad(m(x).sum(), x)
    with EpsilonRule(0.5).on(TensorDictModule(layer, ["x"], ["y"]), convention="relevance") as m:
        (found,) = torch.autograd.grad(m(TensorDict(x=x, batch_size=[2]))["y"].sum(), x)
    assert found.equal(wanted)
    with pytest.raises(BadType, match="works on entries"):
        EpsilonRule().on(TensorDictSequential(TensorDictModule(layer, ["x"], ["y"])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_has_compiled_is_refused():
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for part in (torch.jit.script(plain), torch.jit.trace(plain, torch.ones(1, 3))):
        net = nn.Sequential(nn.Linear(3, 3), part)
        with pytest.raises(BadValue, match=r"torch\.jit has compiled without a rule: 1 \("):
            EpsilonPlus().on(net)
        with pytest.raises(BadType, match=r"at '1\.0', inside a module that torch\.jit"):
            Composite({"1.0": EpsilonRule()}, on_missing="gradient").on(net)
        x = torch.randn(2, 3, requires_grad=True)
        with (EpsilonPlus() | {"1": EpsilonRule(0.5)}).on(net, convention="relevance") as m:
            (found,) = torch.autograd.grad(m(x).sum(), x)
        with EpsilonRule().on(net[0], convention="relevance"), EpsilonRule(0.5).on(plain, "relevance"):
            (wanted,) = torch.autograd.grad(plain(net[0](x)).sum(), x)
        torch.testing.assert_close(found, wanted)
    compiled = nn.Linear(3, 3)
    compiled.compile(backend="eager")
    for part in (torch.compile(plain, backend="eager"), compiled):
        with pytest.raises(BadValue, match="a part of the model is compiled"):
            EpsilonPlus().on(nn.Sequential(nn.Linear(3, 3), part))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.gru, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        h = nn.functional.gelu(self.up(self.norm(x)))
        h = x + nn.functional.scaled_dot_product_attention(h, h, h)
        return self.head(self.gru(h)[0][:, -1])


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize(
    ("net", "composite", "shape"),
    [
        (normed(False), EpsilonPlus(0.1, 0.01), (2, 5)),
        (normed(False), EpsilonAlpha2Beta1(0.1, 0.01, flat=True), (2, 5)),
        (TensorDictModule(Attending().double(), ["x"], ["y"]), AttnLRP(), (3, 4)),
    ],
)
def test_second_derivatives_through_several_rules(net, composite, shape, convention):
    torch.manual_seed(1)
    explainer = LRP(net, composite, Target("y", 1), convention=convention, create_graph=True)
    x, step = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    weights = torch.rand_like(x)

    def total(x):
        return (explainer(TensorDict(x=x, batch_size=[3]))["attribution", "x"] * weights).sum()

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(total(leaf), leaf)
    moved = (total(x + 1e-6 * step) - total(x - 1e-6 * step)) / 2e-6
    torch.testing.assert_close((found * step).sum(), moved.detach(), rtol=1e-5, atol=1e-8)
