"""The ridge probe: the closed form, the score on held-out episodes, and the errors."""

import pytest
import torch

from tdconcepts.errors import BadType, BadValue
from tdconcepts.representations.probes import ridge_direction


def data(episodes=6, steps=20, units=5, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(episodes, steps, units, generator=generator) + 2.0
    weight = torch.randn(units, generator=generator)
    return z, z @ weight + 1.0 + noise * torch.randn(episodes, steps, generator=generator), weight


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_the_weights_equal_scikit_learns(ridge):
    linear = pytest.importorskip("sklearn.linear_model")
    z, y, _ = data()
    probe, oracle = ridge_direction(z, y, ridge), linear.Ridge(alpha=ridge).fit(z.flatten(0, 1), y.flatten())
    assert torch.allclose(probe.weight, torch.from_numpy(oracle.coef_).float(), atol=1e-5)
    assert float(probe.bias) == pytest.approx(oracle.intercept_, abs=1e-5)
    assert torch.allclose(probe(z).flatten(), torch.from_numpy(oracle.predict(z.flatten(0, 1))).float(), atol=1e-4)


def test_the_score_equals_a_cross_validation_by_episodes():
    linear, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.model_selection")
    z, y, _ = data(noise=2.0)
    episodes = torch.arange(6).repeat_interleave(20)
    z2, y2, error, spread = z.flatten(0, 1).double(), y.flatten().double(), 0.0, 0.0
    for left in range(3):
        out = episodes % 3 == left
        fit = linear.Ridge(alpha=1e-3).fit(z2[~out], y2[~out])
        error += float((y2[out] - torch.from_numpy(fit.predict(z2[out]))).square().sum())
        spread += float((y2[out] - y2[~out].mean()).square().sum())
    assert metrics is not None
    assert ridge_direction(z, y, folds=3).r2 == pytest.approx(1.0 - error / spread, abs=1e-9)


def test_direction_and_mean():
    z, y, weight = data(noise=0.0)
    probe = ridge_direction(z, y)
    assert torch.allclose(probe.direction, weight / weight.norm(), atol=1e-4)
    assert torch.allclose(probe.mean, z.mean((0, 1)), atol=1e-5)
    assert probe.r2 > 0.999
    assert probe.rows == 120


def test_memorised_episodes_score_nothing():
    """A unit that is constant within an episode tells episodes apart: held-out steps would score 1, episodes don't."""
    names = torch.eye(8).unsqueeze(1).expand(8, 30, 8)
    label = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).expand(8, 30) + 1e-3 * torch.randn(8, 30)
    assert ridge_direction(names, label, folds=8).r2 < 0.1


def test_masked_steps_do_not_count():
    z, y, _ = data()
    mask = torch.ones(6, 20, dtype=torch.bool)
    mask[2, 7:] = False
    mask[4] = False
    expected = ridge_direction(z, y, mask=mask)
    z[~mask], y[~mask] = float("nan"), 1e9
    probe = ridge_direction(z, y, mask=mask)
    assert torch.equal(probe.weight, expected.weight)
    assert probe.r2 == expected.r2
    assert probe.rows == 87
    assert torch.isfinite(probe.weight).all()


def test_nothing_to_find_has_no_direction():
    probe = ridge_direction(torch.zeros(3, 5, 2), torch.randn(3, 5))
    with pytest.raises(BadValue, match="no direction"):
        _ = probe.direction


def test_a_latent_with_equal_units_is_no_problem():
    z, y, _ = data()
    twice = ridge_direction(torch.cat([z, z], -1), y, ridge=0.0)
    assert torch.allclose(twice(torch.cat([z, z], -1)), ridge_direction(z, y, ridge=0.0)(z), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"z": torch.ones(6, 20)}, BadValue, "shapes"),
        ({"y": torch.ones(6, 19)}, BadValue, "shapes"),
        ({"mask": torch.ones(6, 19, dtype=torch.bool)}, BadValue, "shapes"),
        ({"z": torch.ones(6, 20, 5, dtype=torch.int64)}, BadType, "z: torch.int64"),
        ({"y": [1.0]}, BadType, "y: list"),
        ({"mask": "m"}, BadType, "mask: str"),
        ({"ridge": -1.0}, BadValue, "ridge is out of range"),
        ({"folds": 1}, BadValue, "not a number of folds"),
        ({"mask": (torch.arange(6) == 0)[:, None].expand(6, 20)}, BadValue, "held out from itself"),
        ({"z": torch.full((6, 20, 5), float("nan"))}, BadValue, "not finite"),
        ({"y": torch.ones(6, 20)}, BadValue, "constant"),
    ],
)
def test_bad_input(change, error, text):
    z, y, _ = data()
    with pytest.raises(error, match=text):
        ridge_direction(**{"z": z, "y": y} | change)
