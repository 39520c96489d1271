"""Principal axes against scikit-learn, over streams too."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.representations import PCA


def make(n=80):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).double()
    return TensorDict(x=x * torch.tensor([5.0, 3, 2, 1, 0.1]).double() + 9, z=x[:, :2].clone(), batch_size=[n])


@pytest.mark.parametrize("components", [None, 2, 0.9])
@pytest.mark.parametrize("whiten", [False, True])
def test_it_equals_scikit_learns(components, whiten):
    decomposition = pytest.importorskip("sklearn.decomposition")
    td = make()
    oracle = decomposition.PCA(components, whiten=whiten).fit_transform(td["x"].numpy())
    stage = PCA(["x", "z"], components, whiten) if components != 2 else PCA("x", 2, whiten)
    for data in (td, list(td.split(17)), iter(td.split(17))):
        found = stage.fit(data)(td.clone())["pca", "x"]
        torch.testing.assert_close(found.abs(), torch.from_numpy(oracle).abs())


def test_whitened_rows_have_unit_covariance():
    td = make()
    found = PCA("x", whiten=True).fit(td)(td.reshape(8, 10))["pca", "x"]
    torch.testing.assert_close(found.flatten(0, 1).T.cov(), torch.eye(5).double())


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: PCA("x", 0), "number of axes"),
        (lambda: PCA("x", 1.5), "number of axes"),
        (lambda: PCA("x", 9).fit(make()), "fewer features"),
        (lambda: PCA("x").fit(make()[:1]), "too few rows"),
        (lambda: PCA("x", whiten=True).fit(make().set("x", torch.ones(80, 3))), "without variance"),
        (lambda: PCA("x").fit([]), "no data"),
        (lambda: PCA("x").fit(make())(TensorDict(x=torch.ones(2, 3), batch_size=[2])), "another width"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(BadValue, match=text):
        act()
