"""RSA and information imbalance against scipy and the definitions."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.representations import RSA, InformationImbalance
from tdconcepts.representations.geometry import DISTANCES, dissimilarities, information_imbalance, ranks


def make(n=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator).double()
    return TensorDict(x=x, y=torch.tanh(x[:, :3]) + 0.3 * torch.randn(n, 3, generator=generator), batch_size=[n])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("compare", ["spearman", "pearson"])
def test_rsa_equals_scipys_parts(distance, compare):
    far, stats = pytest.importorskip("scipy.spatial.distance"), pytest.importorskip("scipy.stats")
    td = make()
    rdm = [far.pdist(td[key].numpy(), distance) for key in "xy"]
    torch.testing.assert_close(dissimilarities(td["x"], distance), torch.from_numpy(rdm[0]))
    expected = (stats.spearmanr if compare == "spearman" else stats.pearsonr)(*rdm).statistic
    assert float(RSA("x", "y", distance, compare)(td)["metric", "rsa"][0]) == pytest.approx(expected, abs=1e-10)


def test_many_points_take_products_of_matrices():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double() + 50
    one, other = torch.triu_indices(300, 300, 1)
    torch.testing.assert_close(dissimilarities(x, "euclidean"), (x[one] - x[other]).norm(dim=-1))


def test_equal_values_share_ranks():
    stats = pytest.importorskip("scipy.stats")
    values = torch.randint(0, 5, (3, 30), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(ranks(values), torch.from_numpy(stats.rankdata(values.numpy(), axis=-1)))


@pytest.mark.parametrize("k", [1, 3])
def test_information_imbalance_is_the_mean_rank(k):
    td = make()
    d = {key: torch.cdist(td[key], td[key]) for key in "xy"}
    total = 0
    for i in range(20):
        near = [j for j in d["x"][i].argsort().tolist() if j != i][:k]
        order = [j for j in d["y"][i].argsort().tolist() if j != i]
        total += sum(order.index(j) + 1 for j in near)
    assert float(information_imbalance(td["x"], td["y"], k)) == pytest.approx(2 / 20 * total / (20 * k))
    found = InformationImbalance("x", "y", k)(td)["metric", "information_imbalance"]
    assert float(found["a_to_b"][0]) == pytest.approx(2 / 20 * total / (20 * k))
    torch.testing.assert_close(found["b_to_a"][0], information_imbalance(td["y"], td["x"], k))


def test_what_contains_what():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=generator).double()
    other = torch.rand(400, 2, generator=generator).double()
    assert information_imbalance(x, 3 * x) == 2 / 400
    assert information_imbalance(x, x[:, :1]) < 0.1 < 0.3 < information_imbalance(x[:, :1], x)
    assert 0.85 < information_imbalance(x, other) < 1.15


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda td: RSA("x", distance="far"), "no such comparison"),
        (lambda td: RSA("x", compare="most"), "no such comparison"),
        (lambda td: dissimilarities(td["x"], "far"), "no such distance"),
        (lambda td: RSA("x", "c")(td), "no direction"),
        (lambda td: RSA("x", "c", "euclidean")(td), "equally far"),
        (lambda td: RSA("x")(td[:2]), "too few"),
        (lambda td: InformationImbalance("x", k=0), "neighbours"),
        (lambda td: InformationImbalance("x")(td[:2]), "too few"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(BadValue, match=text):
        act(make().set("c", torch.ones(20, 2)))
