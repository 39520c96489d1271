"""Targets: each form of a selection against its slow meaning, and what can't be selected."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Site, Target

BATCHES = [(), (3,), (2, 3)]


def td_of(shape, **entries):
    return TensorDict(entries, batch_size=shape)


def mean_of(value, td):
    return value.flatten(td.batch_dims).mean(-1)


@given(st.sampled_from(BATCHES), st.integers(-4, 3))
def test_an_int(shape, select):
    value = torch.randn(*shape, 4)
    found, several = Target("y", select).read(value, td_of(shape), len(shape))
    assert found.equal(value[..., select])
    assert not several


@given(st.sampled_from(BATCHES), st.tuples(st.integers(-2, 1), st.integers(-3, 2), st.integers(-4, 3)))
def test_a_tuple(shape, select):
    value = torch.randn(*shape, 2, 3, 4)
    found, several = Target("y", select).read(value, td_of(shape), len(shape))
    assert found.equal(value[..., select[0], select[1], select[2]])
    assert not several


@pytest.mark.parametrize("shape", BATCHES)
def test_argmax(shape):
    value = torch.randn(*shape, 4)
    found, several = Target("y", "argmax").read(value, td_of(shape), len(shape))
    assert found.equal(value.max(-1).values)
    assert not several


def test_argmax_can_be_held():
    target, value = Target("y", "argmax"), torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    held = target.hold(value, 1)
    assert held.tolist() == [1, 0]
    found, _ = target.read(-value, td_of((2,)), 1, held)
    assert found.tolist() == [-2, -4], "the index of the first point, the value of the second"
    many, _ = Target("y", [0, "argmax"]).read(-value, td_of((2,)), 1, held)
    assert many.tolist() == [[-1, -2], [-4, -4]]
    assert [Target("y", s).moves for s in ("argmax", [0, "argmax"], 0, [0, 1], mean_of, None)] == [True, True] + [
        False
    ] * 4


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("row", [(), (1,), (1, 1)])
def test_no_selection_for_one_number_a_row(shape, row):
    value = torch.randn((*shape, *row))
    found, several = Target("y").read(value, td_of(shape), len(shape))
    assert found.equal(value.reshape(shape))
    assert not several


@pytest.mark.parametrize("shape", BATCHES)
def test_a_callable(shape):
    value = torch.randn(*shape, 4, 2)
    found, several = Target("y", mean_of).read(value, td_of(shape), len(shape))
    torch.testing.assert_close(found, value.mean((-1, -2)))
    assert not several


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize(
    ("select", "columns"),
    [
        ([0, 3, 1], [0, 3, 1]),
        ([2], [2]),
        ([-1, 0, 0], [3, 0, 0]),
        (range(3), [0, 1, 2]),
        (range(1, 4, 2), [1, 3]),
        (slice(None), [0, 1, 2, 3]),
        (slice(1, None), [1, 2, 3]),
        (slice(None, None, 2), [0, 2]),
        ((slice(1, 3),), [1, 2]),
        ((..., slice(1, 3)), [1, 2]),
    ],
)
def test_several_targets(shape, select, columns):
    value = torch.randn(*shape, 4)
    found, several = Target("y", select).read(value, td_of(shape), len(shape))
    assert several
    assert found.equal(torch.stack([value[..., c] for c in columns], -1))


@pytest.mark.parametrize("shape", BATCHES)
def test_several_targets_of_other_kinds(shape):
    value = torch.randn(*shape, 4)
    found, several = Target("y", [1, "argmax", mean_of, (2,)]).read(value, td_of(shape), len(shape))
    assert several
    expected = torch.stack([value[..., 1], value.max(-1).values, value.mean(-1), value[..., 2]], -1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", BATCHES)
def test_several_elements_of_rows_of_any_shape(shape):
    value = torch.randn(*shape, 2, 3)
    found, several = Target("y", [(0, 1), (1, -1)]).read(value, td_of(shape), len(shape))
    assert several
    assert found.equal(torch.stack([value[..., 0, 1], value[..., 1, 2]], -1))
    found, several = Target("y", (slice(None), 1)).read(value, td_of(shape), len(shape))
    assert several
    assert found.equal(value[..., 1])


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("trailing", [False, True])
def test_by_an_index(shape, dtype, trailing):
    value, index = torch.randn(*shape, 4), torch.randint(4, shape)
    given_index = (index.unsqueeze(-1) if trailing else index).to(dtype)
    found, several = Target("y", by="action").read(value, td_of(shape, action=given_index), len(shape))
    assert found.equal(value.gather(-1, index.unsqueeze(-1)).squeeze(-1))
    assert not several


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_by_a_one_hot_code(shape, dtype):
    value, index = torch.randn(*shape, 4), torch.randint(4, shape)
    code = torch.nn.functional.one_hot(index, 4).to(dtype)
    found, _ = Target("y", by=("a", "b")).read(value, td_of(shape).set(("a", "b"), code), len(shape))
    assert found.equal(value.gather(-1, index.unsqueeze(-1)).squeeze(-1))


def test_by_a_one_hot_code_leaves_nan_of_others_out():
    value = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    found, _ = Target("y", by="a").read(value, td_of((2,), a=torch.eye(2)), 1)
    assert found.tolist() == [1, 2]


def test_by_under_vmap():
    value, index = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    for given_index in (index, torch.nn.functional.one_hot(index, 3)):
        found = torch.vmap(lambda v, i: Target("y", by="a").read(v, td_of((), a=i), 0)[0])(value, given_index)
        assert found.equal(value.gather(-1, index.unsqueeze(-1)).squeeze(-1))


@given(st.integers(0, 4), st.integers(1, 4), st.data())
def test_by_is_the_selection_of_each_row(rows, columns, data):
    index = data.draw(st.lists(st.integers(0, columns - 1), min_size=rows, max_size=rows))
    value = torch.randn(rows, columns)
    found, _ = Target("y", by="a").read(value, td_of((rows,), a=torch.tensor(index, dtype=torch.long)), 1)
    assert found.tolist() == [value[i, j].item() for i, j in enumerate(index)]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("select", "row"),
    [
        (4, (4,)),
        (-5, (4,)),
        ((2, 0), (2, 3)),
        ((0,), (2, 3)),
        ((0, 0, 0), (2, 3)),
        ([0, 4], (4,)),
        ([(0, 0), (2, 0)], (2, 3)),
        (range(5), (4,)),
        (slice(4, None), (4,)),
        ((slice(3, None), 0), (2, 3)),
    ],
)
def test_out_of_range(select, row):
    value = torch.randn(3, *row)
    with pytest.raises(BadValue) as error:
        Target("y", select).read(value, td_of((3,)), 1)
    text = str(error.value)
    assert "target 'y'" in text
    assert "got:" in text
    assert "needed:" in text


@pytest.mark.parametrize("select", [0, "argmax", slice(None), [0, 1]])
@pytest.mark.parametrize("row", [(), (2, 3)])
def test_rows_that_are_not_vectors(select, row):
    with pytest.raises(BadValue, match=r"target 'y'") as error:
        Target("y", select).read(torch.randn(3, *row), td_of((3,)), 1)
    assert f"{list(row)}" in str(error.value)


def test_several_numbers_and_no_selection():
    with pytest.raises(BadValue, match="has 4 numbers a row") as error:
        Target("y").read(torch.randn(3, 4), td_of((3,)), 1)
    assert "Target('y', 0)" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_has_no_gradient(dtype):
    with pytest.raises(BadType, match="has no gradient") as error:
        Target("action", 0).read(torch.ones(3, 4, dtype=dtype), td_of((3,)), 1)
    assert str(dtype).removeprefix("torch.") in str(error.value)


@pytest.mark.parametrize(
    "select",
    [lambda value, td: value, lambda value, td: value.sum(), lambda value, td: 3.0, lambda value, td: None],
)
def test_a_callable_that_gives_no_number_for_each_row(select):
    with pytest.raises(BadValue, match="gave no number for each row") as error:
        Target("y", select).read(torch.randn(3, 4), td_of((3,)), 1)
    assert "[3]" in str(error.value)


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 1, 4]),
        torch.tensor([0, 1, -1]),
        torch.tensor([0.0, 1, 2]),
        torch.zeros(3, 2, dtype=torch.long),
        torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
        torch.zeros(3, 4),
        torch.eye(4)[:3] * 0.3,  # a continuous action
    ],
)
def test_an_entry_that_does_not_index(index):
    value = torch.randn(3, 4)
    with pytest.raises(BadValue, match="'a' does not index the target 'y'") as error:
        Target("y", by="a").read(value, td_of((3,), a=index), 1)
    assert "in [0, 4)" in str(error.value)
    assert "one-hot rows of shape [3, 4]" in str(error.value)


def test_an_entry_that_is_missing():
    with pytest.raises(BadKey, match="no entry 'acton'") as error:
        Target("y", by="acton").read(torch.randn(3, 4), td_of((3,), action=torch.zeros(3)), 1)
    assert "'action'" in str(error.value)


@pytest.mark.parametrize("select", ["max", 1.5, True, (0, "x"), (), [[0]], [0, [1]], {0}, torch.tensor(1), [slice(2)]])
def test_what_is_no_selection(select):
    with pytest.raises(BadType) as error:
        Target("y", select)
    assert "got:" in str(error.value)


@pytest.mark.parametrize("select", [[], range(0)])
def test_nothing_to_explain(select):
    with pytest.raises(BadValue, match="without anything to explain"):
        Target("y", select)


def test_one_selection_only():
    with pytest.raises(BadValue, match="one selection"):
        Target("y", 0, by="action")


def test_what_is_no_key():
    for of in (3, "", (), ("a", 1)):
        with pytest.raises(BadKey):
            Target(of)
    with pytest.raises(BadKey):
        Target("y", by=3)


# ---------------------------------------------------------------------------------------------------- as data


def test_targets_print_compare_copy_and_pickle():
    targets = [
        Target("y"),
        Target("y", 0),
        Target(("a", "y"), (0, 1)),
        Target("y", "argmax"),
        Target("y", [0, 1]),
        Target("y", range(2)),
        Target("y", slice(0, 2)),
        Target("y", mean_of),
        Target("y", by="action"),
        Target(Site("conv1"), (4, 1, 2)),
    ]
    for target in targets:
        assert [other == target for other in targets].count(True) == 1
        for clone in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
            assert clone == target
            assert hash(clone) == hash(target)
    assert repr(targets[2]) == "Target(('a', 'y'), (0, 1))"
    assert repr(targets[7]) == "Target('y', mean_of)"
    assert repr(targets[9]) == "Target(Site('conv1'), (4, 1, 2))"
    for target in [*targets[:7], *targets[8:]]:
        assert eval(repr(target), {"Target": Target, "Site": Site.parse}) == target
    assert [target.name for target in targets[:3]] == ["'y'", "'y'", "('a', 'y')"]
