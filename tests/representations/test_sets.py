"""Neighbours against scipy's distances, and what a set of points is."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.representations import CKA, TwoNN, sets
from tdconcepts.representations.sets import nearest, neighbours, offsets, squared


def test_neighbours_are_those_of_all_distances(monkeypatch):
    distance = pytest.importorskip("scipy.spatial.distance")
    x = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0)).double() + 1000
    expected = torch.stack([torch.from_numpy(distance.squareform(distance.pdist(one.numpy()))) for one in x])
    for elements in (1, 700, 10**9):
        monkeypatch.setattr(sets, "_ELEMENTS", elements)
        far, who = neighbours(x, 6)
        expected.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        best = expected.topk(6, largest=False)
        torch.testing.assert_close(far, best.values)
        assert torch.equal(who, best.indices)
        assert torch.equal(offsets(x, who)[1, 3, 2], x[1, who[1, 3, 2]] - x[1, 3])
        torch.testing.assert_close(
            torch.cat([part for _, part in squared(x - 1000)], -2).sqrt()[0, 0, 1:], expected[0, 0, 1:]
        )


@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 1), (9, 2), (16, 4), (50, 3), (61, 7), (200, 199)])
def test_the_nearest_of_groups_are_the_nearest(n, k):
    x = torch.randn(3, n, 2, generator=torch.Generator().manual_seed(n)).double()
    distance = torch.cdist(x, x).diagonal_scatter(torch.full((3, n), torch.inf).double(), dim1=1, dim2=2)
    expected = distance.topk(k, largest=False).indices.sort(-1).values
    assert torch.equal(nearest(x, k).sort(-1).values, expected)


def test_the_nearest_are_distinct_among_duplicates():
    who = nearest(torch.zeros(50, 3), 5)
    assert all(len({*row, point}) == 6 for point, row in enumerate(who.tolist()))


def test_duplicates_are_at_no_distance():
    x = torch.randn(10, 4).repeat(2, 1) + 1e3
    assert (neighbours(x, 1)[0] == 0).all()


def test_the_batch_is_a_set_or_each_row_holds_one():
    x = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(0)).double()
    each = TwoNN("x", within=True)(TensorDict(x=x, batch_size=[3]))["dimension", "x"]
    for i in range(3):
        alone = TwoNN("x")(TensorDict(x=x[i], batch_size=[30]))["dimension", "x"]
        assert alone.shape == (30,)
        torch.testing.assert_close(alone, each[i].expand(30))
    shaped = TwoNN("x")(TensorDict(x=x[0].reshape(5, 6, 4), batch_size=[5, 6]))["dimension", "x"]
    torch.testing.assert_close(shaped, each[0].expand(5, 6))


@pytest.mark.parametrize(
    ("stage", "x", "error", "text"),
    [
        (TwoNN("x"), torch.ones(5, 2, dtype=torch.int64), BadType, "int64"),
        (TwoNN("x"), torch.ones(5, 2, 2), BadValue, "no vectors"),
        (TwoNN("x", within=True), torch.ones(5, 2), BadValue, "no sets"),
        (TwoNN("x", within=True), torch.ones(5, 2, 2, dtype=torch.int64), BadType, "no points"),
        (TwoNN("x"), torch.ones(2, 2), BadValue, "too few points"),
        (TwoNN("x"), torch.full((5, 2), float("nan")), BadValue, "'x' is not finite"),
        (CKA("x", "y"), torch.ones(5, 2), BadKey, "'y'"),
    ],
)
def test_bad_points(stage, x, error, text):
    with pytest.raises(error, match=text):
        stage(TensorDict(x=x, batch_size=[len(x)]))
