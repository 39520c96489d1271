"""Unmodified transformers: Hugging Face models from small random configurations, and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from lrp.cases import close
from lrp.nets import as_td
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.errors import BadType
from tdconcepts.lrp import CPLRP, LRP, AttnLRP

SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0}


class Classifier(nn.Module):
    """The logits of one token, or of the row, from token numbers and a padding mask."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits if logits.ndim == 2 else logits[torch.arange(len(ids)), mask.sum(1) - 1]


def gpt2(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation=attention, **SIZES
    )
    return Classifier(transformers.GPT2LMHeadModel(config)), "model.transformer.wte"


def llama(attention):
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, attn_implementation=attention, **heads, **SIZES
    )
    return Classifier(transformers.LlamaForCausalLM(config)), "model.model.embed_tokens"


def bert(attention):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
    config = transformers.BertConfig(vocab_size=31, hidden_size=16, attn_implementation=attention, **sizes)
    return Classifier(transformers.BertForSequenceClassification(config)), "model.bert.embeddings.word_embeddings"


def built(make, attention, bias=True):
    """A model with weights of size one; without biases also without embeddings of positions."""
    torch.manual_seed(0)
    net, site = make(attention)
    net = net.double().eval()
    for name, p in net.named_parameters():
        absorbs = name.endswith("bias") or "wpe" in name or "position_emb" in name or "token_type" in name
        if "norm" in name.lower() or "ln_" in name:
            nn.init.uniform_(p, 0.5, 1.5)
        else:
            nn.init.normal_(p, std=0.3)
        if absorbs and not bias:
            nn.init.zeros_(p)
    return TensorDictModule(net, ["ids", "mask"], ["logits"]), Site(site)


def tokens():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(0))
    return TensorDict(ids=ids, mask=mask, batch_size=[2])


MODELS = [gpt2, llama, bert]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", MODELS)
def test_conservation_without_biases(make, attention):
    (net, site), td = built(make, attention, bias=False), tokens()
    for convention in ("gradient", "relevance"):
        out = LRP(net, CPLRP(), Target("logits", 1), site, convention=convention, outputs=True)(td.copy())
        kept = out["attribution", site.key].sum((1, 2)) / out["logits"][:, 1]
        assert (kept - 1).abs().max() < 1e-5
        assert (out["attribution", site.key][0, 5:] == 0).all()


@pytest.mark.parametrize("composite", [AttnLRP(), CPLRP()], ids=["AttnLRP", "CPLRP"])
@pytest.mark.parametrize("make", MODELS)
def test_eager_and_fused_attention_padding_and_conventions_agree(make, composite):
    td, found = tokens(), {}
    for attention in ("eager", "sdpa"):
        net, site = built(make, attention)
        for convention in ("gradient", "relevance"):
            explainer = LRP(net, composite, Target("logits", 1), site, convention=convention)
            found[attention, convention] = explainer(td.copy())["attribution", site.key]
        alone = TensorDict(ids=td["ids"][:1, :5], mask=td["mask"][:1, :5], batch_size=[1])
        short = LRP(net, composite, Target("logits", 1), site)(alone)["attribution", site.key]
        close(found[attention, "gradient"][:1, :5], short, 1e-8)
    whole = found["eager", "gradient"]
    close(found["sdpa", "gradient"], whole, 2e-6)  # the eager attention of Llama has its softmax in float32
    close(found["eager", "relevance"], whole, 1e-5)
    close(found["sdpa", "relevance"], whole, 1e-5)


def halved(a, b):
    """Two factors of a product, half of whose flow goes on."""
    return a / 2 + (a / 2).detach(), b / 2 + (b / 2).detach()


def normed(x, norm):
    scale = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias


def identity(x, value):
    """A function's value, whose flow is that of ``x`` times the constant ``f(x) / x``."""
    return x * (value / x).detach()


def slow_bert(model, x, mask, heads):
    """A BERT classifier, with the changes of the efficient AttnLRP made by hand (Achtibat et al., 2024)."""
    bert, lengths = model.bert, x.shape[1]
    add = bert.embeddings
    x = x + add.token_type_embeddings.weight[0] + add.position_embeddings.weight[:lengths]
    x = normed(x, add.LayerNorm)
    for layer in bert.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (own.query, own.key, own.value))
        q, k = halved(q, k)
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
        weights, v = halved(weights, v)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = normed(x + out.dense(mixed), out.LayerNorm)
        up = layer.intermediate.dense(x)
        x = normed(x + layer.output.dense(identity(up, F.gelu(up))), layer.output.LayerNorm)
    pooled = bert.pooler.dense(x[:, 0])
    return model.classifier(identity(pooled, torch.tanh(pooled)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_efficient_attnlrp_gradient(attention):
    (net, site), td = built(bert, attention), tokens()
    model = net.module.model
    x = model.bert.embeddings.word_embeddings(td["ids"]).detach().requires_grad_()
    value = slow_bert(model, x, td["mask"], 2)
    out = LRP(net, AttnLRP(), Target("logits", [0, 1, 2]), site, outputs=True)(td)
    assert value.allclose(out["logits"])
    for target in range(3):
        (ratio,) = torch.autograd.grad(value[:, target].sum(), x, retain_graph=True)
        close(out["attribution", site.key][:, target], x * ratio, 1e-6)


def test_a_model_called_with_embeddings_of_its_own():
    """Embeddings depend on parameters alone, and are what is explained all the same."""
    (net, site), td = built(gpt2, "sdpa"), tokens()
    wanted = LRP(net, AttnLRP(), Target("logits", 1), site)(td.copy())["attribution", site.key]
    model = net.module.model
    with AttnLRP().on(model) as m:
        embedded = model.transformer.wte(td["ids"])
        logits = m(inputs_embeds=embedded, attention_mask=td["mask"]).logits
        (ratio,) = torch.autograd.grad(logits[torch.arange(2), td["mask"].sum(1) - 1, 1].sum(), embedded)
    close(embedded * ratio, wanted, 1e-9)


def test_token_numbers_are_refused():
    net, _ = built(bert, "sdpa")
    with pytest.raises(BadType, match=r"no gradient[\s\S]*[Ss]ite"):
        LRP(net, AttnLRP(), Target("logits", 1), "ids")(tokens())


class Encoder(nn.Module):
    """torch's own encoder, which in evaluation mode takes a fused path and nested tensors where it can."""

    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), nn.Linear(8, 3)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 4:] = True
        return self.head(self.body(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_of_torch(norm_first, convention):
    torch.manual_seed(0)
    encoder = Encoder(norm_first).double().eval().requires_grad_(False)
    for name, p in encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    net = as_td(encoder)
    td = TensorDict(x=torch.randn(2, 6, 8, dtype=torch.float64), batch_size=[2])
    with torch.no_grad():  # a collector: here the encoder by itself takes the fused path
        out = LRP(net, CPLRP(), Target("logits", 1), convention=convention, outputs=True)(td.copy())
        assert out["logits"].allclose(net(td.copy())["logits"])
    found = out["attribution", "x"]
    assert (found.sum((1, 2)) / out["logits"][:, 1] - 1).abs().max() < 1e-5
    assert (found[0, 4:] == 0).all()
