"""Spectra of neighbourhoods against numpy's covariance, and counts that no rounding changes."""

import numpy as np
import pytest
import torch

from tdconcepts.errors import BadValue
from tdconcepts.representations.dimension import local_pca
from tdconcepts.representations.sets import nearest, offsets
from tdconcepts.representations.spectra import count_large, spectra


def points(n=60, width=6):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).double()
    return x * torch.linspace(1, 0.1, width).double()


@pytest.mark.parametrize(("k", "width"), [(4, 9), (9, 4), (6, 6)])
def test_they_are_the_eigenvalues_of_the_covariance(k, width):
    x = points(30, width)
    place = nearest(x, k)
    found = spectra(offsets(x, place))
    assert found.shape == (30, min(k, width))
    for i, row in enumerate(place):
        cov = np.cov(x[[i, *row.tolist()]].numpy().T)
        expected = np.linalg.eigvalsh(cov)[::-1][: min(k, width)].copy()
        torch.testing.assert_close(found[i], torch.from_numpy(expected))


@pytest.mark.parametrize("scale", [1e-150, 1e-25, 1.0, 1e30, 1e150])
def test_counts_are_those_of_double_precision(scale):
    """A share that lies on an eigenvalue, a hair above or below: float32 can't tell them apart."""
    x = points()
    values = spectra(offsets(x, nearest(x, 10)))[0]
    for rank, value in enumerate(values[1:], 2):
        for nudge, count in ((1 - 1e-9, rank), (1 + 1e-9, rank - 1)):
            assert local_pca(scale * x, 10, alpha=float(value / values[0]) * nudge)[0] == count


def test_counts_where_float32_has_no_squares():
    x = points()
    both = torch.cat([10 + x, 1e-22 * x])
    assert torch.equal(local_pca(both, 59)[60:], local_pca(x, 59))


def test_duplicates_are_refused():
    x = torch.cat([points(), torch.ones(12, 6).double()])
    d = offsets(x, nearest(x, 5))
    for act in (spectra, lambda d: count_large(d, 0.05)):
        with pytest.raises(BadValue, match="12 points whose neighbours are all duplicates"):
            act(d)
