"""Rows: batch dims in front, copies of a batch, pieces of it; each undone by its counterpart."""

import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.batching import (
    align,
    check_chunk_size,
    dense,
    expand,
    gather,
    groups,
    joined,
    pieces_of,
    rows_of,
    slices,
    spread,
    tracked,
    widths,
)

shapes = st.sampled_from([(), (1,), (4,), (2, 3), (1, 3), (2, 1, 3), (0,), (0, 3)])


def td_of(shape, **more):
    numel = torch.Size(shape).numel()
    x = torch.arange(float(numel * 2)).reshape(*shape, 2)
    return TensorDict({"x": x, ("n", "y"): x.sum(-1), **more}, batch_size=shape)


# ---------------------------------------------------------------------------------------------------- in front


@given(shapes, st.sampled_from([(), (5,), (2, 2)]))
def test_align_keeps_or_unflattens(shape, row):
    value = torch.randn(*shape, *row) if shape + row else torch.tensor(1.0)
    batch = torch.Size(shape)
    assert align(value, batch, "site") is value
    if len(shape) > 1 and 0 not in shape:
        assert align(value.flatten(0, len(shape) - 1), batch, "site").equal(value)


@pytest.mark.parametrize(
    ("value", "batch"),
    [((), (3,)), ((2,), (3,)), ((3, 2), (2, 3)), ((5, 4), (2, 3)), ((6,), (6, 1, 2)), ((1, 4), (3,))],
)
def test_values_without_the_batch_in_front(value, batch):
    with pytest.raises(BadValue, match="conv does not have the batch in front") as error:
        align(torch.zeros(value), torch.Size(batch), "conv")
    assert f"{list(value)} for a TensorDict of batch size {list(batch)}" in str(error.value)


# ---------------------------------------------------------------------------------------------------- copies


@given(shapes, st.integers(1, 4))
def test_copies_are_copy_after_copy(shape, n):
    td = td_of(shape)
    many = expand(td, n, ["x", ("n", "y")])
    assert many.batch_size == (shape if n == 1 else (n * shape[0], *shape[1:]) if shape else (n,))
    for key in ("x", ("n", "y")):
        assert gather(many[key], n, td.batch_size).equal(torch.stack([td[key]] * n))


@given(shapes, st.integers(1, 4))
def test_gather_undoes_spread(shape, n):
    value = torch.randn(n, *shape, 5)
    rows = spread(value, n, torch.Size(shape))
    assert rows.shape[:-1] == expand(td_of(shape), n, ["x"]).batch_size
    assert gather(rows, n, torch.Size(shape)).equal(value)


def test_copies_hold_the_entries_that_are_asked_for():
    td = td_of((3,), other=torch.ones(3), group=TensorDict(a=torch.ones(3), batch_size=[3]))
    assert set(expand(td, 2, ["x"]).keys()) == {"x"}
    assert set(expand(td, 1, ["x"]).keys()) == {"x"}
    assert set(expand(td, 2, ["x", "missing"]).keys()) == {"x"}
    assert expand(td, 2, ["group"])["group", "a"].shape == (6,)
    assert expand(td, 2, []).batch_size == (6,)


def test_one_copy_is_the_same_memory():
    td = td_of((3,))
    assert expand(td, 1, ["x"])["x"] is td["x"]


def test_dense_is_a_new_tensordict_of_the_same_tensors():
    td = td_of((3,))
    new = dense(td, ["x", "missing", ("n", "y")])
    assert new["x"] is td["x"]
    assert new["n", "y"] is td["n", "y"]
    new["more"] = torch.ones(3)
    new["x"] = torch.zeros(3, 2)
    assert "more" not in td
    assert td["x"].any() or not td.numel()
    locked = td.copy().lock_()
    assert not dense(locked, ["x"]).is_locked


def test_dense_makes_inference_tensors_usable():
    with torch.inference_mode():
        td = td_of((3,))
    new = dense(td, ["x"])
    assert not new["x"].is_inference()
    assert new["x"].equal(td["x"])


# ---------------------------------------------------------------------------------------------------- pieces


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 10))
def test_groups_cover_the_range_within_the_rows(n, rows, batch):
    found = list(groups(n, rows, batch))
    assert [i for group in found for i in group] == list(range(n))
    assert all(len(group) >= 1 for group in found)
    assert all(len(group) * batch <= rows or len(group) == 1 for group in found)
    assert len(found) <= n
    assert all(len(group) == len(found[0]) for group in found[:-1]), "as large as they may be"


@given(shapes, st.integers(1, 10))
def test_slices_cover_the_batch_within_the_rows(shape, rows):
    td = td_of(shape)
    pieces = list(slices(td, rows))
    if len(pieces) == 1 and pieces[0][0] is ...:
        assert pieces[0][1] is td
        assert td.numel() <= rows or not shape
        return
    assert all(part["x"].equal(td["x"][index]) for index, part in pieces)
    assert all(part.numel() <= rows and part.batch_dims == td.batch_dims for _, part in pieces)
    for key in ("x", ("n", "y")):
        assert joined([part[key] for _, part in pieces], td.batch_size, rows).equal(td[key])


def rows(count, size, dtype=torch.float32):
    return TensorDict(x=torch.zeros(count, size, dtype=dtype), batch_size=[count])


def test_rows_in_flight():
    assert rows_of(rows(3, 2), 7, ["x"]) == 7
    assert rows_of(rows(3, 2), 1, ["x"]) == 1
    assert rows_of(rows(3, 2), None, ["x"]) == 2**14, "small rows: many at once"
    assert rows_of(rows(1, 2**14), None, ["x"]) == 16, "1 MB"
    assert rows_of(rows(8, 2**14), None, ["x"]) == 16, "that is two copies"
    assert rows_of(rows(30, 2**14), None, ["x"]) == 30, "the batch"
    assert rows_of(rows(1, 2**18), None, ["x"]) == 4, "four rows"
    assert rows_of(rows(8, 2**13), None, ["x"], kept=1) == 24, "three copies"
    assert rows_of(rows(1, 2**14), None, ["x"], kept=1) == 3
    assert rows_of(rows(1, 2**14), None, ["x"], kept=2) == 8, "for several targets half a MB"
    assert rows_of(rows(1, 2**13 - 1), None, ["x"], kept=1) == 16, "and of small rows"
    assert rows_of(rows(30, 2**14), None, ["x"], kept=1) == 30
    assert rows_of(rows(3, 2), None, ["x"], kept=1) == 2**13
    assert rows_of(rows(0, 4), None, ["x"]) >= 1
    assert rows_of(rows(2, 2**14), None, []) >= 2
    assert rows_of(rows(2, 2**10), None, ["x"], [torch.zeros(2, 2**13), torch.zeros(2, 1)]) == 32, "inside it is larger"


@pytest.mark.parametrize(
    ("layers", "dtype", "size", "numbers"),
    [
        ([], torch.float32, 100, 100),
        ([nn.Linear(16, 64), nn.Linear(64, 4)], torch.float32, 16, 64),
        ([nn.Linear(16, 64), nn.Linear(64, 4)], torch.float32, 160, 640),  # ten tokens of 16 numbers
        ([nn.Linear(200, 10)], torch.float32, 100, 100),
        ([nn.Conv2d(3, 12, 3), nn.Linear(500, 10000)], torch.float32, 300, 1200),
        ([nn.Conv2d(3, 12, 3, stride=2), nn.Conv2d(12, 48, 3, stride=(2, 1))], torch.float32, 300, 600),
        ([nn.Conv2d(3, 12, 3), nn.MaxPool2d(2), nn.Conv2d(12, 96, 3)], torch.float32, 300, 2400),
        ([nn.Conv1d(3, 12, 3), nn.AvgPool1d(4), nn.ConvTranspose1d(12, 9, 3, stride=4)], torch.float32, 300, 1200),
        ([nn.Embedding(50, 8), nn.Linear(8, 50)], torch.int64, 10, 500),  # a score for each word
        ([nn.Embedding(50, 8)], torch.int32, 10, 80),
        ([nn.Linear(10, 20)], torch.int64, 10, 10),  # actions, say
    ],
)
def test_what_a_row_becomes(layers, dtype, size, numbers):
    found = rows_of(rows(1, size, dtype), None, ["x"], wide=widths(nn.Sequential(*layers)))
    assert found == min(2**14, 2**18 // numbers)


def test_pieces_of_a_large_batch():
    def pieces(td, chunk_size, module=nn.Identity()):  # noqa: B008
        return pieces_of(td, chunk_size, ["x"], module, widths(module))

    assert pieces(rows(8, 2**20), None) is None, "few rows"
    assert pieces(rows(2**10, 2**11), None) is None, "8 MB"
    assert pieces(rows(2**11, 2**11), None) == 128, "1 MB"
    assert pieces(rows(2**9, 2**11), None, nn.Linear(2**11, 2**13)) == 32, "of the widest layer"
    assert pieces(rows(2**7, 2**16), None) == 8, "8 rows"
    assert pieces(rows(2**11, 2**11).reshape(4, 512), None) == 512, "no index of the first dim is cut"
    assert pieces(rows(2**11, 2**11), 2**11) is None
    assert pieces(rows(2**11, 2**11).reshape(4, 512), 7) == 7, "but on request"
    assert pieces(rows(8, 2).reshape(2, 4), 3, nn.Sequential(nn.LSTM(2, 2))) == 4, "time is a dim"
    assert pieces(rows(0, 2), 3) is None


# ---------------------------------------------------------------------------------------------------- bars


def test_progress_bars(capsys):
    seen = []

    def bar(pieces, desc):
        seen.append(desc)
        return iter(pieces)

    pieces = [1, 2, 3]
    assert tracked(pieces, False, "work") is pieces
    assert list(tracked(pieces, bar, "work")) == pieces
    assert tracked([1], bar, "work") == [1]
    assert seen == ["work"]
    assert list(tracked(pieces, True, "work")) == pieces
    assert "work" in capsys.readouterr().err


def _in_a_worker(pieces):
    return tracked(pieces, True, "work") is pieces


def test_no_bars_in_worker_processes():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_in_a_worker, [[1, 2]]) == [True]


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True, "all"])
def test_what_is_no_chunk_size(chunk_size):
    with pytest.raises(BadValue, match="not a chunk size") as error:
        check_chunk_size(chunk_size)
    assert repr(chunk_size) in str(error.value)


def test_chunk_sizes():
    assert [check_chunk_size(c) for c in (None, 1, 64)] == [None, 1, 64]
