"""A forward next to that of a reference: the order of calls, in-place operations, other ways."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.hooks import Pullback
from tdconcepts.hooks.flows import backward_by
from tdconcepts.hooks.references import References

SEEN = []


def secant(call):
    x, x0 = call.args[0], call.base.args[0]
    SEEN.append((call.name, x.tolist(), x0.tolist(), call.output.tolist(), call.base.output.tolist()))
    ratio = (call.output - call.base.output) / (x - x0)
    return backward_by(lambda flow, ratio: (flow * ratio,), call.output, [x], ratio.detach(), keep=False)


def refuse(name, reason):
    raise BadValue(f"{name}: {reason}")


PROGRAM = References(
    {"relu": secant, "tanh": secant}, lambda name, a, k: ("no", None) if name == "exp" else None, refuse
)


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.does = forward

    def forward(self, x):
        return self.does(x).sum(-1)


def pulled(does, x, x0, **how):
    pullback = Pullback(TensorDictModule(Net(does), ["x"], ["y"]), Target("y"), rules=PROGRAM)
    td = TensorDict(x=torch.tensor([x]), batch_size=[1])
    return PROGRAM.compared(pullback, td, {"x": torch.tensor([x0])}, **how).gradients[0].tolist()


@pytest.mark.parametrize(
    "does",
    [F.relu, torch.relu, lambda x: x.relu(), lambda x: (1 * x).relu_(), lambda x: F.relu(1 * x, inplace=True)],
)
def test_every_spelling_of_an_operation(does):
    assert pulled(does, [1.0, 2.0], [-1.0, -2.0]) == [[0.5, 0.5]]
    assert SEEN == [("relu", [[1.0, 2.0]], [[-1.0, -2.0]], [[1.0, 2.0]], [[0.0, 0.0]])]


def test_calls_meet_in_their_order():
    assert pulled(lambda x: F.relu(2 * F.relu(x) - 1), [2.0], [-1.0]) == [[3 / 4 * 2 * 2 / 3]]
    assert [call[1:3] for call in SEEN] == [([[2.0]], [[-1.0]]), ([[3.0]], [[-1.0]])]


def test_what_is_overwritten_later_is_kept_as_it_was():
    assert pulled(lambda x: F.relu(3 * x).mul_(5), [1.0], [-1.0]) == [[7.5]]
    assert SEEN[0][3:] == ([[3.0]], [[0.0]])


def test_between_calls_and_without_a_reference_nothing_happens():
    pullback = Pullback(TensorDictModule(Net(F.relu), ["x"], ["y"]), Target("y"), rules=PROGRAM)
    found = pullback(TensorDict(x=torch.ones(1, 2), batch_size=[1])).gradients[0]
    assert found.tolist() == [[1.0, 1.0]]
    assert SEEN == []


def test_second_derivatives_are_those_of_the_formula():
    def cubic(call):
        x, x0 = call.constant(call.args[0]), call.base.args[0]
        return backward_by(lambda flow, r: (flow * r,), call.output, [call.args[0]], x * x0, keep=False)

    program = References({"tanh": cubic}, lambda *a: None, refuse)
    pullback = Pullback(TensorDictModule(Net(torch.tanh), ["x"], ["y"]), Target("y"), rules=program)
    x = torch.tensor([[2.0]], requires_grad=True)
    td = TensorDict(x=x, batch_size=[1])
    found = program.compared(pullback, td, {"x": torch.tensor([[5.0]])}, create_graph=True).gradients[0]
    assert found.item() == 10.0
    assert torch.autograd.grad(found.sum(), x)[0].item() == 5.0


@pytest.mark.parametrize(
    "does",
    [
        lambda x: F.relu(x) if (x > 0).all() else torch.tanh(x),
        lambda x: F.relu(x) if (x > 0).all() else F.relu(F.relu(x)),
        lambda x: F.relu(F.relu(x)) if (x > 0).all() else F.relu(x),
        lambda x: F.relu(x[:, : 1 + int(x[0, 0] > 0)]),
    ],
)
def test_another_way_at_the_baseline(does):
    with pytest.raises(BadValue, match="another way at the baseline"):
        pulled(does, [1.0, 2.0], [-1.0, -2.0])


def test_what_has_no_formula_is_told_of_only_where_it_matters():
    with pytest.raises(BadValue, match="exp: no"):
        pulled(torch.exp, [1.0], [0.0])
    assert pulled(lambda x: x * torch.exp(torch.ones(1)) * 0 + F.relu(x), [1.0], [-1.0]) == [[0.5]]
    aside = []
    assert pulled(lambda x: aside.append(torch.exp(x)) or F.relu(x), [1.0], [-1.0]) == [[0.5]]


def unseen(y):
    with torch._C.DisableTorchFunction(), torch.no_grad():
        y.mul_(5)


@pytest.mark.parametrize(("does", "expected"), [(lambda y: y.mul_(5), 2.5), (unseen, 0.5)])
def test_what_seems_to_overwrite_nothing(does, expected):
    """A hook, or a stage that is a function, may all the same: what is kept is copied then."""
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, y: does(y) and None)
    td = TensorDict(x=torch.ones(1, 1), batch_size=[1])
    stages = [relu, nn.Flatten(0)], [nn.ReLU(), nn.Flatten(0)]
    for layers, second in zip(stages, [lambda y: y, lambda y: (does(y), y)[1]], strict=True):
        stage = TensorDictModule(second, ["h"], ["y"])
        net = TensorDictSequential(TensorDictModule(nn.Sequential(*layers), ["x"], ["h"]), stage)
        pullback = Pullback(net, Target("y"), rules=PROGRAM)
        for _ in range(2):
            SEEN.clear()
            found = PROGRAM.compared(pullback, td, {"x": -torch.ones(1, 1)}).gradients[0]
            assert found.item() == expected
            assert SEEN[-1][1:] == ([[1.0]], [[-1.0]], [[1.0]], [[0.0]])
