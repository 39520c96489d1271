"""Growing rows: slots, and which experiment runs in which."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.experiments import every, product
from tdconcepts.experiments.growth import Schedule, bring
from tdconcepts.experiments.moves import Move, Unfit
from tdconcepts.hooks import Add, Scale

TD = TensorDict(batch_size=[2])


def moves(experiments):
    table = experiments.resolve(lambda where: [(where, torch.Size([3]))])
    return table.n, [Move(plain) for plain in table.moves]


def test_begin_and_again():
    n, (first, second) = moves(product(every("a", Add(1.0)), every("b", Scale(3.0))))
    schedule = Schedule(n, [first, second])
    begin, again = schedule.events
    assert (begin.total, begin.again, again.total, again.begin) == (9, None, 9, None)  # no slot for the batch
    value = torch.randn(2, 3)
    grown = schedule.change(begin, value, 1, TD, None)
    assert grown.shape == (18, 3)
    out = schedule.results(schedule.change(again, grown, 9, TD, None), 9)
    for i in range(3):
        for j in range(3):
            expected = value.clone()
            expected[:, i] += 1
            expected[:, j] *= 3
            torch.testing.assert_close(out[3 * i + j], expected)


def test_a_value_that_all_pass_by():
    n, found = moves(every("a", Add(1.0)))
    schedule = Schedule(n, found)
    value = torch.randn(2, 3)
    assert torch.equal(schedule.results(value, 1), value.expand(3, 2, 3))


def test_order_of_the_forward():
    n, found = moves(every(["late", "early"], Add(1.0)))
    schedule = Schedule(n, found[::-1])
    value = torch.randn(2, 3)
    grown = value
    for held, event in zip([1, 4], schedule.events, strict=True):
        grown = schedule.change(event, grown, held, TD, None)
    out = schedule.results(grown, 7)
    assert torch.equal(out, torch.cat([value + torch.eye(3)[:, None]] * 2))


def test_a_value_that_no_experiment_has_reached():
    n, (first, second) = moves(every(["a", "b"], Add(1.0)))
    schedule = Schedule(n, [first, second])
    value = torch.randn(2, 3)
    out = schedule.results(schedule.change(schedule.events[1], value, 1, TD, None), 7)
    assert torch.equal(out[:3], value.expand(3, 2, 3))
    assert torch.equal(out[3:], value + torch.eye(3)[:, None])


def test_bring():
    value = torch.arange(6.0).view(6, 1)
    assert bring(value, 3, 3) is value
    assert bring(value, 3, 5).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]


def test_an_experiment_without_a_place():
    n, (first, _) = moves(every(["a", "b"], Add(1.0)))
    with pytest.raises(Unfit):
        Schedule(n, [first])
