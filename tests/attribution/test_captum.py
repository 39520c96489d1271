"""Captum 0.9 for what the other files leave open: gradient SHAP on given draws, layers and neurons by perturbation."""

import functools
import warnings

import numpy
import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.attribution import ExpectedGradients
from tdconcepts.hooks.drawing import Source
from tdconcepts.perturbation import FeatureAblation, FeaturePermutation, Lime, ShapleySampling


@pytest.fixture
def mlp():
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3))
    return TensorDictModule(layers.double(), ["x"], ["logits"])


@pytest.fixture
def td():
    return TensorDict(x=torch.randn(3, 4, dtype=torch.float64), batch_size=[3])


def of_captum(name, *args, x, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(oracle("captum.attr"), name)(*args).attribute(x, **kwargs).detach()


class Draws:
    """A source that gives what it was told."""

    def __init__(self, rows, places):
        self.rows, self.places = rows, places

    def choices(self, weights, count):
        return self.rows

    def uniform(self, count):
        return self.places


@pytest.mark.parametrize("kind", ["", "Layer", "Neuron"])
def test_gradient_shap_on_the_same_draws(mlp, td, monkeypatch, kind):
    """Captum draws for each row and sample (sample after sample, of one row); here rows share the draws."""
    rows, places = torch.tensor([4, 0, 2, 2]), torch.tensor([0.1, 0.7, 0.4, 0.9])
    data = torch.randn(5, 4, dtype=torch.float64)
    monkeypatch.setattr(numpy.random, "choice", lambda count, size: numpy.tile(rows.numpy(), size // 4))
    monkeypatch.setattr(numpy.random, "uniform", lambda low, high, size: numpy.tile(places.numpy(), size // 4))
    layer, site = mlp.module[2], Site("2")
    more = {"neuron_selector": 3} if kind == "Neuron" else {"target": 1}
    args = [mlp.module, *([layer] if kind else [])]
    theirs = of_captum(f"{kind}GradientShap", *args, x=td["x"], baselines=data, n_samples=4, stdevs=0.0, **more)
    target, wrt = Target(site, 3) if kind == "Neuron" else Target("logits", 1), site if kind == "Layer" else "x"
    explain = ExpectedGradients(mlp, target, wrt, baselines=TensorDict(x=data, batch_size=[5]), n_samples=4)
    explain._source = Draws(rows, places)
    found = explain(td)["attribution", str(wrt)]
    torch.testing.assert_close(found, theirs, atol=1e-7, rtol=1e-5)  # theirs takes places in single precision


def test_layer_feature_ablation(mlp, td):
    mask = torch.tensor([0, 0, 1, 2, 1])
    theirs = of_captum(
        "LayerFeatureAblation", mlp.module, mlp.module[2], x=td["x"], target=1, layer_baselines=0.5, layer_mask=mask
    )
    explain = FeatureAblation(mlp, Target("logits", 1), Site("2"), baseline=0.5, mask={"2": mask})
    torch.testing.assert_close(explain(td)["attribution", "2"], theirs)


def test_neuron_feature_ablation(mlp, td):
    theirs = of_captum("NeuronFeatureAblation", mlp.module, mlp.module[2], x=td["x"], neuron_selector=3)
    found = FeatureAblation(mlp, Target(Site("2"), 3))(td)["attribution", "x"]
    torch.testing.assert_close(found, theirs)


def test_layer_feature_permutation(mlp, td, monkeypatch):
    """Captum's order is handed over by the function that permutes: its layer form takes none as an argument.

    With a target it fails (it selects it twice), so the model has one output.
    """
    model = nn.Sequential(*mlp.module, nn.Linear(3, 1).double())
    orders = iter(Source(torch.Generator().manual_seed(0)).permutations(5, 3))

    def shuffle(x, mask):
        changed, chosen, order = x.clone(), mask.squeeze(0).bool(), next(orders)
        changed[:, chosen] = x[order][:, chosen]
        return changed

    attributor = functools.partial(oracle("captum.attr").FeaturePermutation, perm_func=shuffle)
    monkeypatch.setattr(oracle("captum.attr").LayerFeaturePermutation, "attributor", attributor)
    theirs = of_captum("LayerFeaturePermutation", model, model[2], x=td["x"])
    module, g = TensorDictModule(model, ["x"], ["y"]), torch.Generator().manual_seed(0)
    ours = FeaturePermutation(module, Target("y"), Site("2"), generator=g)
    torch.testing.assert_close(ours(td)["attribution", "2"], theirs)


def test_shapley_sampling_on_the_same_permutations(mlp, td, monkeypatch):
    """With enough draws both are near the exact value; on an additive model both are it at once."""
    linear = TensorDictModule(nn.Linear(4, 3).double(), ["x"], ["logits"])
    theirs = of_captum("ShapleyValueSampling", linear.module, x=td["x"], target=1, n_samples=2)
    found = ShapleySampling(linear, Target("logits", 1), n_samples=2)(td.copy())["attribution", "x"]
    torch.testing.assert_close(found, theirs.double(), atol=1e-6, rtol=1e-5)


def test_lime_of_a_linear_model():
    """Captum's surrogate is a lasso, ours a ridge; without a penalty both find the coefficients of a linear model."""
    linear_model = pytest.importorskip("captum._utils.models.linear_model").SkLearnLinearRegression
    linear = TensorDictModule(nn.Linear(4, 3).double(), ["x"], ["logits"])
    td = TensorDict(x=torch.randn(2, 4, dtype=torch.float64), batch_size=[2])
    theirs = of_captum("Lime", linear.module, linear_model(), x=td["x"], target=1, n_samples=40)
    explain = Lime(linear, Target("logits", 1), n_samples=40, alpha=0.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(explain(td)["attribution", "x"], theirs.double(), atol=1e-5, rtol=1e-5)
