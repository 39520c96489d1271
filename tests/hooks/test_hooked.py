"""The module that a context gives back: keys, calls, what it writes, what it refuses."""

import pytest
import torch
from hooks.nets import batch, entries, hook_count, linear, mlp, pipeline, snapshot
from tensordict import TensorClass, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue, TdConceptsError
from tdconcepts.hooks import (
    Add,
    Capture,
    Hooked,
    Patch,
    Replace,
    Scale,
    Site,
    Target,
    capture,
    check_td,
    patch,
)

PROGRAMS = {
    "capture": Capture("0", "1:in"),
    "stop": Capture("0", stop=True),
    "gradients": Capture("0", gradients=Target("y", [0, 1])),
    "stop with gradients": Capture("0", gradients=Target(Site("1"), 0), stop=True),
    "edit": Patch({Site("1"): Scale(2.0)}),
    "row edit": Patch({Site("0"): Replace("donor")}),
    "input edit": Patch({"x": Scale(0.5)}),
    "sum": Capture("0") + Patch({Site("0"): Add("donor")}) + Capture("1", gradients=Target("y", by="action")),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("make", [mlp, pipeline])
def test_in_keys_and_out_keys_are_true(make, program):
    """It needs its in_keys and nothing else, and writes exactly its out_keys."""
    m = PROGRAMS[program].on(make())
    everything = batch(donor=torch.ones(5, 3), action=torch.zeros(5, dtype=torch.long), other=torch.ones(5))
    td = everything.select(*m.in_keys)
    before = entries(td)
    assert m(td) is td
    assert set(td.keys(True, True)) == set(m.in_keys) | set(m.out_keys)
    assert {key: entries(td)[key] for key in before} == before
    for key in m.in_keys:
        with pytest.raises(BadKey, match="no entry"):
            m(everything.exclude(key))
    assert not hook_count(m)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("entered", [False, True])
def test_it_is_the_same_inside_and_outside_of_with(program, entered):
    m = PROGRAMS[program].on(pipeline())
    td = batch(donor=torch.ones(5, 3), action=torch.zeros(5, dtype=torch.long))
    expected = m(td.copy())
    with m as entered_m:
        assert entered_m is m
        found = m(td.copy()), m(td.copy())
    for one in (*found, m(td.copy())):
        assert all(one[key].equal(expected[key]) for key in expected.keys(True, True))


def test_it_is_a_tensordict_module():
    net = mlp()
    m = capture(net, "0")
    assert isinstance(m, TensorDictModuleBase)
    assert m.module is net
    assert m.program == Capture("0")
    assert m.state_dict().keys() == {f"module.{key}" for key in net.state_dict()}
    assert list(m.parameters()) == list(net.parameters())
    m.eval()
    assert not net.training
    assert "Linear" in repr(m)
    pipe = TensorDictSequential(m, TensorDictModule(nn.Tanh(), [("activation", "0")], ["w"]))
    assert pipe(batch())["w"].equal(torch.tanh(net.module[0](batch()["x"])))


def test_it_ignores_what_is_there_already():
    """``set_skip_existing`` would otherwise skip a policy whose action is in the rollout."""
    m = patch(mlp(), {Site("2"): Replace(1.0)})
    assert m(batch(y=torch.zeros(5, 2)))["y"].eq(1).all()


def test_captures_replace_those_of_an_earlier_call():
    m = capture(mlp(), "0")
    td = m(batch(seed=1))
    td["x"] = batch(seed=2)["x"]
    assert m(td)["activation", "0"].equal(m(batch(seed=2))["activation", "0"])
    td["activation", "mine"] = torch.ones(5)
    assert m(td)["activation", "mine"].all(), "other entries of the group stay"


def test_direct_calls_write_no_captures():
    net = mlp()
    with capture(net, "0", gradients=Target("y", 0)):
        td = net(batch())
    assert set(td.keys()) == {"x", "y"}
    assert td["y"].requires_grad


class GivesANewOne(TensorDictModuleBase):
    """A module of somebody else's that does not write into what it is given."""

    in_keys, out_keys = ["x"], ["y"]

    def __init__(self):
        super().__init__()
        self.layer = linear(4, 2, 0)

    def forward(self, tensordict):
        return TensorDict(y=self.layer(tensordict["x"]), batch_size=tensordict.batch_size)


@pytest.mark.parametrize(
    "make",
    [
        GivesANewOne,
        lambda: TensorDictModule(linear(4, 2, 0), ["x"], ["y"], inplace=False),
        lambda: TensorDictModule(linear(4, 2, 0), ["x"], ["y"], inplace="empty"),
        lambda: TensorDictSequential(TensorDictModule(linear(4, 2, 0), ["x"], ["y"]), inplace=False),
    ],
)
@pytest.mark.parametrize("gradients", [None, Target("y", 0)])
def test_modules_that_give_a_new_tensordict(make, gradients):
    net, td = make(), batch()
    y = linear(4, 2, 0)(td["x"])
    m = (Patch({Site(".", leaf="y"): Scale(2.0)}) + Capture(Site(".", leaf="y"), gradients=gradients)).on(net)
    assert m(td) is td
    assert td["y"].equal(2 * y)
    assert td["activation", ".:out.y"].equal(2 * y)
    assert set(td.keys(True, True)) == {"x", *m.out_keys}
    assert patch(net, {"x": Replace(0.0)})(td)["y"].equal(linear(4, 2, 0).bias.expand(5, 2))


def test_programs_on_a_module_of_a_context():
    net = mlp()
    m = capture(patch(net, {Site("0"): Replace("donor")}), "1", gradients=Target("y", 0))
    assert set(m.in_keys) == {"x", "donor"}
    td = m(batch(donor=torch.ones(5, 3)))
    assert td["activation", "1"].allclose(torch.tanh(torch.ones(5, 3)))


def test_it_works_as_a_policy_inside_no_grad():
    m = capture(mlp(), "0", gradients=Target("y", 0))
    expected = m(batch())
    with torch.no_grad():
        td = m(batch())
    assert all(td[key].equal(expected[key]) for key in expected.keys(True, True))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_empty_batches(program, shape):
    m = PROGRAMS[program].on(mlp())
    td = batch(2, 3)[:, :0] if shape == (2, 0) else batch()[:0]
    td["donor"], td["action"] = torch.zeros(*shape, 3), torch.zeros(shape, dtype=torch.long)
    m(td)
    assert all(td[key].shape[: len(shape)] == shape for key in m.out_keys)


# ---------------------------------------------------------------------------------------------------- what is refused


class Observation(TensorClass):
    x: torch.Tensor


def test_what_cannot_be_written_to():
    td = batch()
    assert check_td(td) is None
    with pytest.raises(BadValue, match="the TensorDict is locked") as error:
        check_td(td.copy().lock_())
    assert "td.copy()" in str(error.value)
    for other in ({"x": td["x"]}, None, td["x"], Observation(x=td["x"], batch_size=[5])):
        with pytest.raises(BadType, match="not a TensorDict") as error:
            check_td(other)
        assert type(other).__name__ in str(error.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_locked_tensordict_stays_as_it_was(program):
    m = PROGRAMS[program].on(mlp())
    td = batch(donor=torch.ones(5, 3), action=torch.zeros(5, dtype=torch.long)).lock_()
    before, model = entries(td), snapshot(m)
    with pytest.raises(BadValue, match="locked"):
        m(td)
    assert entries(td) == before
    assert snapshot(m) == model
    assert m(td.copy())["x"].equal(td["x"]), "the way out works"


@pytest.mark.parametrize("program", PROGRAMS)
def test_errors_leave_model_and_data_as_they_were(program):
    m = PROGRAMS[program].on(pipeline())
    wrong = batch(features=7, donor=torch.ones(5, 3), action=torch.zeros(5, dtype=torch.long))
    before, model = entries(wrong), snapshot(m)
    with pytest.raises(RuntimeError):
        m(wrong)
    with pytest.raises(RuntimeError), m:
        m(wrong)
    assert entries(wrong) == before
    assert snapshot(m) == model


def test_a_missing_entry_is_named():
    m = capture(pipeline(), "1")
    with pytest.raises(BadKey, match="no entry 'x'") as error:
        m(TensorDict(xx=torch.zeros(5, 4), batch_size=[5]))
    assert "'xx'" in str(error.value)
    assert isinstance(error.value, KeyError)


def test_bare_modules_and_what_is_no_program():
    with pytest.raises(BadType, match="a bare Linear"):
        Hooked(nn.Linear(2, 2), Capture("0"))
    net = mlp()
    before = snapshot(net)
    for program in (
        Capture("nope"),
        Patch({"nope": Scale(2.0)}),
        Patch({Site("0"): Scale(2.0), Site("1.x"): Scale(2.0)}),
    ):
        with pytest.raises(TdConceptsError):
            Hooked(net, program)
    assert snapshot(net) == before
