"""Masks: tiles, dims, shared numbers, and what is no mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts import Site, Target
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.perturbation import Along, FeatureAblation, Grid, KernelShap, ShapleyExact
from tdconcepts.perturbation.masks import check_masks, numbered


def ids_of(masks, **rows):
    td = TensorDict({name: torch.zeros(*row) for name, row in rows.items()}, batch_size=[])
    return numbered(masks, dict(td.items()), td, torch.zeros(0, dtype=torch.long))


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
    ids, count = ids_of(masks, x=[3], z=[2])
    assert count == 2
    assert ids["x"].tolist() == [0, 0, -1]
    assert ids["z"].tolist() == [1, 0]


def test_without_a_mask_each_element_is_a_feature_after_those_of_the_masks():
    ids, count = ids_of({"z": torch.tensor([1, 1])}, x=[2, 2], z=[2])
    assert count == 5
    assert ids["z"].tolist() == [0, 0]
    assert ids["x"].tolist() == [[1, 2], [3, 4]]


def test_a_mask_broadcasts_to_the_row():
    ids, count = ids_of(torch.tensor([[0], [1]]), x=[3, 2, 4])
    assert count == 2
    assert ids["x"].shape == (3, 2, 4)
    assert (ids["x"][:, 1] == 1).all()


def test_what_is_no_mask():
    with pytest.raises(BadType, match="not a mask"):
        check_masks(torch.zeros(3), ("x",))
    with pytest.raises(BadType, match="not a mask"):
        check_masks({"x": 3}, ("x",))
    with pytest.raises(BadKey, match="did you mean 'image'"):
        check_masks({"imge": torch.zeros(3, dtype=torch.long)}, ("image",))
    with pytest.raises(BadValue, match="one mask for several"):
        check_masks(torch.zeros(3, dtype=torch.long), ("x", Site("0")))
    with pytest.raises(BadValue, match="another shape"):
        ids_of(torch.zeros(3, dtype=torch.long), x=[4])
    for made in (None, 3, torch.zeros(4), "parts"):
        with pytest.raises(BadType, match="not a mask"):
            ids_of(lambda row, made=made: made, x=[4])
    with pytest.raises(BadType, match="not a mask"):
        check_masks(lambda: torch.zeros(3, dtype=torch.long), ("x",))
    for cell in ((2, 0), 2.0, None, (), (1, 2.0)):
        with pytest.raises(BadValue, match="size of a tile"):
            Grid(cell)
    with pytest.raises(BadValue, match="more dims"):
        Grid((2, 2))(torch.Size([4]))
    with pytest.raises(BadValue, match="not a dim"):
        Along(1.5)
    with pytest.raises(BadValue, match="no such dim"):
        Along(2)(torch.Size([4]))


# ---------------------------------------------------------------------------------------- a mask for each row


def parted(images):
    """Each row with parts of its own, not equally many; -1 is never touched."""
    td = images.copy()
    parts = torch.stack([torch.arange(36).view(1, 6, 6) // 18, Grid((3, 3))(torch.Size([1, 6, 6])) * 2])
    parts = torch.cat([parts, torch.full((1, 1, 6, 6), -1)])
    parts[2, :, 0] = 7
    return td.set(("parts", "image"), parts)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("target", [1, [0, 2]])
@pytest.mark.parametrize("method", [FeatureAblation, ShapleyExact, KernelShap])
def test_a_mask_that_is_an_entry_is_that_of_each_row(image_net, images, method, target, chunk_size):
    td = parted(images)
    many = {"n_samples": 200} if method is KernelShap else {}  # all subsets: exact
    explain = method(image_net, Target("logits", target), mask="parts", chunk_size=chunk_size, **many)
    assert explain.in_keys == ["image", ("parts", "image")]
    found = explain(td.copy())["attribution", "image"]
    for i, part in enumerate(td):
        alone = method(image_net, Target("logits", target), mask=part["parts", "image"], **many)
        torch.testing.assert_close(found[i], alone(part.select("image"))["attribution", "image"])


def test_masks_of_rows_under_two_batch_dims(net, batch):
    td = batch(2, 3)
    td["parts", "x"] = torch.randint(-1, 3, (2, 3, 4))
    explain = FeatureAblation(net, Target("logits", [0, 1]), "x", mask="parts", chunk_size=4)
    flat = explain(td.flatten())["attribution", "x"]
    torch.testing.assert_close(explain(td)["attribution", "x"].flatten(0, 1), flat)


def test_masks_of_rows_that_are_none(image_net, images):
    explain = FeatureAblation(image_net, Target("logits", 1), mask={"image": "parts"})
    td = parted(images)
    with pytest.raises(BadKey, match=r"no mask for 'image'|no entry"):
        explain(td.select("image"))
    with pytest.raises(BadKey, match="no mask for 'image'"):
        explain(td.select("image").set("parts", torch.zeros(3, 6, 6, dtype=torch.long)))
    with pytest.raises(BadType, match="not a mask"):
        explain(td.copy().set(("parts", "image"), torch.zeros(3, 1, 6, 6)))
    with pytest.raises(BadValue, match="another shape"):
        explain(td.copy().set(("parts", "image"), torch.zeros(3, 4, 6, dtype=torch.long)))
    with pytest.raises(BadKey, match="not a TensorDict key"):
        FeatureAblation(image_net, Target("logits", 1), mask=("parts", 3))
