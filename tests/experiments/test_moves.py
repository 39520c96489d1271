"""Moves: many experiments at one place give what each gives alone."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.experiments import each, every, grid
from tdconcepts.experiments.moves import Move, Unfit, within
from tdconcepts.hooks import Ablate, Add, Replace, Scale

TD = TensorDict(donor=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), batch_size=[3])


def move(experiments, *shape):
    return Move(experiments.resolve(lambda where: [(where, torch.Size(shape))]).moves[0])


def double(value, td):
    value *= 2


MOVES = {
    "units": (every("a", Ablate()), (4,)),
    "the batch's mean": (every("a", Ablate(to="mean")), (4,)),
    "entries": (every("a", Replace("donor")), (4,)),
    "a callable": (every("a", double), (4,)),
    "positions": (grid("a", None, Scale(2.0)), (5, 4)),
    "blocks": (every("a", Add(1.0), groups=2), (4,)),
    "tensors to add": (each("a", [Add(torch.randn(4), 0.5) for _ in range(3)]), (4,)),
    "tensors to put": (each("a", [Replace(torch.randn(4)) for _ in range(3)]), (5, 4)),
    "tensors to multiply": (each("a", [Scale(torch.randn(4)) for _ in range(3)]), (4,)),
    "whole batches to put": (each("a", [Replace(torch.randn(3, 4)) for _ in range(3)]), (4,)),
    "different kinds": (each("a", [Add(1.0), Ablate([1]), double]), (4,)),
    "different factors": (each("a", [Add(torch.ones(4), 0.5), Add(torch.ones(4), 2.0)]), (4,)),
}


@pytest.mark.parametrize("name", MOVES)
def test_apply(name):
    experiments, shape = MOVES[name]
    moved = move(experiments, *shape)
    shared, own = torch.randn(3, *shape), torch.randn(moved.m, 3, *shape)
    parts = [moved.part(i) for i in range(moved.m)]
    torch.testing.assert_close(moved.apply(shared, TD, False), torch.stack([part(shared, TD) for part in parts]))
    torch.testing.assert_close(
        moved.apply(own, TD, True), torch.stack([part(one, TD) for part, one in zip(parts, own, strict=True)])
    )
    some = moved.take([moved.m - 1, 0], [1, 0])
    assert some.plain.members.tolist() == [1, 0]
    torch.testing.assert_close(some.apply(shared, TD, False), moved.apply(shared, TD, False)[[moved.m - 1, 0]])


def test_part_of_a_row():
    moved = move(every("a", Ablate()), 2)
    value = torch.randn(3, 4)
    out = moved.apply(value, TD, False, index=([3, 1],))
    assert torch.equal(out[0], value * torch.tensor([1, 1, 1, 0]))
    assert torch.equal(out[1], value * torch.tensor([1, 0, 1, 1]))
    assert torch.equal(moved.apply(torch.stack([value, value]), TD, True, index=([3, 1],)), out)


def test_mapped():
    stacked = move(each("a", [Add(torch.ones(4) * i) for i in range(3)]), 4)
    assert stacked.mapped()["operand"].shape == (3, 4)
    assert stacked.with_operand(torch.zeros(4)) == Add(torch.zeros(4))
    with pytest.raises(Unfit, match="kinds"):
        move(each("a", [Add(1.0), Ablate()]), 4).mapped()


def test_within():
    mask = within(torch.zeros(2, 3, 4), {-1: (1, 3), -2: (0, 1)})
    assert mask.int().tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4]


def test_another_shape():
    with pytest.raises(BadValue, match="another shape"):
        move(every("a", lambda value, td: value[..., :1]), 4).apply(torch.zeros(3, 4), TD, False)
