"""linear_fit: the optimum of every column, as scikit-learn and the normal equations find it."""

import pytest
import torch

from tdconcepts.concepts.solve import _is_faster, _Problem, linear_fit
from tdconcepts.errors import BadType, BadValue


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
    along = _Problem.along

    def watched(self, w, out):
        used.extend([] if self.rough is None else [1])
        return along(self, w, out)

    monkeypatch.setattr("tdconcepts.concepts.solve._Problem.along", watched)
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


def centred_gradient(x, y, fit, loss):
    """The largest entry of the gradient of the mean loss in each column, with ridge 1 and double numbers."""
    x, known, wanted = x.double(), ~y.isnan(), y.double().nan_to_num()
    s = x @ fit.weight.double().mT + fit.bias.double()
    slope = ((s.sigmoid() if loss == "logistic" else s) - wanted) * known
    found = torch.cat([(x - x.mean(0)).mT @ slope + fit.weight.double().mT, slope.sum(0, keepdim=True)])
    return (found.abs().amax(0) / known.sum(0)).max().item()


@pytest.mark.parametrize("mean", [300.0, 2000.0, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_large_mean_takes_no_digits(mean, missing):
    """Without centring, single precision found a mean of 2000 to have no solution, and its gradient was a wrong one."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=g) + mean
    y = (x[:, :2] - mean + torch.randn(500, 2, generator=g) > 0).float()
    y = y.masked_fill(torch.rand(y.shape, generator=g) < missing, torch.nan)
    before = x.clone()
    fit = linear_fit(x, y)
    assert torch.equal(x, before)
    assert fit.gradient <= 1e-4
    assert centred_gradient(x, y, fit, "logistic") == pytest.approx(fit.gradient, abs=1e-5 + 3e-8 * mean)
    for c in range(2):
        rows = ~y[:, c].isnan()
        shifted = x[rows].double() - mean  # scikit-learn itself does not converge with such means
        peer = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(shifted.numpy(), y[rows, c])
        torch.testing.assert_close(fit.weight[c].double(), torch.from_numpy(peer.coef_[0]), atol=2e-3, rtol=2e-3)
        scores = x[rows].double() @ fit.weight[c].double() + fit.bias[c].double()
        wanted = torch.from_numpy(peer.decision_function(shifted.numpy()))
        torch.testing.assert_close(scores, wanted, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("mean", [1000.0, 1e4])
@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_least_squares_with_a_large_mean(mean, missing):
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 5, generator=g) + mean
    y = (x.double() @ torch.randn(5, 1, generator=g).double()).float()  # its mean is large too
    y = y.masked_fill(torch.rand(y.shape, generator=g) < missing, torch.nan)
    fit, rows = linear_fit(x, y, 1e-3, "squares", tolerance=1e-5), ~y[:, 0].isnan()
    peer = linear_model.Ridge(1e-3).fit(x[rows].double().numpy(), y[rows, 0].double().numpy())
    torch.testing.assert_close(fit.weight[0].double(), torch.from_numpy(peer.coef_), atol=1e-4, rtol=1e-4)
    residual = x[rows].double() @ fit.weight[0].double() + fit.bias[0].double() - y[rows, 0]
    assert residual.square().mean() < 1e-6 * y[rows, 0].var()


@pytest.mark.parametrize("loss", ["logistic", "squares"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_of_another_dtype_than_the_rows(loss, dtype):
    x, y = data(60, 4, 2)
    torch.testing.assert_close(linear_fit(x, y.to(dtype), 1.0, loss), linear_fit(x, y, 1.0, loss))
    single = linear_fit(x.float(), y, 1.0, loss)
    assert single.weight.dtype == single.bias.dtype == torch.float32


def test_autocast_takes_no_digits():
    x, y = data(60, 4, 2)
    x, y = x.float(), y.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_fit(x, y), linear_fit(x, y, loss="squares")
    torch.testing.assert_close(found, (linear_fit(x, y), linear_fit(x, y, loss="squares")))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"ridge": torch.inf}, BadValue, "ridge=inf"),
        ({"ridge": -1.0}, BadValue, "ridge=-1.0"),
        ({"ridge": 1e300}, BadValue, "a finite ridge"),
        ({"iterations": 0}, BadValue, "iterations of 1 or more"),
        ({"iterations": -1}, BadValue, "iterations=-1"),
        ({"tolerance": torch.nan}, BadValue, "tolerance=nan"),
        ({"loss": "hinge"}, BadValue, "hinge"),
        ({"x": torch.ones(4, 1, dtype=torch.int64)}, BadType, "int64"),
        ({"x": torch.tensor([[0.0], [1], [torch.nan], [3]])}, BadValue, "not finite"),
        ({"y": torch.tensor([[0.0], [1], [torch.inf], [3]]), "loss": "squares"}, BadValue, "not finite"),
    ],
)
def test_bad_input(changes, error, text):
    given = {"x": torch.arange(4.0).unsqueeze(1), "y": torch.tensor([[0.0], [0], [1], [1]])}
    with pytest.raises(error, match=text):
        linear_fit(**given | changes)


@pytest.mark.parametrize("value", [0.3, 7.7, 2000.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_feature_that_does_not_vary_takes_a_ridge(value, dtype):
    """Without one, weights of 1e13 came out where rounding left a pivot above 0."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(333, 3, generator=g, dtype=dtype)
    x[:, 1] = value
    y = (x[:, :1] + torch.randn(333, 1, generator=g, dtype=dtype) > 0).to(dtype)
    with pytest.raises(BadValue, match="a ridge above 0"):
        linear_fit(x, y, 0.0, "squares")
    assert linear_fit(x, y, 1e-3, "squares").weight[0, 1].abs() < 1e-3


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_the_gradient_that_is_left_is_said_for_the_worst_column_by_its_own_labels(iterations):
    x, y = data(columns=3)
    y[20:, 1] = torch.nan
    fit = linear_fit(x, y, 0.1, iterations=iterations, tolerance=1e-3)
    known = ~y.isnan()
    slope = torch.where(known, (x @ fit.weight.T + fit.bias).sigmoid() - y.nan_to_num(), 0.0)
    left = torch.cat([(x - x.mean(0)).T @ slope + 0.1 * fit.weight.T, slope.sum(0, keepdim=True)]).abs().amax(
        0
    ) / known.sum(0)
    assert fit.gradient == pytest.approx(left.max().item(), rel=1e-6)
    assert fit.iterations == iterations if iterations < 50 else fit.gradient <= 1e-3


def test_least_squares_in_single_precision_far_from_zero():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + 1000
    fit = linear_fit(x, x @ torch.tensor([[1.0], [2.0]]) - 3000, 0.0, "squares")
    torch.testing.assert_close(fit.weight, torch.tensor([[1.0, 2.0]]), atol=1e-3, rtol=0)
