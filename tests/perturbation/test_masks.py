"""Masks: tiles, dims, shared numbers, and what is no mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdconcepts import Site
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.perturbation import Along, Grid
from tdconcepts.perturbation.masks import check_masks, numbered


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_a_grid_is_a_partition_into_tiles(height, width, down, across):
    ids = Grid((down, across))(torch.Size([2, height, width]))
    assert torch.equal(ids[0], ids[1])
    for y in range(height):
        for x in range(width):
            assert ids[0, y, x] == (y // down) * -(-width // across) + x // across


def test_a_grid_of_one_number_tiles_the_last_dim():
    assert Grid(2)(torch.Size([5])).tolist() == [0, 0, 1, 1, 2]
    assert Grid(2) == Grid((2,))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_along_has_one_group_for_each_index(dim):
    ids = Along(dim)(torch.Size([2, 3, 4]))
    assert ids.shape == (2, 3, 4)
    for index in range((2, 3, 4)[dim]):
        assert (ids.select(dim, index) == index).all()


def test_equal_numbers_are_one_feature_across_entries():
    masks = {"x": torch.tensor([7, 7, -1]), "z": torch.tensor([9, 7])}
    ids, count = numbered(masks, {"x": torch.Size([3]), "z": torch.Size([2])})
    assert count == 2
    assert ids["x"].tolist() == [0, 0, -1]
    assert ids["z"].tolist() == [1, 0]


def test_without_a_mask_each_element_is_a_feature_after_those_of_the_masks():
    ids, count = numbered({"z": torch.tensor([1, 1])}, {"x": torch.Size([2, 2]), "z": torch.Size([2])})
    assert count == 5
    assert ids["z"].tolist() == [0, 0]
    assert ids["x"].tolist() == [[1, 2], [3, 4]]


def test_a_mask_broadcasts_to_the_row():
    ids, count = numbered(torch.tensor([[0], [1]]), {"x": torch.Size([3, 2, 4])})
    assert count == 2
    assert ids["x"].shape == (3, 2, 4)
    assert (ids["x"][:, 1] == 1).all()


def test_what_is_no_mask():
    with pytest.raises(BadType, match="not a mask"):
        check_masks(torch.zeros(3), ("x",))
    with pytest.raises(BadType, match="not a mask"):
        check_masks({"x": "grid"}, ("x",))
    with pytest.raises(BadKey, match="did you mean 'image'"):
        check_masks({"imge": torch.zeros(3, dtype=torch.long)}, ("image",))
    with pytest.raises(BadValue, match="one mask for several"):
        check_masks(torch.zeros(3, dtype=torch.long), ("x", Site("0")))
    with pytest.raises(BadValue, match="another shape"):
        numbered(torch.zeros(3, dtype=torch.long), {"x": torch.Size([4])})
    with pytest.raises(BadValue, match="size of a tile"):
        Grid((2, 0))
    with pytest.raises(BadValue, match="more dims"):
        Grid((2, 2))(torch.Size([4]))
    with pytest.raises(BadValue, match="no such dim"):
        Along(2)(torch.Size([4]))
