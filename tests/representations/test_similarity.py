"""CKA and CCA against the definitions of the papers and scikit-learn; streams against the whole."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadType, BadValue
from tdconcepts.representations import CCA, CKA, SVCCA
from tdconcepts.representations.moments import Moments
from tdconcepts.representations.similarity import canonical_correlations, cka, hsic


def make(n=50):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator).double()
    y = torch.cat([x[:, :2] @ torch.randn(2, 3, generator=generator).double(), x], -1)
    y = y + torch.randn(n, 7, generator=generator)
    return TensorDict(x=x + 3, y=y, z=torch.randn(n, 3, generator=generator).double(), batch_size=[n])


def test_linear_cka_is_kornbliths():
    td = make()
    x, y = (td[k] - td[k].mean(0) for k in "xy")
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(cka(td["x"], td["y"]), expected)
    torch.testing.assert_close(CKA("x", "y")(td)["metric", "cka"], expected.expand(50))


@pytest.mark.parametrize("bandwidth", [0.5, 1.0])
def test_rbf_cka_and_biased_hsic_are_the_traces(bandwidth):
    distance = pytest.importorskip("scipy.spatial.distance")
    td = make()
    grams = []
    for key in "xy":
        d = torch.from_numpy(distance.pdist(td[key].numpy()))
        sigma = bandwidth * d.sort().values[(len(d) - 1) // 2]
        grams.append((-(torch.from_numpy(distance.squareform(d)) ** 2) / (2 * sigma**2)).exp())
    k, l = grams
    h = torch.eye(50).double() - 1 / 50
    traces = [(a @ h @ b @ h).trace() / 49**2 for a, b in ((k, l), (k, k), (l, l))]
    torch.testing.assert_close(hsic(td["x"], td["y"], "rbf", bandwidth), traces[0])
    torch.testing.assert_close(cka(td["x"], td["y"], "rbf", bandwidth), traces[0] / (traces[1] * traces[2]).sqrt())


def test_unbiased_hsic_is_the_mean_over_quadruples():
    """Song et al., theorem 2: the average of h(i, j, q, r) over distinct i, j, q, r."""
    import itertools

    x, y = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    k, l = ((v - v.mean(0)) @ (v - v.mean(0)).T for v in (x, y))
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    torch.testing.assert_close(hsic(x, y, unbiased=True), torch.stack(terms).mean())


def test_what_cka_does_not_see():
    td = make()
    q = torch.linalg.qr(torch.randn(4, 4).double()).Q
    for kernel in ("linear", "rbf"):
        torch.testing.assert_close(cka(5 * td["x"] @ q + 1, td["y"], kernel), cka(td["x"], td["y"], kernel))
    assert cka(td["x"] @ torch.diag(torch.tensor([9.0, 1, 1, 1])).double(), td["x"]) < 0.9
    assert abs(cka(td["x"], td["z"], unbiased=True)) < 0.1 < cka(td["x"], td["z"])


def test_over_a_stream():
    td = make(90)
    whole = cka(td["x"], td["y"])
    for step in (90, 31, 2):
        torch.testing.assert_close(CKA("x", "y").over(td.split(step)), whole)
    parts = [[hsic(p[a], p[b], unbiased=True) for p in td.split(30)] for a, b in ("xy", "xx", "yy")]
    xy, xx, yy = (torch.stack(part).mean() for part in parts)
    torch.testing.assert_close(CKA("x", "y", unbiased=True).over(td.split(30)), xy / (xx * yy).sqrt())
    assert CKA("x", "y", kernel="rbf").over(td.split(30)) > 0
    torch.testing.assert_close(CCA("x", "y").over(iter(td.split(7))), CCA("x", "y")(td)["metric", "cca"][0])


def test_lists_give_all_pairs():
    td = make()
    table = CKA(["x", "y"], ["z", "x", "y"])(td)["metric", "cka"]
    assert table.shape == (50, 2, 3)
    for i, a in enumerate("xy"):
        for j, b in enumerate("zxy"):
            torch.testing.assert_close(table[0, i, j], cka(td[a], td[b]))
    torch.testing.assert_close(CKA(["x", "y"], ["z", "x", "y"]).over([td]), table[0])
    assert CCA(["x", "y"])(td)["metric", "cca"].shape == (50, 2, 2)


def test_canonical_correlations_equal_scikit_learns():
    decomposition = pytest.importorskip("sklearn.cross_decomposition")
    td = make()
    model = decomposition.CCA(4, scale=False, max_iter=10000, tol=1e-12)
    u, v = (torch.from_numpy(part) for part in model.fit_transform(td["x"].numpy(), td["y"].numpy()))
    expected = torch.stack([torch.stack([u[:, i], v[:, i]]).corrcoef()[0, 1] for i in range(4)])
    rho, _ = canonical_correlations(Moments.of(td["x"], td["y"]))
    torch.testing.assert_close(rho, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(CCA("x", "y")(td)["metric", "cca"][0], expected.mean(), atol=1e-6, rtol=0)


def test_svcca_is_cca_of_the_principal_axes():
    td = make()
    scaled = td.clone().set("x", td["x"] * torch.tensor([10.0, 5, 0.1, 0.01]).double())
    kept = {}
    for key in "xy":
        v = scaled[key] - scaled[key].mean(0)
        u, s, _ = torch.linalg.svd(v, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        kept[key] = u[:, : int((share < 0.99).sum()) + 1]
    expected = torch.linalg.svdvals(kept["x"].T @ kept["y"]).sum() / min(k.shape[1] for k in kept.values())
    torch.testing.assert_close(SVCCA("x", "y")(scaled)["metric", "svcca"][0], expected)


def test_projection_weights_are_morcos():
    td = make()
    x, y = (td[k] - td[k].mean(0) for k in "xy")
    qx, qy = (torch.linalg.qr(v).Q for v in (x, y))
    u, rho, _ = torch.linalg.svd(qx.T @ qy, full_matrices=False)
    h = qx @ u
    alpha = (h.T @ x).abs().sum(-1)
    expected = (alpha * rho).sum() / alpha.sum()
    torch.testing.assert_close(CCA("x", "y", weighting="projection")(td)["metric", "cca"][0], expected)


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda td: CKA("x", kernel="cubic"), BadValue, "kernel"),
        (lambda td: CKA("x", "c")(td), BadValue, "constant"),
        (lambda td: CKA("x", "c", kernel="rbf")(td), BadValue, "constant"),
        (lambda td: CKA("x", unbiased=True)(td[:3]), BadValue, "too few"),
        (lambda td: CKA("x").over([]), BadValue, "no data"),
        (lambda td: CKA("x", within=True).over(td), BadType, "within"),
        (lambda td: CCA("x", variance=2.0), BadValue, "variance"),
        (lambda td: CCA("x", weighting="most"), BadValue, "weighting"),
        (lambda td: CCA("x", "y")(td[:7]), BadValue, "all be 1"),
        (lambda td: CCA("x", "c")(td), BadValue, "constant"),
    ],
)
def test_bad_input(act, error, text):
    with pytest.raises(error, match=text):
        act(make().set("c", torch.ones(50, 2)))
