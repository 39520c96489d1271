"""Encoders: linear, MLP, exogenous embeddings, Gaussian draws; each re-derived."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict

from tdconcepts.concepts.encoders import ConceptEncoder, ExogenousEncoder, StochasticEncoder, mlp, one_pair
from tdconcepts.errors import BadKey, BadType, BadValue


def stochastic(covariance="diagonal", **options):
    torch.manual_seed(0)
    return StochasticEncoder(4, ["a", "b", "c"], covariance, **options)


def test_linear_and_mlp():
    x = torch.randn(5, 4)
    linear, deep = ConceptEncoder(4, ["a", "b"]), ConceptEncoder(4, ["a", "b"], [7, 6])
    torch.testing.assert_close(linear(latent=x), x @ linear.layers.weight.T + linear.layers.bias)
    first, _, second, _, third = deep.layers
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    torch.testing.assert_close(deep(latent=x), hidden @ third.weight.T + third.bias)


def test_exogenous_embeddings_are_one_dense_layer_each():
    model, x = ExogenousEncoder(4, 3, 5), torch.randn(6, 4)
    out = model(latent=x)
    for t in range(5):
        weight, bias = model.linear.weight[3 * t : 3 * t + 3], model.linear.bias[3 * t : 3 * t + 3]
        torch.testing.assert_close(out[:, t], F.leaky_relu(x @ weight.T + bias))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_draws_have_the_mean_and_the_covariance_that_are_written(covariance):
    model = stochastic(covariance, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4)
    mean, scale, draws = model(latent=x.expand(40_000, 4))
    root = torch.diag(scale[0]) if covariance == "diagonal" else scale[0]
    assert (root.tril() == root).all()
    assert (root.diagonal() > 0).all()
    torch.testing.assert_close(draws.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(draws.T.cov(), root @ root.T, atol=0.03, rtol=0)


def test_the_factor_of_the_covariance_one_entry_at_a_time():
    model, z = stochastic("full", draw="never"), torch.randn(4)
    raw, scale = model.scale(z).reshape(3, 3), model(latent=z)[1]
    for i in range(3):
        for j in range(3):
            expected = raw[i, j] if j < i else F.softplus(raw[i, i]) + 1e-3 if i == j else torch.tensor(0.0)
            torch.testing.assert_close(scale[i, j], expected)


def test_a_draw_is_reparameterised_by_hand():
    model, x = stochastic(generator=torch.Generator().manual_seed(1)), torch.randn(5, 4)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    scale = F.softplus(model.scale(x)) + 1e-3
    out = model(latent=x)
    torch.testing.assert_close(out[2], model.mean(x) + scale * noise)
    out[2].sum().backward()
    torch.testing.assert_close(model.mean.bias.grad, torch.full((3,), 5.0))
    assert model.scale.bias.grad.abs().max() > 0


def test_draws_in_training_only_unless_asked_and_never_from_the_global_generator():
    x, state = torch.randn(2, 4), torch.get_rng_state()
    model = stochastic(generator=torch.Generator().manual_seed(1))
    torch.set_rng_state(state)
    mean, _, drawn = model(latent=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mean, drawn)
    assert torch.equal(*model.eval()(latent=x)[::2])
    model.draw = "always"
    assert not torch.equal(*model(latent=x)[::2])
    model.train().draw = "never"
    assert torch.equal(*model(latent=x)[::2])


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(
    "build", [lambda: ConceptEncoder(4, ["a", "b", "c"]), lambda: ExogenousEncoder(4, 2, 3), lambda: stochastic("full")]
)
def test_any_batch_and_dtype(batch, dtype, build):
    model = build().to(dtype)
    td = model(TensorDict({"latent": torch.randn(*batch, 4).to(dtype)}, batch))
    for key in model.out_keys:
        assert td[key].dtype is dtype
        assert td[key].shape[: len(batch) + 1] == (*batch, 3)
        assert td[key].isfinite().all()


def test_nested_keys_copies_and_pickles():
    model = StochasticEncoder(4, ["a"], keys={("agents", "z"): ("agents", "c_logits")}, draw="never")
    assert model.out_keys == [("agents", "c_mean"), ("agents", "c_scale"), ("agents", "c_logits")]
    drawing = stochastic(generator=torch.Generator().manual_seed(4))
    copies, x = [copy.deepcopy(drawing), pickle.loads(pickle.dumps(drawing))], torch.randn(2, 4)
    expected = drawing(latent=x)[2]
    assert all(torch.equal(other(latent=x)[2], expected) for other in copies)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: ConceptEncoder(0, ["a"]), BadValue, "width 0"),
        (lambda: ConceptEncoder(4, ["a"], [2.0]), BadValue, "width 1"),
        (lambda: ConceptEncoder(4, ["a"], keys={"a": "b", "c": "d"}), BadValue, "read: write"),
        (lambda: ExogenousEncoder(4, 0, 3), BadValue, "exogenous_size"),
        (lambda: StochasticEncoder(4, ["a"], "low rank"), BadValue, "low rank"),
        (lambda: StochasticEncoder(4, ["a"], draw="now"), BadValue, "now"),
        (lambda: StochasticEncoder(4, ["a"], generator=3), BadType, "generator"),
        (lambda: ConceptEncoder(4, ["a"])(latent=torch.zeros(3)), BadValue, r"\[\*B, 4\]"),
        (lambda: ConceptEncoder(4, ["a"])(latent=torch.zeros(4, dtype=torch.int)), BadType, "int32"),
        (lambda: ExogenousEncoder(4, 1, 1)(TensorDict({"latents": torch.zeros(4)})), BadKey, "did you mean 'latents'"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_the_parts():
    assert one_pair({("a", "b"): "c"}) == (("a", "b"), "c")
    assert [type(layer).__name__ for layer in mlp(2, [3], 1)] == ["Linear", "ReLU", "Linear"]


def test_a_logit_without_a_draw_has_memory_of_its_own():
    mean, _, logits = StochasticEncoder(4, ["a", "b"], draw="never")(torch.ones(3, 4))
    assert torch.equal(mean, logits)
    assert mean.data_ptr() != logits.data_ptr()
