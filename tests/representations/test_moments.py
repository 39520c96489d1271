"""Moments: merging in any order and shape is exact; ridge in closed form."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts.errors import BadType, BadValue
from tdconcepts.representations.moments import Moments, merged, solve_ridge


def data(n=37, width=4, labels=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator).double() + 100.0
    return x, torch.randn(n, labels, generator=generator).double() - 7.0


@given(st.lists(st.integers(0, 37), max_size=5))
def test_parts_add_up_to_the_whole(cuts):
    x, y = data()
    cuts = sorted({0, 37, *cuts})
    parts = [Moments.of(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    for order in (parts, parts[::-1]):
        m = merged(order)
        joint = torch.cat([x, y], -1).T.cov()
        assert m.count == 37
        assert torch.allclose(m.mean, x.mean(0))
        assert torch.allclose(m.covariance(), joint[:4, :4])
        assert torch.allclose(m.cross / 36, joint[:4, 4:])
        assert torch.allclose(m.label_scatter / 36, joint[4:, 4:])
        assert torch.allclose(m.label_mean, y.mean(0))


def test_an_empty_part_changes_nothing():
    x, y = data()
    m = Moments.of(x, y) + Moments.of(x[:0], y[:0])
    assert m.count == 37
    assert torch.equal(m.scatter, Moments.of(x, y).scatter)


def test_stacks_and_workers():
    x, y = data()
    stack = torch.stack([x, 2 * x, x - 1])
    m = Moments.of(stack, y)
    assert torch.allclose(m.scatter[1], 4 * Moments.of(x).scatter)
    assert torch.allclose(m.cross[1], 2 * Moments.of(x, y).cross)
    there = pickle.loads(pickle.dumps(m)) + m
    assert there.count == 74
    assert torch.allclose(there.scatter, 2 * m.scatter)


def test_far_from_zero_nothing_cancels():
    x = torch.randn(1000, 2).double() + 1e7
    parts = merged(Moments.of(part) for part in x.split(100))
    assert torch.allclose(parts.covariance(), (x - 1e7).T.cov(), rtol=1e-6)


def test_principal_axes():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x, _ = data()
    values, axes = Moments.of(x).principal(3)
    oracle = decomposition.PCA(3).fit(x.numpy())
    assert torch.allclose(values, torch.from_numpy(oracle.explained_variance_))
    assert torch.allclose(axes.T.abs(), torch.from_numpy(oracle.components_).abs(), atol=1e-8)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_ridge_is_the_normal_equation_and_falls_back_to_the_least_norm():
    x, y = data()
    m = Moments.of(x, y)
    expected = torch.linalg.inv(m.scatter + 2.0 * torch.eye(4)) @ m.cross
    assert torch.allclose(solve_ridge(m.scatter, m.cross, 2.0), expected)
    twice = Moments.of(torch.cat([x, x], -1), y)
    centred = torch.cat([x, x], -1) - torch.cat([x, x], -1).mean(0)
    assert torch.allclose(solve_ridge(twice.scatter, twice.cross, 0.0), torch.linalg.pinv(centred) @ (y - y.mean(0)))


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: Moments.of(torch.ones(3, 2, dtype=torch.int64)), BadType, "int64"),
        (lambda: Moments.of(torch.ones(3)), BadValue, "don't fit"),
        (lambda: Moments.of(torch.ones(3, 2), torch.ones(4, 1)), BadValue, "don't fit"),
        (lambda: Moments.of(torch.ones(3, 2)) + Moments.of(torch.ones(3, 1)), BadValue, "don't add up"),
        (lambda: Moments.of(torch.ones(1, 2)).covariance(), BadValue, "too few rows"),
        (lambda: merged([]), BadValue, "no data"),
    ],
)
def test_bad_input(act, error, text):
    with pytest.raises(error, match=text):
        act()
