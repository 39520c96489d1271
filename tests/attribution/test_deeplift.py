"""DeepLIFT: Captum 0.9 where it is right, completeness of models, rows alone, sites, functions, many baselines."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.attribution import DeepLift, DeepLiftShap
from tdconcepts.errors import BadKey, BadType, BadValue


def captum(name):
    return getattr(oracle("captum.attr"), name)


def of_captum(explain, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explain.attribute(*args, **kwargs).detach()


@pytest.fixture
def mlp():
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)]
    return TensorDictModule(nn.Sequential(*layers).double(), ["x"], ["logits"])


@pytest.fixture
def cnn():
    layers = [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ELU(), nn.Flatten(), nn.Linear(4, 3)]
    return TensorDictModule(nn.Sequential(*layers).double(), ["x"], ["logits"])


def given(*shape, base=True):
    td = TensorDict(x=torch.randn(shape, dtype=torch.float64), batch_size=shape[:1])
    return td.set(("baseline", "x"), torch.randn(shape, dtype=torch.float64)) if base else td


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_deep_lift_of_captum(name, request):
    model = request.getfixturevalue(name)
    td = given(5, 4) if name == "mlp" else given(5, 2, 7, 7)
    theirs = of_captum(captum("DeepLift")(model.module), td["x"], td["baseline", "x"], target=2)
    found = DeepLift(model, Target("logits", 2), convergence_delta=True)(td)
    torch.testing.assert_close(found["attribution", "x"], theirs)
    assert found["convergence_delta", "x"].abs().max() < 1e-14


@pytest.mark.parametrize("layers", [[nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2, 1)]])
def test_max_pools_that_captum_gets_wrong(layers):
    """After a ReLU, and with overlapping windows: its own delta says so; ours is zero."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), *layers, nn.Flatten(), nn.LazyLinear(3)).double()
    td = given(5, 2, 7, 7)
    net(td["x"])
    theirs = of_captum(captum("DeepLift")(net), td["x"], td["baseline", "x"], target=2)
    delta = theirs.flatten(1).sum(1) - (net(td["x"]) - net(td["baseline", "x"]))[:, 2]
    found = DeepLift(TensorDictModule(net, ["x"], ["logits"]), Target("logits", 2), convergence_delta=True)(td)
    assert delta.abs().max() > 0.05
    assert found["convergence_delta", "x"].abs().max() < 1e-14


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_layer_deep_lift_of_captum(mlp, layer):
    td = given(5, 4)
    explain = captum("LayerDeepLift")(mlp.module, mlp.module[layer])
    theirs = of_captum(explain, td["x"], td["baseline", "x"], target=1)
    found = DeepLift(mlp, Target("logits", 1), Site(str(layer)))(td)["attribution", str(layer)]
    torch.testing.assert_close(found, theirs)


def test_neuron_deep_lift_of_captum(mlp):
    td = given(5, 4)
    explain = captum("NeuronDeepLift")(mlp.module, mlp.module[2])
    theirs = of_captum(explain, td["x"], 3, td["baseline", "x"])
    found = DeepLift(mlp, Target(Site("2"), 3))(td)["attribution", "x"]
    torch.testing.assert_close(found, theirs)


def test_deep_lift_shap_of_captum(mlp):
    td, rows = given(5, 4, base=False), torch.randn(7, 4, dtype=torch.float64)
    theirs = of_captum(captum("DeepLiftShap")(mlp.module), td["x"], rows, target=0)
    baselines = TensorDict(x=rows, batch_size=[7])
    found = DeepLiftShap(mlp, Target("logits", 0), baselines=baselines, convergence_delta=True)(td)
    torch.testing.assert_close(found["attribution", "x"], theirs)
    assert found["convergence_delta", "x"].abs().max() < 1e-14


@pytest.mark.parametrize("layer", [1, 4])
def test_layer_and_neuron_deep_lift_shap_of_captum(mlp, layer):
    td, rows = given(5, 4, base=False), torch.randn(7, 4, dtype=torch.float64)
    baselines = TensorDict(x=rows, batch_size=[7])
    theirs = of_captum(captum("LayerDeepLiftShap")(mlp.module, mlp.module[layer]), td["x"], rows, target=0)
    found = DeepLiftShap(mlp, Target("logits", 0), Site(str(layer)), baselines=baselines)(td.copy())
    torch.testing.assert_close(found["attribution", str(layer)], theirs)
    theirs = of_captum(captum("NeuronDeepLiftShap")(mlp.module, mlp.module[layer]), td["x"], 2, rows)
    found = DeepLiftShap(mlp, Target(Site(str(layer)), 2), baselines=baselines)(td)["attribution", "x"]
    torch.testing.assert_close(found, theirs)


class Functional(nn.Module):
    """Functions, a layer used twice, an in-place operation, a gate and a softmax."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.inner(x))
        h = torch.tanh(self.inner(h))
        h = F.silu(self.inner(h), inplace=True) * h.sigmoid()
        return self.outer(F.gelu(h)).softmax(-1)


def test_functions_and_layers_used_twice():
    model = TensorDictModule(Functional().double(), ["x"], ["logits"])
    td = given(6, 4)
    found = DeepLift(model, Target("logits", [0, 2]), convergence_delta=True)(td)
    assert found["convergence_delta", "x"].abs().max() < 1e-15
    change = model.module(td["x"]) - model.module(td["baseline", "x"])
    torch.testing.assert_close(found["attribution", "x"].sum(-1), change[:, [0, 2]].detach())
    alone = torch.stack([DeepLift(model, Target("logits", [0, 2]))(td[i])["attribution", "x"] for i in range(6)])
    torch.testing.assert_close(found["attribution", "x"], alone)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_transformer_encoder_is_complete(first, frozen):
    """Wherever it keeps the batch, and also where torch would take its fused fast path."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=first, activation="gelu")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.encoder(x) if first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
            return self.head(x.mean(1))

    model = TensorDictModule(Net().double().eval().requires_grad_(not frozen), ["x"], ["logits"])
    found = DeepLift(model, Target("logits", 1), convergence_delta=True)(given(3, 5, 8))
    assert found["convergence_delta", "x"].abs().max() < 1e-14
    assert found["attribution", "x"].abs().sum() > 0.1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_net_is_complete(kind):
    layer, head = kind(4, 5, num_layers=2, batch_first=True).double(), nn.Linear(5, 3).double()
    model = TensorDictModule(lambda x: head(layer(x)[0][:, -1]), ["x"], ["logits"])
    found = DeepLift(model, Target("logits", [2, 0]), convergence_delta=True)(given(3, 6, 4))
    assert found["convergence_delta", "x"].abs().max() < 1e-14
    assert found["attribution", "x"].abs().sum() > 0.01


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_hugging_face_at_the_embeddings(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "GPT2Model":
        small = {"n_embd": 8, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, name.replace("Model", "Config"))(vocab_size=20, **small, attn_implementation="eager")
    body = getattr(transformers, name)(config).double().eval()
    module = TensorDictModule(_Last(body), in_keys={"ids": "input_ids"}, out_keys=["hidden"], out_to_in_map=False)
    td = TensorDict(ids=torch.randint(0, 20, (2, 5)), batch_size=[2])
    site = Site("body.embeddings.word_embeddings" if name == "BertModel" else "body.wte")
    td["baseline", str(site)] = torch.zeros(2, 5, 8, dtype=torch.float64)
    found = DeepLift(module, Target("hidden", (0, 3)), site, convergence_delta=True)(td)
    assert found["convergence_delta", str(site)].abs().max() < 1e-12
    assert found["attribution", str(site)].abs().sum() > 0.1


class _Last(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *, input_ids):
        return self.body(input_ids=input_ids).last_hidden_state


def test_a_softmax_does_not_depend_on_the_batch(mlp):
    """Captum 0.9 subtracts a mean over the batch: relative error up to 1."""
    model = TensorDictModule(nn.Sequential(mlp.module, nn.Softmax(-1)), ["x"], ["p"])
    td = given(6, 4)
    found = DeepLift(model, Target("p", 0))(td)["attribution", "x"]
    alone = DeepLift(model, Target("p", 0))(td[:1].copy())["attribution", "x"]
    torch.testing.assert_close(found[:1], alone)
    explain = captum("DeepLift")(model.module)
    theirs, solo = (of_captum(explain, td["x"][:n], td["baseline", "x"][:n], target=0) for n in (6, 1))
    assert (theirs[:1] - solo).abs().max() > 1e-4


def test_derivatives_of_the_explanation(mlp):
    """With create_graph they are those of its own values: finite differences."""
    td = given(1, 4)
    explain = DeepLift(mlp, Target("logits", 1), create_graph=True)
    x = td["x"].requires_grad_()
    found = explain(td.set("x", x))["attribution", "x"].square().sum()
    (gradient,) = torch.autograd.grad(found, x)
    for i in range(4):
        step = torch.zeros(1, 4, dtype=torch.float64)
        step[0, i] = 1e-6
        up, down = (
            DeepLift(mlp, Target("logits", 1))(td.copy().set("x", x.detach() + s))["attribution", "x"].square().sum()
            for s in (step, -step)
        )
        torch.testing.assert_close((up - down) / 2e-6, gradient[0, i], rtol=1e-5, atol=1e-7)


def test_draws_of_baselines(mlp):
    td, rows = given(3, 4, base=False), TensorDict(x=torch.randn(7, 4, dtype=torch.float64), batch_size=[7])

    def explain(**options):
        g = torch.Generator().manual_seed(0)
        made = DeepLiftShap(mlp, Target("logits", [0, 1]), baselines=rows, n_samples=4, generator=g, **options)
        return made(td.copy())["attribution", "x"]

    assert torch.equal(explain(), explain())
    torch.testing.assert_close(explain(), explain(chunk_size=2))
    assert explain().shape == (3, 2, 4)


def test_bad_input(mlp):
    target, rows = Target("logits", 0), TensorDict(x=torch.zeros(2, 4), batch_size=[2])
    for options in ({"epsilon": -1.0}, {"epsilon": "x"}, {"on_missing": "warn"}):
        with pytest.raises(BadValue):
            DeepLift(mlp, target, **options)
    with pytest.raises(BadType, match="TensorDict"):
        DeepLiftShap(mlp, target, baselines=torch.zeros(2, 4))
    with pytest.raises(BadValue, match="batch size"):
        DeepLiftShap(mlp, target, baselines=rows[0])
    with pytest.raises(BadKey, match="baselines"):
        DeepLiftShap(mlp, target, baselines=TensorDict(z=torch.zeros(2, 4), batch_size=[2]))
    with pytest.raises(BadValue, match="number of samples"):
        DeepLiftShap(mlp, target, baselines=rows, n_samples=0)
    with pytest.raises(BadValue, match="another shape"):
        DeepLiftShap(mlp, target, baselines=TensorDict(x=torch.zeros(2, 3), batch_size=[2]))(given(3, 4, base=False))
    model = TensorDictModule(lambda x: torch.cumprod(x, -1), ["x"], ["logits"])
    with pytest.raises(BadValue, match="can't follow the operation 'cumprod'"):
        DeepLift(model, target)(given(2, 5))
