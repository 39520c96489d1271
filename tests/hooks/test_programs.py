"""Programs: data that describes what to read and to change, adds up, and binds to any model."""

import copy
import pickle

import pytest
import torch
from hooks.nets import batch, entries, mlp, pipeline, snapshot, twice
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Add, Capture, Patch, Programs, Replace, Scale, Site, Target, capture, patch
from tdconcepts.hooks.programs import checked_edit


def halve(value, td):
    return value / 2


PROGRAMS = [
    Capture("0"),
    Capture("0", "1:in"),
    Capture("1:in", "0"),
    Capture("0", stop=True),
    Capture("0", clone=True),
    Capture("0", detach=False),
    Capture("*", gradients=Target("y", [0, 1])),
    Patch({Site("0"): Scale(2.0)}),
    Patch({Site("0"): Scale(3.0)}),
    Patch({"y": halve}),
    Patch({Site("0", index=1): Replace(torch.ones(5))}),
    Capture("0") + Patch({Site("0"): Scale(2.0)}),
    Patch({Site("0"): Scale(2.0)}) + Capture("0"),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: repr(program).split(" at 0x")[0])
def test_programs_are_data(program):
    assert [other == program for other in PROGRAMS].count(True) == 1
    for clone in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert clone == program
        assert hash(clone) == hash(program)
    with pytest.raises(AttributeError):
        program.sites = ()


def test_programs_print_as_they_are_written():
    names = {
        "Capture": Capture,
        "Patch": Patch,
        "Site": Site.parse,
        "Target": Target,
        "Scale": Scale,
        "Replace": Replace,
    }
    for program in PROGRAMS[:9] + PROGRAMS[11:]:
        assert eval(repr(program), names) == program
    assert repr(PROGRAMS[1]) == "Capture('0', '1:in')"
    assert repr(PROGRAMS[6]) == "Capture('*', gradients=Target('y', [0, 1]))"


def test_addition_is_flat_and_in_order():
    a, b, c = PROGRAMS[0], PROGRAMS[7], PROGRAMS[8]
    assert (a + b) + c == a + (b + c) == Programs((a, b, c))
    assert a + b != b + a
    for other in (3, None, mlp()):
        with pytest.raises(BadType, match="not a program"):
            a + other


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: repr(program).split(" at 0x")[0])
def test_one_program_binds_to_any_model(program):
    expected = program.on(mlp())(batch())
    for net in (mlp(), mlp()):
        found = program.on(net)(batch())
        assert set(found.keys(True, True)) == set(expected.keys(True, True))
        assert all(found[key].equal(expected[key]) for key in expected.keys(True, True))


def test_the_short_forms():
    net = mlp()
    arguments = {"gradients": Target("y", 0), "clone": True}
    assert capture(net, "0", Site("1"), **arguments).program == Capture("0", "1", **arguments)
    assert patch(net, {Site("0"): Scale(2.0)}).program == Patch({Site("0"): Scale(2.0)})


# ---------------------------------------------------------------------------------------------------- captures


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_captures_by_hand(shape):
    net = mlp()
    td = batch(*shape) if shape else batch(1)[0]
    h = net.module[0](td["x"])
    z = torch.tanh(h)
    found = capture(net, "*", "1:in", Site("0", index=slice(1, 3)), gradients=Target("y", [1, 0]))(td)
    slope = net.module[2].weight[[1, 0]].detach().expand(*shape, 2, 3)
    down = (1 - z.unsqueeze(-2) ** 2) * slope
    for site, value, gradient in (
        ("0", h, down),
        ("1", z, slope),
        ("2", net.module[2](z), torch.eye(2)[[1, 0]].expand(*shape, 2, 2)),
        ("1:in", h, down),
        ("0[1:3]", h[..., 1:3], down[..., 1:3]),
    ):
        torch.testing.assert_close(found["activation", site], value.detach())
        torch.testing.assert_close(found["gradient", site], gradient.detach())
    assert not any(found[key].requires_grad for key in found.keys(True, True) if key != "y")


def test_captures_are_not_copied_unless_asked():
    net, made = mlp(), []
    net.module[0].register_forward_hook(lambda module, args, out: made.append(out.data_ptr()))
    assert capture(net, "0")(batch())["activation", "0"].data_ptr() == made[0]
    td = capture(net, "0", clone=True)(batch())
    assert td["activation", "0"].data_ptr() != made[1]


def test_captures_keep_the_graph_if_asked():
    net = mlp()
    td = capture(net, "0", detach=False)(batch())
    gradient = torch.autograd.grad(td["y"][:, 0].sum(), td["activation", "0"])[0]
    expected = capture(net, "0", gradients=Target("y", 0))(batch())["gradient", "0"]
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(BadValue, match="taking gradients uses up the graph"):
        Capture("0", gradients=Target("y", 0), detach=False)


def test_a_place_that_several_sites_match_is_captured_once():
    m = capture(mlp(), "*", "0", "**")
    assert [key[1] for key in m.out_keys if key[0] == "activation"] == ["0", "1", "2"]


def test_captures_of_several_programs():
    net = mlp()
    td = (Capture("0", gradients=Target("y", 0)) + Capture("1")).on(net)(batch())
    assert {key for key in td.keys(True, True) if key not in ("x", "y")} == {
        ("activation", "0"),
        ("activation", "1"),
        ("gradient", "0"),
    }


@pytest.mark.parametrize("call", [0, 1, -1, -2, "all"])
def test_calls_that_are_stacked_behind_the_batch(call):
    net = twice()
    td = capture(net, Site("layer", call=call, index=1))(batch(2, 3, features=3))
    value = td["activation", f"layer[1]@{call}"]
    assert value.shape == ((2, 3, 2) if call == "all" else (2, 3))


# ---------------------------------------------------------------------------------------------------- edits


def test_a_part_of_each_row():
    net = mlp()
    h = net.module[0](batch()["x"])
    for index, select in ((1, 1), (slice(0, 2), slice(0, 2)), ([0, 2], [0, 2]), ((..., -1), -1)):
        expected = h.clone()
        expected[:, select] *= 2
        found = (Patch({Site("0", index=index): Scale(2.0)}) + Capture("0")).on(net)(batch())["activation", "0"]
        assert found.equal(expected)


def test_two_parts_of_one_site():
    net = mlp()
    program = Patch({Site("0", index=0): Replace(1.0), Site("0", index=2): Replace(2.0)}) + Capture("0")
    found = program.on(net)(batch())["activation", "0"]
    assert found[:, 0].eq(1).all()
    assert found[:, 2].eq(2).all()
    assert found[:, 1].equal(net.module[0](batch()["x"])[:, 1])


@pytest.mark.parametrize("where", ["h", ("h",), Site("0"), Site("0", leaf="h"), Site("1", "input")])
def test_an_entry_is_edited_before_the_next_stage(where):
    net = pipeline()
    td = patch(net, {where: Replace(0.5)})(batch())
    assert td["h"].eq(0.5).all()
    assert td["y"].allclose(net[2].module(torch.tanh(torch.full((5, 3), 0.5))))


def fill(value, td):
    value.fill_(1.0)


@pytest.mark.parametrize("edit", [Replace("donor"), Replace(1.0), lambda value, td: value * 0 + 1, fill])
def test_an_entry_that_the_model_reads_is_edited_before_it(edit):
    net = pipeline()
    td = batch(donor=torch.ones(5, 4))
    before = entries(td)
    m = patch(net, {"x": edit})
    assert m.in_keys == (["x", "donor"] if edit == Replace("donor") else ["x"])
    assert m(td)["y"].equal(net(TensorDict(x=torch.ones(5, 4), batch_size=[5]))["y"])
    after = entries(td)
    assert {key: after[key] for key in before} == before


def test_edits_of_what_the_model_reads_and_writes():
    net = TensorDictModule(lambda x: x + 1, ["x"], ["x"])
    assert patch(net, {"x": Replace(5.0)})(batch())["x"].eq(5).all(), "after the stage that writes it"


@pytest.mark.parametrize("edit", [halve, Add(1.0)])
def test_a_callable_gets_the_tensordict(edit):
    seen = []

    def look(value, td):
        seen.append(td)
        return edit(value, td)

    td = batch()
    patch(mlp(), {Site("0"): look})(td)
    assert seen[0] is td


def test_a_callable_may_name_what_it_reads():
    def edit(value, td):
        return value * td["factor"].unsqueeze(-1)

    edit.in_keys = ["factor"]
    m = patch(mlp(), {Site("0"): edit})
    assert m.in_keys == ["x", "factor"]
    td = batch(factor=torch.arange(5.0))
    assert (m.program + Capture("0")).on(mlp())(td)["activation", "0"][0].eq(0).all()


def test_whole_numbers_stay_whole():
    net = TensorDictModule(nn.Embedding(9, 3), ["x"], ["y"])
    td = TensorDict(x=torch.tensor([1, 2]), batch_size=[2])
    assert patch(net, {"x": Add(2)})(td.copy())["y"].equal(net.module(torch.tensor([3, 4])))
    assert patch(net, {"x": Replace(4.0)})(td.copy())["y"].equal(net.module(torch.tensor([4, 4])))
    with pytest.raises(BadType, match="gives a fraction to whole numbers"):
        patch(net, {"x": Scale(0.5)})(td.copy())


# ---------------------------------------------------------------------------------------------------- what is refused


def test_nothing_and_no_target():
    with pytest.raises(BadValue, match="nothing to capture") as error:
        Capture()
    assert 'capture(model, "**")' in str(error.value)
    with pytest.raises(BadType, match="not a Target"):
        Capture("0", gradients="y")
    with pytest.raises(BadValue, match="not a site"):
        Capture("")
    with pytest.raises(BadValue, match="not a site"):
        Capture(3)


@pytest.mark.parametrize("edits", [{}, None, [(Site("0"), Scale(2.0))], Scale(2.0)])
def test_what_is_no_mapping(edits):
    with pytest.raises(BadType, match="not a mapping of edits"):
        Patch(edits)


@pytest.mark.parametrize("edit", [0.0, torch.zeros(3), "donor", None])
def test_what_is_no_edit(edit):
    with pytest.raises(BadType, match="is none") as error:
        Patch({Site("0"): edit})
    assert f"Replace({edit!r})" in str(error.value)


@pytest.mark.parametrize("where", ["nope", "0", ("a", "b"), ""])
def test_places_that_are_none(where):
    net = mlp()
    before = snapshot(net)
    with pytest.raises(BadKey) as error:
        patch(net, {where: Scale(2.0)})
    assert where != "0" or "Site('0') names a module" in str(error.value)
    assert snapshot(net) == before


def test_programs_that_do_not_go_together():
    net = mlp()
    with pytest.raises(BadKey, match="written under one key"):
        (Capture("0") + Capture("0")).on(net)
    with pytest.raises(BadValue, match="stops early"):
        (Capture("0", stop=True) + Patch({Site("0"): Scale(2.0)})).on(net)
    with pytest.raises(BadValue, match="gradients of one target at a time"):
        (Capture("0", gradients=Target("y", 0)) + Capture("1", gradients=Target("y", 1))).on(net)
    with pytest.raises(BadValue, match="no gradients of an output"):
        Capture("0", stop=True, gradients=Target("y", 0))


@pytest.mark.parametrize("missing", ["x", "donor"])
def test_entries_that_are_missing(missing):
    net, td = mlp(), batch(donor=torch.ones(5, 3))
    before = snapshot(net)
    del td[missing]
    with pytest.raises(BadKey, match=f"no entry '{missing}'"):
        patch(net, {Site("0"): Replace("donor")})(td)
    td = batch().rename_key_("x", "observation")
    with pytest.raises(BadKey, match="no entry 'x'"):
        patch(net, {"x": Scale(2.0)})(td)
    assert snapshot(net) == before


def test_checked_edit():
    old = torch.zeros(2, 3)
    assert checked_edit(old, old, "site") is old
    assert checked_edit(torch.zeros(2, 3, dtype=torch.float64), old, "site").dtype == torch.float32
    for new, got in ((torch.zeros(3, 2), "shape [3, 2]"), (3.0, "a float"), (None, "a NoneType"), ([old], "a list")):
        with pytest.raises(BadValue, match="the edit at 'site' gave another shape") as error:
            checked_edit(new, old, "site")
        assert got in str(error.value)
        assert "shape [2, 3]" in str(error.value)
