"""Softmax, fused layers, gated products, attention: reference cases, masks, the equality of the two conventions."""

import pytest
import torch
import torch.nn.functional as F
from lrp.cases import Fn, case, close, linear, relevance
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.rules import Rules
from tdconcepts.lrp import (
    CPLRP,
    AHQKVRule,
    AttentionRule,
    AttnLRP,
    Composite,
    EpsilonRule,
    GatedProductRule,
    SoftmaxEpsilonRule,
)


@pytest.mark.parametrize("name", ["softmax_rule", "softmax_rule_masked"])
def test_reference_of_softmax(name):
    c = case(name)
    (found,) = relevance(SoftmaxEpsilonRule(), nn.Softmax(-1), [c["x"]], c["r_out"])
    close(found, c["r_in"], 1e-6)
    assert (found[c["x"].isinf()] == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_softmax_honours_its_dim(dim):
    x, r = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    y = x.softmax(dim)
    wanted = x * (r - y * r.sum(dim, keepdim=True))
    close(relevance(SoftmaxEpsilonRule(), nn.Softmax(dim), [x], r)[0], wanted)
    for function in (lambda x: F.softmax(x, dim), lambda x: torch.softmax(x, dim=dim), lambda x: x.softmax(dim)):
        leaf = x.clone().requires_grad_()
        with Rules((), {"softmax": SoftmaxEpsilonRule()}, "relevance").on(Fn(function)) as m:
            close(torch.autograd.grad(m(leaf), leaf, r)[0], wanted)
    (ratio,) = relevance(SoftmaxEpsilonRule(), nn.Softmax(dim), [x], r / y, "gradient")
    close(x * ratio, wanted)


def test_reference_of_a_fused_layer():
    c = case("ahqkv_linear")
    (found,) = relevance(AHQKVRule(), linear(c["w"], c["b"]), [c["x"]], c["r_out"], "gradient")
    close(found, c["r_in"], 1e-6)
    with pytest.raises(BadValue, match="three equal parts"), AHQKVRule().on(nn.Linear(2, 4)) as m:
        m(torch.randn(1, 2, requires_grad=True))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate, self.up, self.down = linear(c["wg"]), linear(c["wu"]), linear(c["wd"])

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_reference_of_a_gated_mlp():
    c = case("gated_mlp_attnlrp")
    x = c["x"].clone().requires_grad_()
    with AttnLRP(1e-9, 1e-9).on(SwiGLU(c), "relevance") as m:
        close(torch.autograd.grad(m(x), x, c["r_out"])[0], c["r_in"], 1e-6)


class Attention(nn.Module):
    def __init__(self, c, fused):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(c[f"w{n}"], c[f"b{n}"]) for n in "qkvo")
        self.heads, self.fused = int(c["heads"]), fused

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_reference_of_attention(fused):
    c = case("attention_cplrp")
    x = c["x"].clone().requires_grad_()
    with CPLRP(1e-9, 1e-9).on(Attention(c, fused), "relevance") as m:
        close(torch.autograd.grad(m(x), x, c["r_out"])[0], c["r_in"], 1e-6)
    c = case("attention_attnlrp_grad")
    x = c["x"].clone().requires_grad_()
    with AttnLRP().on(Attention(c, fused)) as m:
        out = m(x)
        ratio = torch.autograd.grad(out, x, c["r_out"])[0]
    x = x.detach()
    matches = [float((f - c["r_in"]).abs().max() / c["r_in"].abs().max()) for f in (ratio * x, ratio)]
    assert min(matches) < 1e-6


def test_multihead_attention_is_attention():
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(m.in_proj_bias)
    w, b = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
    c = {f"w{n}": p.detach() for n, p in zip("qkv", w, strict=True)}
    c |= {f"b{n}": p.detach() for n, p in zip("qkv", b, strict=True)}
    c |= {"wo": m.out_proj.weight.detach(), "bo": m.out_proj.bias.detach(), "heads": torch.tensor(2)}
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    for composite in (AttnLRP(), CPLRP()):
        with composite.on(Attention(c, True)) as plain:
            wanted = torch.autograd.grad(plain(x).sum(), x)[0]
        with composite.on(m) as ours:
            out, weights = ours(x, x, x)
        assert out.allclose(m(x, x, x)[0])
        assert weights.shape == (2, 4, 4)
        close(torch.autograd.grad(out.sum(), x)[0], wanted)


def test_masks_of_multihead_attention():
    m = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    causal = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    with AttentionRule(constant=True).on(m) as ours:
        out = ours(x, x, x, key_padding_mask=padding, attn_mask=causal)[0]
    found = torch.autograd.grad(out[0, :2].sum(), x)[0]
    assert (found[0, 2] == 0).all()
    assert found.isfinite().all()


def test_gated_product():
    a, b, r = torch.randn(3, 4, dtype=torch.float64).chunk(3)
    for signal, shares in ((None, (0.5, 0.5)), (0, (1, 0)), (1, (0, 1))):
        rule = GatedProductRule(signal=signal)
        for found, share in zip(relevance(rule, Fn(torch.mul), [a, b], r), shares, strict=True):
            assert found.allclose(r * share)
        ratios = relevance(rule, Fn(torch.mul), [a, b], r / (a * b), "gradient")
        assert (a * ratios[0]).allclose(r * shares[0])
    with pytest.raises(BadValue, match="factor"):
        GatedProductRule(signal=2)


def test_refusals():
    for rule, module in ((SoftmaxEpsilonRule(), nn.Linear(3, 2)), (AttentionRule(), nn.Linear(3, 2))):
        with pytest.raises(BadValue, match="can't serve"), rule.on(module, "relevance") as m:
            m(torch.randn(1, 3, requires_grad=True))
    training = nn.MultiheadAttention(4, 2, dropout=0.5)
    x = torch.randn(3, 1, 4, requires_grad=True)
    with pytest.raises(BadValue, match="training mode"), AttentionRule().on(training) as m:
        m(x, x, x)
    assert isinstance(Composite({nn.Linear: EpsilonRule()}) | CPLRP(), Composite)


class Slow(nn.Module):
    """An ``nn.MultiheadAttention`` in plain operations."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, q, k, v, attn_mask, key_padding_mask):
        m = self.module
        if not m.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        own = (
            m.in_proj_weight.chunk(3) if m._qkv_same_embed_dim else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        )
        biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        parts = [F.linear(t, w, b) for t, w, b in zip((q, k, v), own, biases, strict=True)]
        q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in parts)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(attn_mask, -torch.inf)
        mixed = scores.masked_fill(key_padding_mask[:, None, None], -torch.inf).softmax(-1) @ v
        out = m.out_proj(mixed.transpose(1, 2).flatten(2))
        return out if m.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("composite", [AttnLRP(), CPLRP()], ids=["AttnLRP", "CPLRP"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"kdim": 5, "vdim": 6, "batch_first": True}, {"kdim": 5, "bias": False}]
)
def test_multihead_attention_of_three_inputs(options, composite, convention):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    shapes = (2, 3, 8), (2, 4, m.kdim), (2, 4, m.vdim)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs = [(t if m.batch_first else t.transpose(0, 1)).clone().requires_grad_() for t in inputs]
    masks = {"attn_mask": torch.zeros(3, 4, dtype=torch.bool), "key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}
    masks["attn_mask"][0, 1] = masks["key_padding_mask"][1, 2:] = True
    found = []
    for module in (m, Slow(m)):
        with composite.on(module, convention) as ruled:
            out = ruled(*inputs, **masks)
        out = out[0] if isinstance(out, tuple) else out
        start = out.detach() if convention == "relevance" else torch.ones_like(out)
        found.append(torch.autograd.grad(out, inputs, start, allow_unused=True))
    for ours, wanted in zip(*found, strict=True):
        assert (ours is None) is (wanted is None)  # q and k of CP-LRP
        if wanted is not None:
            close(ours, wanted, 1e-6)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"masked": True}])
def test_grouped_queries_causal_and_scaled(options, convention):
    masked = {"attn_mask": (torch.arange(5) < 4).expand(5, 5)} if "masked" in options else {}
    given = {"enable_gqa": True, **{k: v for k, v in options.items() if k != "masked"}, **masked}

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **given)

    def slow(q, k, v):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * options.get("scale", q.shape[-1] ** -0.5)
        if "is_causal" in options:
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        if masked:
            scores = scores.masked_fill(~masked["attn_mask"], -torch.inf)
        return scores.softmax(-1) @ v

    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for function in (fused, slow):
        with AttnLRP().on(Fn(function), convention) as m:
            out = m(q * 1, k * 1, v * 1)
        start = out.detach() if convention == "relevance" else torch.ones_like(out)
        found.append(torch.autograd.grad(out, [q, k, v], start))
    for ours, wanted in zip(*found, strict=True):
        close(ours, wanted, 1e-6)


class Gate(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.up, self.down, self.how = nn.Linear(3, 8).double(), nn.Linear(4, 2).double(), how

    def forward(self, x):
        return self.down(self.how(self.up(x)))


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("how", [F.glu, nn.GLU(), lambda x: F.glu(x, dim=1), lambda x: F.glu(x, -1)])
def test_a_gated_linear_unit_is_a_product_with_a_sigmoid(how, convention):
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    net, plain = Gate(how), Gate(lambda x: x[:, :4] * x[:, 4:].sigmoid())
    plain.load_state_dict(net.state_dict())
    signal = Composite(operations={"mul": GatedProductRule(signal=0)})  # by default it is the second factor
    for composite in (AttnLRP(), CPLRP() | signal):
        found, wanted = (
            torch.autograd.grad(composite.on(each, convention)(x)[:, 0].sum(), x)[0] for each in (net, plain)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_gate_at_zero():
    x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    with GatedProductRule().on(nn.GLU()) as m:
        assert torch.autograd.grad(m(x), x, torch.ones(1, 1))[0].allclose(torch.tensor([[0.25, 0.25]]))
