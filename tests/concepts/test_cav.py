"""ConceptActivationVectors: hyperplanes that separate, missing labels, every kind of concept."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts.cav import ConceptActivationVectors
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadType, BadValue

SPEC = ConceptSpec(["a", "b", "c"], [1, 3, 1], ["binary", "categorical", "continuous"])


def data(n=300):
    z = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([(z[:, 0] > 0.2).float(), z[:, 1:4].argmax(1).float(), 3 * z[:, 4] - 1], 1)
    return z, labels


def fitted(**options):
    cavs = ConceptActivationVectors(6, SPEC)
    return cavs, cavs.fit(*data(), **options)


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
def test_each_column_finds_its_direction(solver):
    cavs, fit = fitted(solver=solver, ridge=0.1)
    assert (fit.score[[0, 1, 2, 3]] > 0.85).all()
    assert fit.score[4] > 0.999
    vectors = cavs.vectors
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    assert vectors[0, 0] > 0.9
    for state in range(3):
        others = torch.full((6,), 0.0)
        others[1:4] = -1.0
        others[1 + state] = 2.0
        assert torch.cosine_similarity(vectors[1 + state], others, 0) > 0.9
    assert vectors[4, 4] > 0.999
    assert cavs.bias[4].item() == pytest.approx(-1, abs=0.02)


def test_ridge_by_the_normal_equations():
    z, labels = data()
    cavs, _ = fitted(solver="ridge", ridge=2.0)
    wide, signs = z.double(), 2 * SPEC.targets(labels).double() - 1
    signs[:, 4] = labels[:, 2].double()
    centred = wide - wide.mean(0)
    w = torch.linalg.solve(centred.T @ centred + 2 * torch.eye(6), centred.T @ (signs - signs.mean(0)))
    torch.testing.assert_close(cavs.weight.double(), w.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cavs.bias.double(), signs.mean(0) - wide.mean(0) @ w, atol=1e-5, rtol=1e-4)


def test_missing_labels_take_no_part():
    z, labels = data()
    gone = torch.zeros(300, dtype=torch.bool)
    gone[::3] = True
    holes = labels.clone()
    holes[gone, 0] = torch.nan
    one, two = ConceptActivationVectors(6, SPEC), ConceptActivationVectors(6, SPEC)
    one.fit(z, holes, tolerance=1e-7)
    two.fit(z[~gone], labels[~gone], tolerance=1e-7)
    torch.testing.assert_close(one.weight[0], two.weight[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(one.weight[1:], two.weight[1:], atol=1e-3)


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_as_a_stage(batch):
    cavs, _ = fitted()
    td = TensorDict({"latent": torch.randn(*batch, 6)}, batch)
    out = cavs(td)["concepts_logits"]
    torch.testing.assert_close(out, td["latent"] @ cavs.weight.T + cavs.bias)
    cavs.distance = True
    torch.testing.assert_close(cavs(td)["concepts_logits"], out / cavs.weight.norm(dim=1))


def test_copies_pickles_and_state_dicts_are_fitted():
    cavs, _ = fitted()
    loaded = ConceptActivationVectors(6, SPEC)
    loaded.load_state_dict(cavs.state_dict())
    for other in (copy.deepcopy(cavs), pickle.loads(pickle.dumps(cavs)), loaded):
        assert torch.equal(other.vectors, cavs.vectors)
    z, labels = data()
    stacked = ConceptActivationVectors(6, SPEC)
    stacked.fit(z.reshape(3, 100, 6), labels.reshape(3, 100, 3))
    torch.testing.assert_close(stacked.weight, cavs.weight)


def test_where_weights_are_zero_there_is_no_direction_and_no_distance():
    cavs = ConceptActivationVectors(6, ["a"], distance=True)
    cavs.fit(torch.ones(10, 6), (torch.arange(10) % 2).float().unsqueeze(1))
    assert torch.equal(cavs.weight, torch.zeros(1, 6))
    assert torch.equal(cavs.vectors, torch.zeros(1, 6))
    assert torch.equal(cavs(latent=torch.randn(2, 6)), torch.zeros(2, 1))


def test_a_fit_in_inference_mode_can_be_loaded_into_and_learnt_through():
    cavs, _ = fitted()
    other = ConceptActivationVectors(6, SPEC)
    with torch.inference_mode():
        other.fit(*data())
    torch.testing.assert_close(other.state_dict(), cavs.state_dict())
    z = torch.ones(1, 6, requires_grad=True)
    other(latent=z).sum().backward()
    torch.testing.assert_close(z.grad[0], cavs.weight.sum(0))
    other.load_state_dict({key: value + 1 for key, value in cavs.state_dict().items()})
    assert torch.equal(other.bias, cavs.bias + 1)


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
def test_autocast_takes_no_digits(solver):
    cavs, fit = fitted(solver=solver)
    other = ConceptActivationVectors(6, SPEC)
    with torch.autocast("cpu", torch.bfloat16):
        found = other.fit(*data(), solver=solver)
    torch.testing.assert_close(other.state_dict(), cavs.state_dict())
    torch.testing.assert_close(found, fit)


def test_latents_with_a_large_mean():
    z, labels = data()
    cavs, far = ConceptActivationVectors(6, SPEC), ConceptActivationVectors(6, SPEC)
    torch.testing.assert_close(far.fit(z + 2000, labels).score, cavs.fit(z, labels).score, atol=1e-2, rtol=0)
    torch.testing.assert_close(far.vectors, cavs.vectors, atol=1e-3, rtol=0)


@pytest.mark.parametrize("wrong", [[torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.inf, torch.nan]])
def test_a_label_that_is_not_finite(wrong):
    z, labels = data()
    labels[: len(wrong), 2] = torch.tensor(wrong)
    cavs = ConceptActivationVectors(6, SPEC)
    with pytest.raises(BadValue, match="not finite\n  got:     inf for 'c'"):
        cavs.fit(z, labels)
    assert not cavs.fitted


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c, z, y: c(z), BadValue, "not fitted"),
        (lambda c, z, y: c.vectors, BadValue, "not fitted"),
        (lambda c, z, y: c.fit(z, y.index_fill(1, torch.tensor(0), 1)), BadValue, "'a', 300 labels that are all alike"),
        (lambda c, z, y: c.fit(z, y.index_fill(1, torch.tensor(0), torch.nan)), BadValue, "'a', 0 labels"),
        (lambda c, z, y: c.fit(z.index_fill(0, torch.tensor(0), torch.inf), y), BadValue, "finite"),
        (lambda c, z, y: c.fit(z.half(), y), BadType, "float16"),
        (lambda c, z, y: c.fit(z[:, :5], y), BadValue, r"\[\*B, 6\]"),
        (lambda c, z, y: c.fit(z, y[:, :2]), BadValue, r"\[300, 2\]"),
        (lambda c, z, y: c.fit(z[:0], y[:0]), BadValue, "0 rows"),
        (lambda c, z, y: c.fit(z, y, solver="svm"), BadValue, "svm"),
        (lambda c, z, y: c.fit(z, y, ridge=-1.0), BadValue, "-1.0"),
        (lambda c, z, y: c.fit(z, y, ridge=torch.inf), BadValue, "ridge=inf"),
        (lambda c, z, y: c.fit(z, y, iterations=-1), BadValue, "iterations=-1"),
    ],
)
def test_bad_input(call, error, text):
    cavs = ConceptActivationVectors(6, ConceptSpec(SPEC.names, [1, 3, 2], SPEC.kinds)) if "300, 2" in text else None
    with pytest.raises(error, match=text):
        call(cavs or ConceptActivationVectors(6, SPEC), *data())


def test_the_score_is_over_the_labels_that_are_known():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    labels = torch.stack([(x[:, 0] + 0.8 * torch.randn(40, generator=g) > 1).float(), x[:, 1] + 2], -1)
    labels[25:, 0], labels[:15, 1] = torch.nan, torch.nan
    labels[20:, 1] += 0.7 * torch.randn(20, generator=g)
    stage = ConceptActivationVectors(3, ConceptSpec(["a", "b"], [1, 1], ["binary", "continuous"]))
    score = stage.fit(x, labels).score
    found = stage(x)
    assert score[0] == ((found[:25, 0] > 0) == (labels[:25, 0] > 0.5)).float().mean()
    some = labels[15:, 1]
    expected = 1 - (found[15:, 1] - some).square().sum() / (some - some.mean()).square().sum()
    torch.testing.assert_close(score[1], expected)


def test_a_fit_takes_as_many_steps_as_it_may_and_no_more_than_it_needs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    labels = (x[:, :1] + torch.randn(60, 1, generator=g) > 0).float()
    fits = [
        ConceptActivationVectors(4, ["a"]).fit(x, labels, **options)
        for options in ({"iterations": 1}, {"tolerance": 0.1}, {"tolerance": 1e-6})
    ]
    assert fits[0].iterations == 1
    assert fits[1].iterations < fits[2].iterations
    assert fits[2].gradient <= 1e-6
