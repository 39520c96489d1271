"""The conformance scenarios of hooks: which value is read and changed, and what is an error."""

import pytest
import torch
from hooks.nets import Twice, batch, entries, hook_count, linear, mlp, pipeline, snapshot, twice
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Ablate, Add, Capture, Patch, Pullback, Replace, Scale, Site, Target, capture, patch

x3 = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]])


def rows(**more):
    return TensorDict(x=x3.clone(), **more, batch_size=[2])


# ---------------------------------------------------------------------------------------------------- order


def test_07_two_edits_on_one_site_in_their_order():
    net = mlp()
    h = net.module[0](batch()["x"])
    add_scale = capture(net, "0").program
    for first, second, expected in ((Add(1.0), Scale(2.0), (h + 1) * 2), (Scale(2.0), Add(1.0), h * 2 + 1)):
        one, two = Patch({Site("0"): first}), Patch({Site("0"): second})
        assert (one + two + add_scale).on(net)(batch())["activation", "0"].equal(expected)
        with one.on(net) as outer, two.on(net) as inner, add_scale.on(net) as m:
            assert m(batch())["activation", "0"].equal(expected), "the outer context comes before the inner one"
            for by in (outer, inner, net):
                assert by(batch())["y"].equal(net.module[2].forward(torch.tanh(expected)))


def test_08_a_capture_after_an_edit_sees_the_edited_value():
    net = mlp()
    h = net.module[0](batch()["x"])
    with patch(net, {Site("0"): Add(1.0)}), capture(net, "0") as m:
        assert m(batch())["activation", "0"].equal(h + 1)
    with capture(net, "0") as m, patch(net, {Site("0"): Add(1.0)}):
        assert m(batch())["activation", "0"].equal(h)
    before, after = (Capture("0") + Patch({Site("0"): Add(1.0)})), (Patch({Site("0"): Add(1.0)}) + Capture("0"))
    assert before.on(net)(batch())["activation", "0"].equal(h)
    assert after.on(net)(batch())["activation", "0"].equal(h + 1)


def test_08_a_capture_before_an_edit_in_place_is_right():
    net = mlp()
    h = net.module[0](batch()["x"])

    def edit(value, td):
        value.zero_()

    with capture(net, "0") as m, patch(net, {Site("0"): edit}):
        assert m(batch())["activation", "0"].equal(h)
    assert (Capture("0") + Patch({Site("0"): edit})).on(net)(batch())["activation", "0"].equal(h)


def test_32_sites_are_named_in_any_order():
    net = mlp()
    expected = capture(net, "0", "1", "2")(batch())
    for sites in (("2", "0", "1"), ("1", "2", "0")):
        td = capture(net, *sites, gradients=Target("y", 0))(batch())
        for site in sites:
            assert td["activation", site].equal(expected["activation", site])
    edits = {Site("0"): Add(1.0), Site("2"): Scale(2.0)}
    there, back = Patch(edits).on(net)(batch()), Patch(dict(reversed(edits.items()))).on(net)(batch())
    assert there["y"].equal(back["y"])


# ---------------------------------------------------------------------------------------------------- several calls


def twice_by_hand(x, net, edit0=lambda v: v, edit1=lambda v: v):
    layer, tail = net.module.layer, net.module.tail
    first = edit0(nn.functional.linear(x, layer.weight, layer.bias))
    second = edit1(nn.functional.linear(torch.tanh(first), layer.weight, layer.bias))
    return first, second, nn.functional.linear(second, tail.weight, tail.bias)


def test_13_a_module_called_twice_captures_each_call():
    net = twice()
    first, second, y = twice_by_hand(x3, net)
    for call, expected in (
        (0, first),
        (1, second),
        (-1, second),
        (-2, first),
        ("all", torch.stack([first, second], 1)),
    ):
        td = capture(net, Site("layer", call=call))(rows())
        assert td["activation", f"layer@{call}"].equal(expected)
        assert td["y"].equal(y)
    td = capture(net, "layer@0", "layer@1", "tail")(rows())
    assert td["activation", "layer@0"].equal(first)
    assert td["activation", "layer@1"].equal(second)


def test_13_a_capture_that_does_not_say_which_call_raises():
    net = twice()
    before = snapshot(net)
    for m in (capture(net, "layer"), capture(net, "layer:in"), capture(net, "layer", gradients=Target("y", 0))):
        with pytest.raises(BadValue, match=r"'layer.*runs several times") as error:
            m(rows())
        assert "call=0" in str(error.value)
    with pytest.raises(BadValue, match="runs several times"):
        Pullback(net, Target(Site("layer"), 0))(rows())
    for call in (2, -3):
        with pytest.raises(BadValue, match="ran 2 times only"):
            capture(net, Site("layer", call=call))(rows())
    assert snapshot(net) == before


@pytest.mark.parametrize("call", [0, 1, -1])
def test_13_gradients_of_a_module_called_twice(call):
    net = twice()
    first, second, y = twice_by_hand(x3, net)
    expected = torch.autograd.grad(y[:, 1].sum(), [first, second])[call % 2]
    assert Pullback(net, Target("y", 1), Site("layer", call=call)).gradients(rows())[0].equal(expected)
    x = x3.clone().requires_grad_()
    of_layer = torch.autograd.grad(twice_by_hand(x, net)[call % 2][:, 2].sum(), x)[0]
    assert Pullback(net, Target(Site("layer", call=call), 2)).gradients(rows())[0].equal(of_layer)


@pytest.mark.parametrize("call", [-2, "all"])
def test_13_gradients_are_taken_at_one_call_counted_from_the_start_or_the_last(call):
    net = twice()
    for make in (
        lambda: Pullback(net, Target("y", 1), Site("layer", call=call)),
        lambda: Pullback(net, Target(Site("layer", call=call), 0)),
        lambda: capture(net, Site("layer", call=call), gradients=Target("y", 0)),
    ):
        with pytest.raises(BadValue, match="'layer@"):
            make()


def test_14_a_module_called_twice_edits_each_call_unless_one_is_named():
    net = twice()
    plain = net(rows())["y"]

    def edit(v):
        return v * 3

    for call, edits in ((None, (edit, edit)), ("all", (edit, edit)), (0, (edit,)), (1, (lambda v: v, edit))):
        expected = twice_by_hand(x3, net, *edits)[2]
        with patch(net, {Site("layer", call=call): Scale(3.0)}) as m:
            for by in (m, net, m, net):  # the count starts anew at each forward
                assert by(rows())["y"].equal(expected), call
    assert net(rows())["y"].equal(plain)
    with pytest.raises(BadValue, match="can't know which call will be the last"):
        patch(net, {Site("layer", call=-1): Scale(3.0)})
    with pytest.raises(BadValue, match="ran 2 times only"):
        patch(net, {Site("layer", call=2): Scale(3.0)})(rows())


def test_15_patching_a_reused_module_leaves_the_clean_pass_alone():
    net = twice()
    clean, other = rows(), TensorDict(x=x3.flip(0), batch_size=[2])
    expected = net(clean.copy())["y"]
    with capture(net, "layer@0") as m:
        donor = m(other)["activation", "layer@0"]
    with patch(net, {Site("layer", call=0): Replace("donor")}) as m:
        patched = m(clean.copy().set("donor", donor))["y"]
    assert patched.equal(other["y"]), "everything after the donor's activation is the donor's"
    assert net(clean)["y"].equal(expected)


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = linear(4, 3, 0), linear(3, 2, 1)
        self.alias = self.first

    def forward(self, x):
        return self.last(self.alias(x))


def test_16_a_module_with_two_names():
    net = TensorDictModule(Aliased(), ["x"], ["y"])
    h = net.module.first(batch()["x"])
    for name in ("first", "alias"):
        assert Patch({Site(name): Replace(0.0)}).on(net)(batch())["y"].equal(net.module.last(torch.zeros(5, 3)))
        td = (Patch({Site("first"): Add(1.0)}) + Capture(name)).on(net)(batch())
        assert td["activation", name].equal(h + 1), "an edit under one name is seen under the other"
    both = capture(net, "first", "alias")(batch())
    assert both["activation", "first"].equal(both["activation", "alias"])
    names = [key[1] for key in capture(net, "*").out_keys if key[0] == "activation"]
    assert names == ["first", "last"], "a glob names each module once"


# ---------------------------------------------------------------------------------------------------- in place


class InPlace(nn.Module):
    """Overwrites the output of its first layer by a functional call, which no module announces."""

    def __init__(self):
        super().__init__()
        self.first, self.last = linear(4, 3, 0), linear(3, 2, 1)

    def forward(self, x):
        return self.last(torch.relu_(self.first(x)))


@pytest.mark.parametrize("gradients", [None, Target("y", 1), Target("y", [0, 1])])
def test_17_an_inplace_module_after_the_site(gradients):
    net = mlp(act=nn.ReLU(inplace=True))
    h = net.module[0](batch()["x"]).detach()
    td = capture(net, "0", gradients=gradients)(batch())
    assert td["activation", "0"].equal(h)
    if gradients is not None:
        several = isinstance(gradients.select, list)
        weight = net.module[2].weight.detach() if several else net.module[2].weight[1].detach()
        mask = (h > 0).float()
        assert td["gradient", "0"].allclose(mask.unsqueeze(1) * weight if several else mask * weight)


def test_17_an_inplace_call_after_the_site():
    net = TensorDictModule(InPlace(), ["x"], ["y"])
    h = net.module.first(batch()["x"]).detach()
    with pytest.raises(BadValue, match="'first' was overwritten by an in-place operation") as error:
        capture(net, "first")(batch())
    assert "clone=True" in str(error.value)
    td = capture(net, "first", clone=True, gradients=Target("y", 1))(batch())
    assert td["activation", "first"].equal(h)
    assert td["gradient", "first"].equal((h > 0) * net.module.last.weight[1].detach())
    assert Pullback(net, Target("y", 1), Site("first")).gradients(batch())[0].equal(td["gradient", "first"])


def test_17_a_target_before_an_inplace_call():
    net = TensorDictModule(InPlace(), ["x"], ["y"])
    gradient = Pullback(net, Target(Site("first"), 2)).gradients(batch())[0]
    assert gradient.equal(net.module.first.weight[2].detach().expand(5, 4))


def test_18_an_edit_in_place_that_returns_none_is_applied():
    net = mlp()

    def edit(value, td):
        value[:, 1] = 7.0

    def edit_part(value, td):
        value.fill_(7.0)

    expected = net.module[0](batch()["x"]).detach()
    expected[:, 1] = 7.0
    with torch.no_grad():
        for program in (Patch({Site("0"): edit}), Patch({Site("0", index=1): edit_part})):
            assert (program + Capture("0")).on(net)(batch())["activation", "0"].equal(expected)
            with program.on(net), capture(net, "0") as m:
                assert m(batch())["activation", "0"].equal(expected)
    assert patch(net, {Site("0"): edit})(batch())["y"].requires_grad, "and with gradients"


# ---------------------------------------------------------------------------------------------------- edits


def test_26_gradients_flow_through_an_edit():
    net = mlp()
    w0, w2 = net.module[0].weight.detach(), net.module[2].weight.detach()
    td = batch()
    td["x"].requires_grad_()
    with patch(net, {Site("1"): Replace(2.0), Site("0"): Scale(2.0)}) as m:
        assert torch.autograd.grad(m(td)["y"].sum(), td["x"], allow_unused=True)[0] is None
    with patch(net, {Site("1"): Scale(2.0)}) as m:
        gradient = torch.autograd.grad(m(td)["y"][:, 0].sum(), td["x"])[0]
    slope = 1 - torch.tanh(net.module[0](td["x"])).detach() ** 2
    torch.testing.assert_close(gradient, (slope * 2 * w2[0]) @ w0)
    with patch(net, {Site("1"): Scale(2.0)}):
        torch.testing.assert_close(Pullback(net, Target("y", 0)).gradients(batch())[0], gradient)


@pytest.mark.parametrize("edit", [Replace(torch.ones(3)), Add(torch.ones(3)), Scale(torch.full((3,), 0.5))])
def test_27_under_autocast_the_site_keeps_its_dtype(edit):
    net, seen = mlp(), []
    net.module[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), patch(net, {Site("0"): edit}) as m, capture(net, "0") as c:
        m(batch())
        td = c(batch())
    assert seen == [torch.bfloat16] * 2
    assert td["activation", "0"].dtype == torch.bfloat16
    assert capture(net, "0")(batch())["activation", "0"].dtype == torch.float32


def test_27_a_float64_replacement_takes_the_dtype_of_the_site():
    net = mlp()
    with patch(net, {Site("0"): Replace(torch.ones(3, dtype=torch.float64)), Site("2"): lambda v, td: v.double()}) as m:
        assert m(batch())["y"].dtype == torch.float32


def test_29_a_site_that_never_runs():
    net = mlp()
    net.module.unused = nn.Linear(3, 3)
    net.module.forward = lambda x: nn.Sequential.forward(net.module[:3], x)
    before = snapshot(net)
    for program in (
        Capture("unused"),
        Patch({Site("unused"): Scale(0.0)}),
        Capture("0", "unused:in", gradients=Target("y", 0)),
    ):
        with pytest.raises(BadValue, match=r"the site 'unused.* never ran"):
            program.on(net)(batch())
    with pytest.raises(BadValue, match="the site 'unused' never ran"):
        Pullback(net, Target("y", 0), Site("unused")).gradients(batch())
    with pytest.raises(BadValue, match="the site 'unused' never ran"):
        Pullback(net, Target(Site("unused"), 0)).gradients(batch())
    with pytest.raises(BadValue, match="the site 'unused' never ran"), patch(net, {Site("unused"): Scale(0.0)}):
        net(batch())
    with patch(net, {Site("unused"): Scale(0.0)}):
        pass  # no forward, no complaint
    assert snapshot(net) == before


@pytest.mark.parametrize(
    "edit",
    [
        Replace(torch.ones(7)),
        Replace(torch.ones(1, 3)),
        Replace(torch.ones(5, 1)),
        Add(torch.ones(2, 5, 3)),
        lambda value, td: value[:1],
        lambda value, td: value.sum(-1, keepdim=True),
        lambda value, td: "text",
    ],
)
def test_30_a_replacement_of_another_shape(edit):
    net = mlp()
    before = snapshot(net)
    with pytest.raises(BadValue, match=r"[53]") as error, patch(net, {Site("0"): edit}) as m:
        m(batch())
    text = str(error.value)
    assert "got:" in text
    assert "needed:" in text
    assert "'0'" in text or "Replace" in text or "Add" in text
    assert snapshot(net) == before


def test_33_a_parameter_is_a_replacement_and_gets_its_gradient():
    net = mlp()
    steering = nn.Parameter(torch.zeros(3))
    with patch(net, {Site("1"): Replace(steering)}) as m:
        m(batch())["y"].sum().backward()
    torch.testing.assert_close(steering.grad, 5 * net.module[2].weight.detach().sum(0))


class Tagged(torch.Tensor):
    pass


def test_33_a_subclass_of_tensor_is_a_replacement():
    net = mlp()
    value = torch.arange(3.0).as_subclass(Tagged)
    y = patch(net, {Site("1"): Replace(value)})(batch())["y"]
    assert y.as_subclass(torch.Tensor).allclose(net.module[2](torch.arange(3.0)).expand(5, 2))


@pytest.mark.parametrize("model", [mlp, pipeline])
def test_34_the_root_as_a_site(model):
    net = model()
    y = net(batch())["y"]
    root = Site(".", leaf="y")
    assert capture(net, root)(batch())["activation", root.key].equal(y)
    with patch(net, {root: Scale(2.0)}) as m:
        assert m(batch())["y"].equal(2 * y)
        assert net(batch())["y"].equal(2 * y)
    assert capture(net, Site(".", "input"))(batch())["activation", ".:in"].equal(batch()["x"])
    gradient = Pullback(net, Target(root, 0)).gradients(batch())[0]
    assert gradient.equal(Pullback(net, Target("y", 0)).gradients(batch())[0])


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = linear(4, 3, 0), linear(3, 2, 1)

    def forward(self, x):
        return self.last(self.first.forward(x))


def test_46_forward_called_directly_is_an_error_that_says_so():
    net = TensorDictModule(CallsForward(), ["x"], ["y"])
    for program in (Capture("first"), Patch({Site("first"): Replace(0.0)}), Capture("first", gradients=Target("y", 0))):
        with pytest.raises(BadValue, match="the site 'first' never ran") as error:
            program.on(net)(batch())
        assert ".forward() is called directly" in str(error.value)
    assert not hook_count(net)


# ---------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("n", [3, 5])
def test_values_from_keys_are_rows(n):
    net = mlp()
    td = batch(n, donor=torch.randn(n, 3))
    with patch(net, {Site("0"): Replace("donor")}) as m:
        together = m(td.copy())["y"]
        alone = torch.cat([m(td[i : i + 1].copy())["y"] for i in range(n)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("edit", [Scale("factor"), Add("factor"), Replace("factor")])
def test_one_number_a_row_from_a_key(n, edit):
    net = mlp()
    td = batch(n, factor=torch.arange(float(n)))
    value, factor = net.module[0](td["x"]), td["factor"].unsqueeze(-1)
    expected = {Scale: value * factor, Add: value + factor, Replace: factor.expand(n, 3)}[type(edit)]
    assert (Patch({Site("0"): edit}) + Capture("0")).on(net)(td)["activation", "0"].equal(expected)


def test_nan_in_an_untouched_place_stays_there():
    net = mlp()
    td = batch()
    td["x"][2] = torch.nan
    for edit in (Replace(1.0), Scale(0.5), Ablate([1])):
        h = (Patch({Site("0", index=slice(0, 2)): edit}) + Capture("0")).on(net)(td.copy())["activation", "0"]
        clean = (Patch({Site("0", index=slice(0, 2)): edit}) + Capture("0")).on(net)(batch())["activation", "0"]
        others = torch.tensor([0, 1, 3, 4])
        assert h[others].equal(clean[others])
        assert h[2, 2].isnan()
    everything = (Patch({Site("0"): Replace(1.0)}) + Capture("0")).on(net)(td.copy())["activation", "0"]
    assert everything.eq(1).all(), "and a replaced NaN is gone"
    units = (Patch({Site("0"): Ablate([0, 2])}) + Capture("0")).on(net)(td.copy())["activation", "0"]
    assert units[2].isnan().tolist() == [False, True, False]


def test_entries_other_than_out_keys_are_left_alone():
    net = pipeline()
    td = batch(other=torch.ones(5), locked=TensorDict(a=torch.ones(5), batch_size=[5]))
    before = entries(td)
    program = Patch({"h": Scale(2.0), Site("2", leaf="y"): Add(1.0)}) + Capture("1", gradients=Target("y", 0))
    m = program.on(net)
    assert m(td) is td
    after = entries(td)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == set(m.out_keys)


def test_a_model_that_is_none():
    for model in (nn.Linear(4, 2), lambda td: td, None):
        with pytest.raises(BadType, match="not a TensorDictModule") as error:
            capture(model, "0")
        assert "TensorDictModule(module, in_keys=" in str(error.value)
    sequential = TensorDictSequential(*pipeline())
    assert capture(sequential, "0")(batch())["activation", "0"].shape == (5, 3)
    assert Twice()(x3).shape == (2, 2)
