"""Attention rollout and transformer attribution: the formulas by hand, Hugging Face, order, determinism, bad input."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Target
from tdconcepts.attribution import AttentionRollout, TransformerAttribution
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.lrp import Composite, IgnoreRule


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(tokens)[:, 0])


@pytest.fixture
def net():
    made = Net().double().eval()
    for p in made.parameters():  # layers of an encoder begin as copies
        p.data.add_(0.2 * torch.randn_like(p))
    return TensorDictModule(made, ["tokens"], ["logits"])


@pytest.fixture
def td():
    return TensorDict(tokens=torch.randn(4, 5, 8, dtype=torch.float64), batch_size=[4])


def attention(net, td):
    """The weights ``[B, heads, T, T]`` of each layer, by torch's own attention, and the logits: with a graph."""
    x, weights = td["tokens"], []
    for layer in net.module.encoder.layers:
        attend = layer.self_attn
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in attend_in(attend, x))
        w = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        weights.append(w)
        x = layer.norm1(x + attend.out_proj((w @ v).transpose(1, 2).flatten(-2)))
        x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    return weights, net.module.head(x[:, 0])


def attend_in(attend, x):
    return (x @ attend.in_proj_weight.T + attend.in_proj_bias).chunk(3, -1)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.3])
@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8])
def test_rollout_by_hand(net, td, fusion, discard, residual):
    found = AttentionRollout(net, residual=residual, fusion=fusion, discard=discard, token=None)(td.copy())
    weights, logits = attention(net, td)
    torch.testing.assert_close(logits, net.module(td["tokens"]))
    for b in range(4):
        total = torch.eye(5, dtype=torch.float64)
        for layer in weights:
            heads = layer[b].detach()
            fused = {"mean": heads.mean(0), "max": heads.max(0).values, "min": heads.min(0).values}[fusion]
            flat = fused.flatten()
            flat[flat.argsort()[: int(discard * 25)]] = 0
            mixed = (1 - residual) * flat.view(5, 5) + residual * torch.eye(5, dtype=torch.float64)
            sums = mixed.sum(-1, keepdim=True)
            total = mixed / sums.where(sums != 0, 1.0) @ total
        torch.testing.assert_close(found["attribution", "tokens"][b], total)
    one = AttentionRollout(net, residual=residual, fusion=fusion, discard=discard, token=-1)(td)
    assert torch.equal(one["attribution", "tokens"], found["attribution", "tokens"][:, -1])


def test_transformer_attribution_by_hand(net, td):
    explain = TransformerAttribution(net, Target("logits", [2, 0]), token=None)
    found = explain(td.copy())["attribution", "tokens"]
    weights, logits = attention(net, td)
    for t, target in enumerate((2, 0)):
        gradients = torch.autograd.grad(logits[:, target].sum(), weights, retain_graph=True)
        total = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
        for w, g in zip(weights, gradients, strict=True):
            total = total + (g * w).clamp(min=0).mean(1) @ total
        torch.testing.assert_close(found[:, t], total.detach())
    one = TransformerAttribution(net, Target("logits", 0))(td)["attribution", "tokens"]
    torch.testing.assert_close(one, found[:, 1, 0])


def test_with_relevance_by_rules(net, td):
    """With rules that are the gradient, the relevance of the weights is A times its gradient."""
    plain = Composite({nn.Linear: IgnoreRule()}, on_missing="gradient")
    found = TransformerAttribution(net, Target("logits", 1), token=None, relevance=plain)(td.copy())
    weights, logits = attention(net, td)
    gradients = torch.autograd.grad(logits[:, 1].sum(), weights)
    total = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    for w, g in zip(weights, gradients, strict=True):
        total = total + (g * (w * g)).clamp(min=0).mean(1) @ total
    torch.testing.assert_close(found["attribution", "tokens"], total.detach())


def test_layers_by_number(net, td):
    """In the order of execution, however they are named."""
    weights, _ = attention(net, td)
    found = AttentionRollout(net, layers=[-1, 0], residual=0.0, token=None)(td)["attribution", "tokens"]
    torch.testing.assert_close(found, (weights[2].mean(1) @ weights[0].mean(1)).detach())


def test_twenty_calls_are_equal(net, td):
    """PnPXAI reads layers from a set: 18 different maps in 40 calls."""
    for explain in (AttentionRollout(net), TransformerAttribution(net, Target("logits", "argmax"))):
        results = [explain(td.copy())["attribution", "tokens"] for _ in range(20)]
        assert all(torch.equal(one, results[0]) for one in results)
        fresh = type(explain)(net, *([Target("logits", "argmax")] if hasattr(explain, "hold") else []))
        assert torch.equal(fresh(td.copy())["attribution", "tokens"], results[0])


def test_a_gradient_of_the_target_not_of_the_layer(net, td):
    """PnPXAI takes the gradient of the attention's own output: the same for every class."""
    one, other = (TransformerAttribution(net, Target("logits", i))(td.copy())["attribution", "tokens"] for i in (0, 1))
    assert (one - other).abs().max() > 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_hugging_face(name, implementation):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "GPT2Model":
        small = {"n_embd": 8, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, name.replace("Model", "Config"))(vocab_size=20, **small, attn_implementation="eager")
    body = getattr(transformers, name)(config).double().eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    td = TensorDict(ids=torch.randint(0, 20, (2, 5)), mask=mask, batch_size=[2])
    with torch.no_grad():
        weights = body(input_ids=td["ids"], attention_mask=mask, output_attentions=True).attentions
    total = torch.eye(5, dtype=torch.float64)
    for layer in weights:
        total = 0.5 * (layer.mean(1) + torch.eye(5, dtype=torch.float64)) @ total
    body.set_attn_implementation(implementation)
    module = TensorDictModule(
        Outputs(body), {"ids": "input_ids", "mask": "attention_mask"}, ["hidden"], out_to_in_map=False
    )
    found = AttentionRollout(module, "ids", token=2)(td.copy())["attribution", "ids"]
    torch.testing.assert_close(found, total[:, 2])
    assert found[1, 3:].abs().max() == 0
    explain = TransformerAttribution(module, Target("hidden", (2, 3)), "ids", token=2)
    relevant = explain(td)["attribution", "ids"]
    assert relevant[1, 3:].abs().max() == 0
    assert relevant[0].min() > 0 or name == "GPT2Model"
    assert (relevant[:, 2] >= 1).all()


class Outputs(nn.Module):
    """A keyword-only model whose output is a dataclass, down to one entry of it."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *, input_ids, attention_mask):
        return self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def test_bad_input(net, td):
    target = Target("logits", 0)
    for options in (
        {"residual": 2.0},
        {"fusion": "sum"},
        {"discard": 1.0},
        {"token": 1.5},
        {"layers": []},
        {"layers": ["a"]},
    ):
        with pytest.raises(BadValue):
            AttentionRollout(net, **options)
    with pytest.raises(BadKey, match="does not read"):
        AttentionRollout(net, "ids")
    with pytest.raises(BadType, match="no option"):
        TransformerAttribution(net, target, residual=0.5)
    with pytest.raises(BadType, match="composite"):
        TransformerAttribution(net, target, relevance="lrp")
    with pytest.raises(BadValue, match="no such layer"):
        AttentionRollout(net, layers=[3])(td.copy())
    with pytest.raises(BadValue, match="no such token"):
        AttentionRollout(net, token=5)(td.copy())
    net.train()
    with pytest.raises(BadValue, match="drops at random"):
        AttentionRollout(net)(td.copy())
    mlp = TensorDictModule(nn.Linear(8, 3).double(), ["tokens"], ["logits"])
    with pytest.raises(BadValue, match="no attention weights"):
        AttentionRollout(mlp)(td.copy())
    cross = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    module = TensorDictModule(lambda x: cross(x[:, :2], x, x)[0], ["tokens"], ["y"])
    with pytest.raises(BadValue, match="among the same tokens"):
        AttentionRollout(module)(td.copy())
