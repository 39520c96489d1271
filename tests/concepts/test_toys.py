"""The toy data sets: their definitions, and that their tasks are what they say."""

import pytest
import torch

from tdconcepts.concepts.toys import SEGMENTS, digits_data, toy_data
from tdconcepts.errors import BadType, BadValue


def toy(name, n=4000, seed=0):
    data = toy_data(name, n, torch.Generator().manual_seed(seed))
    return data.td["observation"], data.td["labels"].bool(), data.td["task"].bool(), data


def test_xor():
    x, c, y, _ = toy("xor")
    assert ((x >= 0) & (x < 1)).all()
    assert torch.equal(c, x > 0.5)
    assert torch.equal(y, c[:, 0] != c[:, 1])


def test_trigonometry_can_be_taken_apart():
    x, c, y, _ = toy("trigonometry")
    h = torch.full((len(x), 3), 0.0, dtype=torch.float64)
    for _ in range(200):  # h = s - sin h, by a damped fixed point
        h = 0.5 * h + 0.5 * (x[:, [0, 2, 4]].double() - h.sin())
    assert (h.cos() + h - x[:, [1, 3, 5]]).abs().quantile(0.9) < 0.02  # near h = pi, h + sin h is flat
    assert (h.square().sum(1) - x[:, 6]).abs().quantile(0.8) < 0.05
    assert ((h > 0) == c).double().mean() > 0.99
    assert ((h.sum(1) > 1) == y).double().mean() > 0.99
    assert (h.std(0) - 2).abs().max() < 0.1


def test_dot_has_two_vectors_that_are_not_the_same():
    """In torch_concepts 1.0.0a7 both come from one seed, so that the task is 1 in every row."""
    x, c, y, _ = toy("dot")
    u, v = (x[:, :2] + x[:, 2:]) / 2, (x[:, :2] - x[:, 2:]) / 2
    torch.testing.assert_close((u * v).mean(0), torch.zeros(2), atol=0.3, rtol=0)
    assert torch.equal(c, torch.stack([u.sum(1) > 0, -v.sum(1) > 0], 1))
    assert ((u * v).sum(1) > 0).eq(y).double().mean() > 0.999
    assert 0.45 < y.double().mean() < 0.55


def test_checkmark():
    x, c, y, data = toy("checkmark")
    a, b, not_b = c.unbind(1)
    assert torch.equal(not_b, ~b)
    assert torch.equal(y, a & not_b)
    assert ((x[:, :3] > 0) == c).all()
    assert ("B", "C") in data.edges


@pytest.mark.parametrize("name", ["xor", "trigonometry", "dot", "checkmark"])
def test_draws_come_from_the_generator_and_edges_name_concepts(name):
    state = torch.get_rng_state()
    one, two = toy(name, 5)[0], toy(name, 5)[0]
    assert torch.equal(one, two)
    assert not torch.equal(one, toy(name, 5, 1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    data = toy(name, 0)[3]
    assert data.td.batch_size == (0,)
    assert {end for edge in data.edges for end in edge} <= {*data.concepts.names, "task"}


def test_digits_light_their_segments():
    pytest.importorskip("sklearn")
    data = digits_data()
    eight, one = (data["segments"][data["digit"] == d][0] for d in (8, 1))
    assert eight.tolist() == [1] * 7
    assert [SEGMENTS.names[i] for i in one.nonzero().flatten()] == ["upper right", "lower right"]
    assert 0 <= data["pixels"].min() < data["pixels"].max() == 1


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: toy_data("dots"), BadValue, "did you mean 'dot'"),
        (lambda: toy_data("xor", 2.5), BadType, "2.5"),
        (lambda: toy_data("xor", -1), BadType, "-1"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()
