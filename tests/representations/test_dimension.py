"""Intrinsic dimension: the definitions point by point, and data whose dimension is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.representations import CAPCA, LocalKNN, LocalPCA, TwoNN
from tdconcepts.representations.dimension import ca_pca, local_knn, local_pca, two_nn


def noisy(n=400, noise=0.01, within=32, d=3):
    """Three dimensions in thirty-two, with one per cent of noise."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(within, within, generator=generator)).Q[:d]
    x = torch.randn(n, d, generator=generator) @ axes + noise * torch.randn(n, within, generator=generator)
    return x.double()


def far(x):
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(-1)


def test_three_dimensions_in_thirty_two_with_noise_are_three():
    x = noisy()
    td = TensorDict(x=x, batch_size=[400])
    assert round(float(TwoNN("x", blocks=4)(td.clone())["dimension", "x"][0])) == 3
    assert 3.3 < float(TwoNN("x")(td.clone())["dimension", "x"][0]) < 3.7  # the noise is nearer than most neighbours
    assert round(float(LocalKNN("x", average=True)(td.clone())["dimension", "x"][0])) == 3
    for criterion in ("ratio", "maxgap"):
        assert (LocalPCA("x", criterion=criterion)(td.clone())["dimension", "x"] == 3).all()
    found = CAPCA("x")(td.clone())["dimension", "x"]
    assert found.median() == 3
    assert round(float(CAPCA("x", average=True)(td)["dimension", "x"][0])) == 3


@pytest.mark.parametrize("n", [200, 800, 3200])
def test_three_dimensions_with_noise_are_three_at_any_density(n):
    """The more points, the nearer are neighbours to the noise: what each estimator's option is for."""
    x = noisy(n)
    assert 2.5 < float(two_nn(x, blocks=n // 200)) < 3.5
    assert 2.8 < float(local_knn(x, 20, True)) < 3.4
    assert ca_pca(x).median() == 3
    assert (local_pca(x) == 3).all()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_flat_cubes(d):
    x = torch.rand(1000, d, generator=torch.Generator().manual_seed(0)).double() @ torch.eye(d, d + 4).double()
    assert abs(float(two_nn(x)) - d) < 0.12 * d
    assert abs(float(local_knn(x, 20, True)) - d) < 0.2 * d
    assert (local_pca(x) == d).double().mean() > 0.95
    assert (local_pca(x, criterion="maxgap") == d).all()
    assert float(ca_pca(x).mean()) == pytest.approx(d, abs=0.35)


def test_two_nn_is_the_papers_fit():
    x = noisy(60)
    d, _ = far(x)
    mu = (d[:, 2] / d[:, 1]).sort().values
    for discard in (0.0, 0.1, 0.5):
        kept = min(math.floor((1 - discard) * 60), 59)
        a = mu[:kept].log()
        b = torch.tensor([-math.log(1 - (i + 1) / 60) for i in range(kept)]).double()
        torch.testing.assert_close(two_nn(x, discard), torch.linalg.lstsq(a.unsqueeze(-1), b).solution[0])


def test_local_knn_is_levina_and_bickels_estimate():
    x, k = noisy(50), 7
    d, _ = far(x)
    each = torch.stack([1 / torch.stack([(row[k] / row[j]).log() for j in range(1, k)]).mean() for row in d])
    torch.testing.assert_close(local_knn(x, k), each)
    torch.testing.assert_close(local_knn(x, k, True), 1 / (1 / each).mean())


def slow_spectrum(points):
    return torch.linalg.svdvals(points - points.mean(0)) ** 2 / (len(points) - 1)


@pytest.mark.parametrize("width", [3, 6, 40])
def test_local_pca_point_by_point(width):
    x = (
        torch.randn(50, width, generator=torch.Generator().manual_seed(1)).double()
        * torch.logspace(0, -2, width).double()
    )
    k = 10
    _, order = far(x)
    ratio, gap = local_pca(x, k, alpha=0.1), local_pca(x, k, "maxgap")
    for i in range(50):
        values = slow_spectrum(x[order[i, : k + 1]])[: min(k, width)]
        assert ratio[i] == (values >= 0.1 * values[0]).sum()
        assert gap[i] == (values[:-1] / values[1:]).argmax() + 1


def test_ca_pca_point_by_point():
    x, k = noisy(60, 0.1, 8), 12
    d, order = far(x)
    found = ca_pca(x, k)
    for i in range(60):
        values = slow_spectrum(x[order[i, : k + 1]]) / (0.5 * (d[i, k] + d[i, k + 1])) ** 2
        costs = []
        for n in range(1, len(values) + 1):
            tail = values[n:].sum()
            ideal = torch.full((n,), 1 / (n + 2)).double() - (3 * n + 4) / (n * (n + 4)) * tail
            costs.append(float((ideal - values[:n]).norm() + 2 * tail))
        assert found[i] == 1 + min(range(len(costs)), key=costs.__getitem__)


def test_curvature_is_adjusted_for():
    """The spectrum of a piece of a cylinder is what the correction says, and a paraboloid counts as two-dimensional."""
    generator = torch.Generator().manual_seed(0)
    along, angle = (torch.rand(2, 300_000, generator=generator).double() - 0.5) * 2.2
    cylinder = torch.stack([along, 2 * (angle / 2).sin(), 2 * (angle / 2).cos() - 2], -1)
    values = slow_spectrum(cylinder[cylinder.norm(dim=-1) < 1.0])
    c = (3 * 2 + 4) / (2 * 6)
    assert float(values[:2].mean()) < 1 / 4 - 2e-3
    assert float(values[:2].mean() + c * values[2]) == pytest.approx(1 / 4, abs=1e-3)
    xy = torch.rand(1500, 2, generator=generator).double() * 2 - 1
    bent = torch.cat([xy, 0.5 * xy.square().sum(-1, keepdim=True)], -1)
    assert ca_pca(bent, 60).mean() < 2.1


@pytest.mark.parametrize(
    ("bends", "ratio"),
    [
        ((0.15,), 7 / 4),
        ((0.15, 0.0), 10 / 12),
        ((0.15, -0.15), 1 / 4),
        ((0.15, 0.15), 2.0),
        ((0.15, 0.0, 0.0), 13 / 24),
        ((0.1,) * 5, 11 / 4),
    ],
    ids=["curve", "cylinder", "saddle", "sphere", "one of three", "sphere of five"],
)
def test_the_spectrum_of_a_quadratic_patch(bends, ratio):
    """What the docstring derives, beside points drawn from the patch (by area) and from the flat one."""
    b, d = torch.tensor(bends).double(), len(bends)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, d, generator=generator).double()
    x *= torch.rand(len(x), 1, generator=generator).double() ** (1 / d) / x.norm(dim=-1, keepdim=True)
    height = x.square() @ b
    area = (1 + (2 * x * b).square().sum(-1)).sqrt() * (x.square().sum(-1) + height.square() <= 1)

    def along_and_across(points, weight):
        weight = weight / weight.sum()
        points = points - weight @ points
        values = torch.linalg.eigvalsh(points.T @ (weight.unsqueeze(-1) * points)).flip(-1)
        return values[:d].mean(), values[d:].sum()

    along, across = along_and_across(torch.cat([x, height.unsqueeze(-1)], -1), area)
    missing = along_and_across(x, torch.ones_like(height))[0] - along
    f, t = b.square().sum(), b.sum().square()
    assert float(missing) == pytest.approx(float((2 * d * f + (d + 4) * t) / (d * (d + 2) ** 2 * (d + 4))), rel=0.07)
    assert float(across) == pytest.approx(float((2 * (d + 2) * f - 2 * t) / ((d + 2) ** 2 * (d + 4))), rel=0.07)
    assert float(missing / across) == pytest.approx(ratio, rel=0.05)


def test_blocks_are_sets_of_their_own():
    x = noisy(90)
    expected = torch.stack([two_nn(x[i : 87 + i : 3]) for i in range(3)]).mean()
    torch.testing.assert_close(two_nn(x[:89], blocks=3), expected)


def test_exact_rank_is_the_dimension_of_maxgap():
    x = torch.randn(60, 2).double() @ torch.randn(2, 9).double()
    assert (local_pca(x, 10, "maxgap") == 2).all()
    assert (local_pca(torch.randn(60, 1).double(), 10, "maxgap") == 1).all()


@given(st.floats(0.1, 100.0), st.integers(0, 100))
def test_scale_rotation_and_shift_change_nothing(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 4, generator=generator).double()
    moved = scale * x @ torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q + 3
    torch.testing.assert_close(two_nn(moved), two_nn(x))
    torch.testing.assert_close(local_knn(moved, 5), local_knn(x, 5))
    assert torch.equal(local_pca(moved, 5), local_pca(x, 5))


def test_duplicates_do_not_count():
    x = noisy(100)
    more = torch.cat([x, x[:3]])
    assert float(two_nn(more)) == pytest.approx(float(two_nn(x[3:])), rel=0.2)
    assert local_knn(more, 10).isfinite().all()


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda x: two_nn(x, 1.0), "discard"),
        (lambda x: TwoNN("x", 1.0), "discard"),
        (lambda x: TwoNN("x", blocks=0), "blocks"),
        (lambda x: two_nn(x, blocks=4), "too few points"),
        (lambda x: two_nn(torch.ones(9, 2).double()), "all the same"),
        (lambda x: local_knn(x, 1), "neighbours"),
        (lambda x: local_knn(x, 9), "too few points"),
        (lambda x: local_knn(torch.ones(9, 2).double(), 3), "all the same"),
        (lambda x: local_pca(x, 4, "most"), "criterion"),
        (lambda x: LocalPCA("x", alpha=1.0), "criterion"),
        (lambda x: local_pca(torch.ones(9, 2).double(), 3), "is one point"),
        (lambda x: ca_pca(x, 8), "too few points"),
        (lambda x: CAPCA("x", k=1), "neighbours"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(BadValue, match=text):
        act(torch.randn(9, 2).double())
