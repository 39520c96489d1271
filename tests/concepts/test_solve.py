"""linear_fit: the optimum of every column, as scikit-learn and the normal equations find it."""

import pytest
import torch

from tdconcepts.concepts.solve import _is_faster, _Rough, linear_fit
from tdconcepts.errors import BadValue


def data(n=200, features=12, columns=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=g, dtype=torch.float64) * torch.linspace(0.1, 5, features) + 2
    y = (x @ torch.randn(features, columns, generator=g).double() + torch.randn(n, columns, generator=g) > 5).double()
    return x, y


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_logistic_fits_are_scikit_learns(ridge):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = data()
    fit = linear_fit(x, y, ridge, tolerance=1e-9)
    for c in range(5):
        peer = linear_model.LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000).fit(x.numpy(), y[:, c].numpy())
        torch.testing.assert_close(fit.weight[c], torch.from_numpy(peer.coef_[0]), atol=1e-4, rtol=1e-3)
        assert fit.bias[c].item() == pytest.approx(peer.intercept_[0], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("loss", ["logistic", "squares"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_at_the_optimum_the_gradient_is_zero(loss, missing):
    x, y = data(columns=4)
    y = y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < missing, torch.nan)
    fit = linear_fit(x, y, 0.7, loss, tolerance=1e-9)
    w, b = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    total = 0.35 * w.square().sum()
    for c in range(4):
        rows = ~y[:, c].isnan()
        s, wanted = x[rows] @ w[c] + b[c], y[rows, c]
        total = (
            total
            + (torch.nn.functional.softplus(s) - wanted * s if loss == "logistic" else (s - wanted) ** 2 / 2).sum()
        )
    total.backward()
    assert w.grad.abs().max() < 1e-6
    assert b.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", ["logistic", "squares"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [200, 60])
def test_rounded_rows_lead_to_the_same_optimum(monkeypatch, loss, dtype, iterations):
    """With a mean of a hundred deviations, features of other scales and labels that are missing."""
    x, y = data(columns=4)
    x[:, 3] += 100 * x[:, 3].std()
    x[:, 5] *= 1e-3
    y[:70, 2] = torch.nan
    x, y, tolerance = x.to(dtype), y.to(dtype), 1e-9 if dtype is torch.float64 else 1e-4
    used = []
    along = _Rough.along
    monkeypatch.setattr(
        "tdconcepts.concepts.solve._Rough.along", lambda self, w, out: used.append(1) or along(self, w, out)
    )
    found = []
    for rough in (False, True):
        monkeypatch.setattr("tdconcepts.concepts.solve._is_faster", lambda x, columns, rough=rough: rough)
        found.append(linear_fit(x, y, 0.7, loss, iterations, tolerance))
        assert bool(used) is rough
        assert found[-1].gradient <= tolerance
    scores = [x @ fit.weight.mT + fit.bias for fit in found]
    torch.testing.assert_close(*scores, atol=100 * tolerance, rtol=100 * tolerance)


def test_a_large_fit_takes_the_fast_way_where_there_is_one(monkeypatch):
    x, asked = torch.zeros(1000, 200), {}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: asked)
    assert not _is_faster(x, 100)
    asked["avx512_bf16"] = True
    assert _is_faster(x, 100)
    assert not _is_faster(x, 10)


def test_a_column_does_not_depend_on_the_others():
    x, y = data()
    together, alone = linear_fit(x, y, tolerance=1e-9), linear_fit(x, y[:, 2:3], tolerance=1e-9)
    torch.testing.assert_close(together.weight[2:3], alone.weight, atol=1e-6, rtol=1e-5)


def test_separable_rows_in_single_precision():
    x = torch.tensor([[-1.0], [-2], [3], [4]])
    fit = linear_fit(x, (x > 0).float(), 1e-3)
    assert fit.weight.isfinite().all()
    assert ((x @ fit.weight.T + fit.bias > 0) == (x > 0)).all()
    assert fit.gradient <= 1e-4


def test_more_features_than_rows():
    x, y = data(30, 80)
    assert linear_fit(x, y, 1.0, tolerance=1e-8).gradient <= 1e-8
    with pytest.raises(BadValue, match="a ridge above 0"):
        linear_fit(x, y, 0.0, "squares")
