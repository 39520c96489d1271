"""Edits: each against its formula, row by row, and what does not fit."""

import copy
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Ablate, Add, Replace, Scale
from tdconcepts.hooks.edits import Edit

VALUE = torch.arange(24.0).reshape(2, 3, 4) - 10


def rows(**entries):
    return TensorDict(entries, batch_size=[2])


# ---------------------------------------------------------------------------------------------------- formulas

FORMULAS = {
    Replace: lambda value, given: given + 0 * value,
    Add: lambda value, given: value + given,
    Scale: lambda value, given: value * given,
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4)])
def test_numbers_tensors_and_parameters(kind, shape):
    for given in (torch.randn(shape), torch.nn.Parameter(torch.randn(shape))):
        found = kind(given)(VALUE, None)
        assert found.equal(FORMULAS[kind](VALUE, given))
        assert found.requires_grad == given.requires_grad
    assert kind(2.5)(VALUE, None).equal(FORMULAS[kind](VALUE, torch.tensor(2.5)))
    assert kind(2)(VALUE, None).dtype == VALUE.dtype


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("rest", [(), (4,), (3, 4)])
def test_entries_are_rows(kind, rest):
    given = torch.randn(2, *rest)
    td = rows(given=given).set(("nested", "given"), given)
    expected = torch.stack([FORMULAS[kind](VALUE[i], given[i]) for i in range(2)])
    assert kind("given")(VALUE, td).equal(expected)
    assert kind(("nested", "given"))(VALUE, td).equal(expected)


@pytest.mark.parametrize("kind", FORMULAS)
def test_an_entry_of_the_size_of_the_features_is_still_rows(kind):
    square = torch.randn(3, 3)
    given = torch.randn(3)
    td = TensorDict(given=given, batch_size=[3])
    assert kind("given")(square, td).equal(FORMULAS[kind](square, given.unsqueeze(-1)))
    cube, vectors = torch.randn(3, 3, 3), torch.randn(3, 3)
    td = TensorDict(given=vectors, batch_size=[3])
    assert kind("given")(cube, td).equal(FORMULAS[kind](cube, vectors.unsqueeze(1)))


def test_entries_under_merged_batch_dims():
    given = torch.randn(2, 3, 4)
    td = TensorDict(given=given, batch_size=[2, 3])
    assert Replace("given")(torch.zeros(6, 4), td).equal(given.reshape(6, 4))
    assert Replace("given")(torch.zeros(2, 3, 4), td).equal(given)


def test_entries_without_a_batch():
    td = TensorDict(given=torch.ones(4), batch_size=[])
    assert Replace("given")(torch.zeros(4), td).equal(torch.ones(4))


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_dtype_of_the_site_is_kept(kind):
    for dtype in (torch.bfloat16, torch.float64):
        assert kind(torch.ones(4))(VALUE.to(dtype), None).dtype == dtype
        assert kind(3)(VALUE.to(dtype), None).dtype == dtype


def test_steering_has_a_scale():
    vector = torch.randn(4)
    assert Add(vector, scale=-2.0)(VALUE, None).equal(VALUE - 2 * vector)


def slow_ablation(value, units, to, dim):
    found = value.clone()
    moved = found.movedim(dim, -1)
    for unit in range(moved.shape[-1]):
        if units is None or unit in [u % moved.shape[-1] for u in units]:
            moved[..., unit] = 0 if to == "zero" else moved[..., unit].mean()
    return moved.movedim(-1, dim)


@hypothesis.given(
    st.none() | st.lists(st.integers(-2, 1), max_size=3),
    st.sampled_from(["zero", "mean"]),
    st.sampled_from([-3, -2, -1, 0, 1, 2]),
)
def test_ablation(units, to, dim):
    before = VALUE.clone()
    torch.testing.assert_close(Ablate(units, to, dim)(VALUE, None), slow_ablation(VALUE, units, to, dim))
    assert VALUE.equal(before)


def test_ablation_to_an_entry():
    given = torch.randn(2, 4)
    found = Ablate([1, -1], to="given")(VALUE, rows(given=given))
    expected = VALUE.clone()
    expected[..., [1, 3]] = given[:, None, [1, 3]].expand(2, 3, 2)
    assert found.equal(expected)
    assert Ablate(to="given")(VALUE, rows(given=given)).equal(given.unsqueeze(1).expand(2, 3, 4))


def test_ablation_of_channels():
    images = torch.randn(2, 3, 5, 5)
    found = Ablate(1, dim=-3)(images, None)
    assert not found[:, 1].any()
    assert found[:, [0, 2]].equal(images[:, [0, 2]])


def test_ablation_of_a_row_alone():
    assert Ablate([0])(torch.ones(3), None).tolist() == [0, 1, 1]
    assert Ablate([], to="zero")(VALUE, None).equal(VALUE)


@pytest.mark.parametrize(
    "edit", [Replace(1.0), Replace(torch.ones(4)), Replace("given"), Ablate(), Ablate(to="mean"), Ablate(to="given")]
)
def test_the_model_may_overwrite_what_an_edit_gives(edit):
    """Such as an in-place ReLU after the site: neither the entry nor the edit's own tensor changes."""
    td = rows(given=torch.ones(2, 4))
    first = edit(VALUE, td)
    kept = first.clone()
    first.fill_(7.0)
    assert edit(VALUE, td).equal(kept)
    assert td["given"].equal(torch.ones(2, 4))


def test_nan_is_taken_out_and_stays_out():
    value = torch.tensor([[torch.nan, 1.0]])
    assert Ablate([0])(value, None).tolist() == [[0, 1]]
    assert Replace(3.0)(value, None).tolist() == [[3, 3]]
    given = TensorDict(given=torch.tensor([[torch.nan, 5.0]]), batch_size=[1])
    assert Ablate([1], to="given")(torch.ones(1, 2), given).tolist() == [[1, 5]]


@pytest.mark.parametrize(
    "edit", [Replace(torch.ones(4)), Add(torch.ones(4)), Scale(2.0), Ablate([0]), Ablate(to="mean")]
)
def test_edits_under_vmap_and_grad(edit):
    torch.testing.assert_close(torch.vmap(lambda v: edit(v, None))(VALUE), torch.stack([edit(v, None) for v in VALUE]))
    value = VALUE.clone().requires_grad_()
    edit(value + 0, None).sum().backward() if edit(value + 0, None).requires_grad else None
    eager = torch.zeros_like(VALUE) if value.grad is None else value.grad
    torch.testing.assert_close(torch.func.grad(lambda v: edit(v, None).sum())(VALUE), eager)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 4), (1, 3, 4), (2, 2, 3, 4)])
def test_tensors_that_do_not_fit(kind, shape):
    with pytest.raises(BadValue, match=f"{kind.__name__} does not fit the site") as error:
        kind(torch.ones(shape))(VALUE, None)
    assert f"{list(shape)}" in str(error.value)
    assert "[2, 3, 4]" in str(error.value)


@pytest.mark.parametrize("rest", [(3,), (1,), (2, 4), (1, 3, 4)])
def test_entries_that_do_not_fit(rest):
    with pytest.raises(BadValue, match=r"Replace\('given'\) does not fit the site"):
        Replace("given")(VALUE, rows(given=torch.ones(2, *rest)))
    with pytest.raises(BadValue, match=r"does not fit the site"):
        Replace("given")(VALUE, TensorDict(given=torch.ones(3, 4), batch_size=[3]))


@pytest.mark.parametrize("edit", [Replace("gvien"), Add("gvien"), Scale("gvien"), Ablate(to="gvien")])
def test_entries_that_are_missing(edit):
    assert edit.in_keys == ["gvien"]
    with pytest.raises(BadKey, match="no entry 'gvien'"):
        edit(VALUE, rows(given=torch.ones(2, 4)))
    with pytest.raises(BadKey, match="reads an entry") as error:
        edit(VALUE, None)
    assert "call the module with a TensorDict" in str(error.value)


@pytest.mark.parametrize("units", [[4], [-5], [0, 9], 7])
def test_units_that_do_not_exist(units):
    with pytest.raises(BadValue, match="units that do not exist") as error:
        Ablate(units)(VALUE, None)
    assert "[0, 4)" in str(error.value)


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dim_that_does_not_exist(dim):
    with pytest.raises(BadValue, match="no such dim"):
        Ablate([0], dim=dim)(VALUE, None)
    with pytest.raises(BadValue, match="no such dim"):
        Ablate([0])(torch.tensor(1.0), None)


def test_units_lie_behind_the_batch():
    with pytest.raises(BadValue, match="no such dim"):
        Ablate([0])(torch.ones(2), rows())
    assert Ablate()(torch.tensor(3.0), TensorDict(batch_size=[])).tolist() == 0


@pytest.mark.parametrize("units", [[1.5], ["a"], "ab", [True], [[0]]])
def test_units_that_are_no_positions(units):
    with pytest.raises(BadType, match="units are ints"):
        Ablate(units)


@pytest.mark.parametrize("to", [3, "", None, ("a", 1)])
def test_ablation_to_what_is_no_key(to):
    with pytest.raises(BadKey):
        Ablate([0], to=to)


# ---------------------------------------------------------------------------------------------------- as data

EDITS = [
    Replace(0.0),
    Replace(1.0),
    Replace("key"),
    Replace(("a", "b")),
    Replace(torch.ones(3)),
    Replace(torch.zeros(3)),
    Add(torch.ones(3)),
    Add(torch.ones(3), 2.0),
    Scale(0.0),
    Scale("mean"),
    Ablate(),
    Ablate([0, 1]),
    Ablate([0, 1], "mean"),
    Ablate([0, 1], "key"),
    Ablate([0, 1], dim=-3),
]


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_edits_compare_copy_and_pickle_by_value(edit):
    assert [other == edit for other in EDITS].count(True) == 1
    for clone in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert clone == edit
        assert hash(clone) == hash(edit)
    assert edit != "an edit"


def test_edits_are_frozen_and_name_what_they_read():
    with pytest.raises(AttributeError):
        Replace(0.0).value = 1.0
    assert [edit.in_keys for edit in EDITS] == [
        *([], [], ["key"], [("a", "b")], [], []),
        *([], [], [], ["mean"]),
        *([], [], [], ["key"], []),
    ]
    assert Add("zero").in_keys == ["zero"]


def test_an_edit_of_ones_own():
    class Clip(Edit):
        def __call__(self, value, td):
            return value.clip(-1, 1)

    assert Clip()(VALUE, None).abs().max() == 1
    assert Clip() == Clip()
    with pytest.raises(NotImplementedError):
        Edit()(VALUE, None)
