"""Removing a direction: the formula, the laws of an edit, and the errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Patch, patch
from tdconcepts.hooks.directions import RemoveDirection, random_directions


def slowly(z, u, mean):
    """z - ((z - mean) . u) u, one row and one unit at a time."""
    length = sum(float(c) ** 2 for c in u) ** 0.5
    u = [float(c) / length for c in u]
    out = torch.empty_like(z)
    for row in range(len(z)):
        along = sum((float(z[row, i]) - float(mean[i])) * u[i] for i in range(len(u)))
        for i in range(len(u)):
            out[row, i] = float(z[row, i]) - along * u[i]
    return out


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_the_formula(size, seed):
    generator = torch.Generator().manual_seed(seed)
    z, mean = torch.randn(5, size, generator=generator).double(), torch.randn(size, generator=generator).double()
    u = 3.0 * random_directions(1, size, generator)[0].double()
    edit = RemoveDirection(u, mean)
    assert torch.allclose(edit(z), slowly(z, u, mean))
    assert torch.allclose(RemoveDirection(u)(z), slowly(z, u, torch.zeros(size)))
    assert torch.allclose(edit(z) @ edit.direction, (mean @ edit.direction).expand(5))
    assert torch.allclose(edit(edit(z)), edit(z))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_are_kept(batch, dtype):
    z = torch.randn(*batch, 4).to(dtype)
    out = RemoveDirection(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.full((4,), 0.5))(z)
    assert out.dtype == dtype
    assert torch.equal(out[..., 1:], z[..., 1:])
    assert (out[..., 0] == 0.5).all()


def test_as_a_patch_of_an_entry():
    first = TensorDictModule(torch.nn.Linear(3, 4), ["x"], ["z"])
    model = TensorDictSequential(first, TensorDictModule(torch.nn.Linear(4, 2), ["z"], ["y"]))
    td, edit = TensorDict({"x": torch.randn(5, 3)}, batch_size=[5]), RemoveDirection(torch.ones(4))
    with patch(model, {"z": edit}) as patched:
        found = patched(td.copy())
    z = first(td.copy())["z"]
    assert torch.allclose(found["z"].sum(-1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(found["y"], model.module[1].module(edit(z)))


def test_gradients_flow_across_and_not_along():
    z = torch.randn(3, 4, requires_grad=True)
    RemoveDirection(torch.tensor([0.0, 1.0, 0.0, 0.0]))(z).sum().backward()
    assert torch.equal(z.grad, torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(3, 4))


def test_it_is_frozen_data():
    given, mean = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    edit = RemoveDirection(given, mean)
    twin = pickle.loads(pickle.dumps(edit))
    assert edit == twin == copy.deepcopy(edit)
    assert hash(edit) == hash(twin)
    assert edit != RemoveDirection(given)
    assert edit != RemoveDirection(-given, mean)
    assert pickle.loads(pickle.dumps(Patch({"z": edit}))) == Patch({"z": edit})
    mean += 1.0  # the caller's tensors are not held
    assert torch.equal(edit.mean, torch.tensor([1.0, 2.0]))
    assert torch.equal(given, torch.tensor([3.0, 4.0]))
    assert repr(edit) == "RemoveDirection([2], mean=[2])"
    with pytest.raises(AttributeError):
        edit.direction = given


@pytest.mark.parametrize(
    ("direction", "mean", "error", "text"),
    [
        (torch.zeros(3), None, BadValue, "length zero"),
        (torch.tensor([1.0, float("nan")]), None, BadValue, "not finite"),
        (torch.ones(2, 2), None, BadValue, "no vector"),
        (torch.ones(3), torch.ones(2), BadValue, "the mean is no vector"),
        (torch.ones(3), torch.tensor([0.0, float("inf"), 0.0]), BadValue, "the mean is not finite"),
        (torch.ones(3, dtype=torch.int64), None, BadType, "no floating-point"),
        ([1.0, 2.0], None, BadType, "list"),
        (torch.ones(3), [0.0, 0.0, 0.0], BadType, "the mean"),
    ],
)
def test_bad_input(direction, mean, error, text):
    with pytest.raises(error, match=text):
        RemoveDirection(direction, mean)


def test_a_latent_of_another_size():
    with pytest.raises(BadValue, match=r"last dim of 3"):
        RemoveDirection(torch.ones(3))(torch.ones(2, 4))


def test_random_directions():
    generator = torch.Generator().manual_seed(1)
    drawn = random_directions(2000, 3, generator)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(2000))
    assert drawn.mean(0).abs().max() < 0.05  # uniform: no side is preferred
    assert torch.allclose(drawn.T @ drawn / 2000, torch.eye(3) / 3, atol=0.03)
    before = torch.get_rng_state()
    assert torch.equal(random_directions(2000, 3, torch.Generator().manual_seed(1)), drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert random_directions(0, 3).shape == (0, 3)
    with pytest.raises(BadValue, match="size=0"):
        random_directions(1, 0)
