"""The conformance scenarios of hooks, part 3: what torch does around a forward, and the forms of a call."""

import contextlib
import re

import pytest
import torch
from hooks.nets import batch, hook_count, linear, mlp, pipeline, snapshot, twice
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleWrapper,
    TensorDictSequential,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Add, Pullback, Replace, Scale, Site, Target, anchor, capture, patch


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- gradient modes


def test_25_captures_carry_no_graph():
    net = mlp()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            td = capture(net, "0", "1:in", gradients=Target("y", 0))(batch())
        assert not any(td["activation", site].requires_grad for site in ("0", "1:in"))
        assert not td["gradient", "0"].requires_grad
        assert td["gradient", "0"].abs().sum() > 0, "gradients are there in a collector's no_grad"


@pytest.mark.parametrize("site", [Site("layer", call=0), Site("layer", call="all")])
def test_25_captures_of_inference_mode_are_normal_tensors(site):
    net = twice()
    with torch.inference_mode():
        td = capture(net, site)(batch(features=3))
    value = td["activation", site.key]
    assert not value.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (value * weight).sum().backward()  # refuses inference tensors
    assert weight.grad.allclose(value.reshape(-1, 3).sum(0))


@pytest.mark.parametrize("made_inside", [False, True])
def test_25_gradients_inside_inference_mode(made_inside):
    net, td = mlp(), batch()
    expected = capture(net, "0", gradients=Target("y", 0))(batch())
    with torch.inference_mode():
        td = capture(net, "0", gradients=Target("y", 0))(batch() if made_inside else td)
    assert td["gradient", "0"].equal(expected["gradient", "0"])
    assert td["activation", "0"].equal(expected["activation", "0"])


# ---------------------------------------------------------------------------------------------------- transforms


def test_35_vmap_over_the_value_of_an_edit():
    net, values, td = mlp(), torch.randn(6, 3), batch()

    def edited(value):
        with patch(net, {Site("1"): Replace(value)}) as m:
            return m(td.copy())["y"]

    torch.testing.assert_close(torch.vmap(edited)(values), net.module[2](values).unsqueeze(1).expand(6, 5, 2))
    assert not hook_count(net)


def test_35_vmap_over_the_value_of_an_edit_at_a_part():
    net, values, td = mlp(), torch.randn(6), batch()

    def edited(value):
        program = patch(net, {Site("1", index=2): Replace(value)}).program + capture(net, "1").program
        return program.on(net)(td.copy())["activation", "1"]

    expected = torch.tanh(net.module[0](batch()["x"])).expand(6, 5, 3).clone()
    expected[..., 2] = values.unsqueeze(-1)
    torch.testing.assert_close(torch.vmap(edited)(values), expected)


def test_35_vmap_over_rows_returns_captures_and_leaks_none():
    net = mlp()

    def captured(x):
        td = capture(net, "0", gradients=Target("y", 1))(TensorDict(x=x, batch_size=[]))
        return td["activation", "0"], td["gradient", "0"]

    expected = capture(net, "0", gradients=Target("y", 1))(batch())
    activation, gradient = torch.vmap(captured)(batch()["x"])
    torch.testing.assert_close(activation, expected["activation", "0"])
    torch.testing.assert_close(gradient, expected["gradient", "0"])
    with capture(net, "0") as m:
        torch.vmap(lambda x: m(TensorDict(x=x, batch_size=[]))["y"])(batch()["x"])
        td = m(batch())
    assert td["activation", "0"].equal(expected["activation", "0"]), "no value of the vmap stays in the context"


def test_35_vmap_over_whole_tensordicts():
    net = mlp()
    m = capture(net, "0")
    td = torch.vmap(m)(batch(6, 5))
    assert td.batch_size == (6, 5)
    torch.testing.assert_close(td["activation", "0"], net.module[0](td["x"]))


def test_35_stacked_parameters():
    """``functional_call`` and ``to_module``: the hooks fire with the parameters of the call."""
    net, other = mlp(), mlp()
    with torch.no_grad():
        other.module[0].weight.mul_(-1)
    stacked = torch.stack([TensorDict.from_module(net), TensorDict.from_module(other)])
    with patch(net, {Site("1"): Scale(2.0)}) as m:

        def run(params, td):
            with params.to_module(net):
                return m(td)["y"]

        both = torch.vmap(run, (0, None))(stacked, batch())
        one = torch.func.functional_call(net, dict(other.named_parameters()), (batch(),))["y"]
    with patch(other, {Site("1"): Scale(2.0)}) as m:
        torch.testing.assert_close(both[1], m(batch())["y"])
        torch.testing.assert_close(one, both[1])


class Maps(nn.Module):
    """Its body gives a dict, which module backward hooks never see."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear(4, 3, 0)

        def forward(self, x):
            return {"h": self.linear(x), "x": x}

    def __init__(self):
        super().__init__()
        self.body, self.head = self.Body(), linear(3, 2, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)["h"]))


def test_44_gradient_sites_in_dicts():
    net = TensorDictModule(Maps(), ["x"], ["y"])
    site = Site("body", leaf="h")
    td = capture(net, site, gradients=Target("y", [0, 1]))(batch())
    h = net.module.body.linear(batch()["x"])
    slope = (1 - torch.tanh(h).detach() ** 2).unsqueeze(1) * net.module.head.weight.detach()
    torch.testing.assert_close(td["gradient", site.key], slope)


@pytest.mark.parametrize("wrt", ["x", Site("1"), Site("0", index=2), Site("2", "input")])
def test_44_gradients_under_func_grad_and_jacrev(wrt):
    net = mlp()
    x = batch()["x"][0]
    pull = Pullback(net, Target("y", 1), wrt)

    def gradient(x):
        return pull.gradients(TensorDict(x=x, batch_size=[]), create_graph=True)[0]

    def reference(x):
        h = net.module[0](x)
        z = torch.tanh(h)
        slope = net.module[2].weight[1]
        return {
            "x": (slope * (1 - z**2)) @ net.module[0].weight,
            "0[2]": (slope * (1 - z**2))[2],
            "1": slope + 0 * z,
            "2:in": slope + 0 * z,
        }[str(wrt)]

    torch.testing.assert_close(gradient(x), reference(x))
    torch.testing.assert_close(torch.func.jacrev(gradient)(x), torch.func.jacrev(reference)(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: gradient(x).sum())(x), torch.func.grad(lambda x: reference(x).sum())(x)
    )


def test_44_func_grad_through_edits_and_captures():
    net = mlp()
    vector = torch.zeros(3)

    def steered(vector):
        with patch(net, {Site("1"): Add(vector)}), capture(net, "1", detach=False) as m:
            td = m(batch())
        return td["y"][:, 0].sum() + td["activation", "1"].sum()

    expected = 5 * (net.module[2].weight[0] + 1)
    torch.testing.assert_close(torch.func.grad(steered)(vector), expected)
    torch.testing.assert_close(torch.func.jacrev(steered)(vector), expected)


# ---------------------------------------------------------------------------------------------------- compiled models


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("how", ["module.compile()", "torch.compile", "root.compile()"])
def test_36_a_model_compiled_before_entering_is_right_or_an_error(how):
    net = mlp()
    plain = net(batch())["y"]
    if how == "torch.compile":
        net.module = torch.compile(net.module, backend="eager")
    else:
        (net if how == "root.compile()" else net.module).compile(backend="eager")
    net(batch())
    before = snapshot(net)
    for m in (capture(net, "0"), patch(net, {Site("1"): Scale(0.0)}), capture(net, "2:in", gradients=Target("y", 0))):
        with pytest.raises(BadValue, match="compiled before the hooks came") as error:
            m(batch())
        assert "anchor(model, '" in str(error.value)
        with pytest.raises(BadValue, match="compiled before the hooks came"), m:
            pytest.fail("entered")
    with pytest.raises(BadValue, match="compiled before the hooks came"):
        Pullback(net, Target("y", 0), Site("1")).gradients(batch())
    assert snapshot(net) == before
    assert net(batch())["y"].equal(plain)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("direct", [False, True], ids=["by m", "directly"])
def test_36_a_model_compiled_after_binding_is_right_or_an_error(direct):
    net = mlp()
    contexts = [patch(net, {Site("0"): Replace(0.0)}), patch(net, {Site("2"): Replace(5.0)})] * 2
    expected = [m(batch())["y"] for m in contexts]
    net.module = torch.compile(net.module, backend="eager")
    net(batch())
    for m, y in zip(contexts, expected, strict=True):
        try:
            with m:
                found = (net if direct else m)(batch())["y"]
        except BadValue:  # "never ran": loud
            continue
        assert found.equal(y)


@pytest.mark.usefixtures("dynamo")
def test_36_an_anchored_model_obeys_contexts_entered_later():
    net, reference = mlp(), mlp()
    held = anchor(net, "*", "1:in")
    net.module = torch.compile(net.module, backend="eager", fullgraph=True)
    plain = net(batch())["y"]
    programs = [
        patch(reference, {Site("0"): Scale(2.0)}).program,
        patch(reference, {Site("0"): Scale(3.0)}).program,
        patch(reference, {Site("1", "input"): Add(1.0), Site("2"): Scale(2.0)}).program,
    ]
    for program in [*programs, *programs]:
        expected = program.on(reference)(batch())["y"]
        with program.on(net) as m:
            for by in (m, net):
                torch.testing.assert_close(by(batch())["y"], expected)
        torch.testing.assert_close(net(batch())["y"], plain)
    held.remove()
    assert not hook_count(net)


MOVES = [{Site("0"): Scale(2.0)}, {Site("1"): Scale(0.5)}, {Site("0"): Scale(3.0)}, {Site("0"): Scale(2.0)}]


def quietly_wrong(net, call):
    """Whether some context gave another result in compiled code than in eager code, and no error."""
    reference, wrong = mlp(), []
    plain = call(batch())
    for edits in MOVES:
        found = None
        with contextlib.suppress(BadValue):  # "never ran" comes at the exit, at the latest
            with patch(net, edits):
                value = call(batch())
            found = value
        wrong.append(found is not None and not found.allclose(patch(reference, edits)(batch())["y"]))
        assert call(batch()).equal(plain)
    return any(wrong)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_36_the_compiled_form_of_a_model_is_right_or_an_error(fullgraph):
    """``torch.compile(net)`` is another object, which knows ``net`` and is not known by it."""
    net = mlp()
    compiled = torch.compile(net, backend="eager", fullgraph=fullgraph)
    assert not quietly_wrong(net, lambda td: compiled(td)["y"])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    "anchored",
    [True, pytest.param(False, marks=pytest.mark.xfail(strict=True, reason="torch gives no sign: see anchor"))],
)
def test_36_a_compiled_function_that_calls_the_model(anchored):
    net = mlp()
    held = anchor(net, "*") if anchored else None
    assert not quietly_wrong(net, torch.compile(lambda td: net(td)["y"], backend="eager", fullgraph=True))
    if held is not None:
        held.remove()


@pytest.mark.usefixtures("dynamo")
def test_37_two_compiled_instances_one_of_them_hooked():
    """Torch shares graphs between instances of a class; without anchors the edited one runs the other's graph."""
    plain, edited = mlp(), mlp()
    expected = patch(mlp(), {Site("0"): Scale(2.0)})(batch())["y"]
    for net in (plain, edited):
        anchor(net, "0")
        net.module = torch.compile(net.module, backend="eager", fullgraph=True)
    y = plain(batch())["y"]
    with patch(edited, {Site("0"): Scale(2.0)}) as m:
        for _ in range(2):
            torch.testing.assert_close(m(batch())["y"], expected)
            torch.testing.assert_close(edited(batch())["y"], expected)
            torch.testing.assert_close(plain(batch())["y"], y)
    torch.testing.assert_close(edited(batch())["y"], y)


@pytest.mark.usefixtures("dynamo")
def test_37_two_compiled_contexts():
    one, two = patch(mlp(), {Site("0"): Scale(2.0)}), patch(mlp(), {Site("1"): Scale(0.0)})
    plain = mlp()
    expected = [m(batch())["y"] for m in (plain, one, two)]
    with one, two:
        compiled = [torch.compile(m, backend="eager", fullgraph=True) for m in (plain, one, two)]
        for _ in range(2):
            for m, y in zip(compiled, expected, strict=True):
                torch.testing.assert_close(m(batch())["y"], y)


# ---------------------------------------------------------------------------------------------------- long runs


@pytest.mark.parametrize("gradients", [None, Target("y", 0)])
def test_39_many_steps_in_one_context_with_constant_memory(gradients):
    net, alive, most = mlp(), [], 0
    x = torch.zeros(1, 4)
    with capture(net, "0", "1", gradients=gradients) as m, patch(net, {Site("2"): Scale(0.5)}):
        for step in range(1000):
            td = m(TensorDict(x=x, batch_size=[1]))
            alive = [storage for storage in alive if not storage.expired()]
            alive += [StorageWeakRef(td["activation", site].untyped_storage()) for site in ("0", "1")]
            most = max(most, len(alive))
            x = (x + td["y"].sum().detach()) / (1 + step)
    assert most <= 4, "the captures of this step and of the last one"


def test_39_direct_calls_in_a_context_hold_nothing():
    net, made = mlp(), []
    net.module[0].register_forward_hook(lambda module, args, out: made.append(StorageWeakRef(out.untyped_storage())))
    with patch(net, {Site("1"): Scale(0.5)}), torch.no_grad():
        for _ in range(20):
            net(batch())
        assert [storage.expired() for storage in made] == [True] * 20


def test_39_direct_calls_in_a_capture_hold_nothing():
    net, made = mlp(), []
    net.module[0].register_forward_hook(lambda module, args, out: made.append(StorageWeakRef(out.untyped_storage())))
    with capture(net, "0"), torch.no_grad():
        for _ in range(20):
            net(batch())
        assert [storage.expired() for storage in made] == [True] * 20


def test_39_a_torchrl_rollout_with_captures_and_edits():
    envs = pytest.importorskip("torchrl.envs")
    data = pytest.importorskip("torchrl.data")

    class Walk(envs.EnvBase):
        """The observation moves by the action; a row is a walker."""

        def __init__(self):
            super().__init__(batch_size=[2])
            self.observation_spec = data.Composite(observation=data.Unbounded((2, 4)), shape=(2,))
            self.action_spec = data.Unbounded((2, 4))
            self.reward_spec = data.Unbounded((2, 1))

        def _reset(self, td=None, **kwargs):
            return TensorDict(observation=torch.ones(2, 4), batch_size=[2])

        def _step(self, td):
            observation = td["observation"] * 0.9 + td["action"]
            done = torch.zeros(2, 1, dtype=torch.bool)
            entries = {
                "observation": observation,
                "reward": observation.sum(-1, True),
                "done": done,
                "terminated": done,
            }
            return TensorDict(entries, batch_size=[2])

        def _set_seed(self, seed):
            return seed

    policy = TensorDictModule(
        nn.Sequential(linear(4, 3, 0), nn.Tanh(), linear(3, 4, 1)), in_keys=["observation"], out_keys=["action"]
    )
    env = Walk()
    plain = env.rollout(20, policy)
    with patch(policy, {Site("1"): Scale(0.5)}), capture(policy, "1", gradients=Target("action", 0)) as m:
        rollout = env.rollout(20, m)
        direct = env.rollout(20, policy)
    acted = policy.module[1](policy.module[0](rollout["observation"])) * 0.5
    assert rollout["activation", "1"].shape == (2, 20, 3)
    torch.testing.assert_close(rollout["activation", "1"], acted.detach())
    torch.testing.assert_close(rollout["action"], policy.module[2](acted).detach())
    torch.testing.assert_close(rollout["gradient", "1"], policy.module[2].weight[0].detach().expand(2, 20, 3))
    torch.testing.assert_close(direct["action"], rollout["action"])
    assert env.rollout(20, policy)["action"].equal(plain["action"])


# ---------------------------------------------------------------------------------------------------- wrappers of torch


@pytest.fixture
def one_process_group():
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def same_under_a_wrapper(wrapped):
    plain = mlp()
    assert wrapped(batch())["y"].allclose(plain(batch())["y"])
    for site in ("0", "1:in"):
        key = ("activation", site)
        assert capture(wrapped, site)(batch())[key].allclose(capture(plain, site)(batch())[key])
    with patch(wrapped, {Site("1"): Scale(2.0)}) as m, patch(plain, {Site("1"): Scale(2.0)}) as reference:
        assert m(batch())["y"].allclose(reference(batch())["y"])
        assert wrapped(batch())["y"].allclose(reference(batch())["y"])
    mine, theirs = (Pullback(net, Target("y", [0, 1]), Site("0")).gradients(batch())[0] for net in (wrapped, plain))
    torch.testing.assert_close(mine, theirs)
    assert capture(wrapped, "module.module.1")(batch())["activation", "module.module.1"].shape == (5, 3), (
        "the full path too"
    )
    assert not any("Tap" in type(hook).__name__ for m in wrapped.modules() for hook in m._forward_hooks.values())


@pytest.mark.usefixtures("one_process_group")
def test_40_distributed_data_parallel():
    wrapped = TensorDictModule(nn.parallel.DistributedDataParallel(mlp().module), ["x"], ["y"])
    same_under_a_wrapper(wrapped)
    with patch(wrapped, {Site("1"): Scale(2.0)}) as m:
        m(batch())["y"].sum().backward()
    expected = mlp()
    with patch(expected, {Site("1"): Scale(2.0)}) as m:
        m(batch())["y"].sum().backward()
    for mine, theirs in zip(wrapped.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore:.*DataParallel.*")
def test_40_data_parallel_on_cpu():
    same_under_a_wrapper(TensorDictModule(nn.DataParallel(mlp().module, device_ids=[]), ["x"], ["y"]))


def test_42_transformer_encoder_layer_in_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    net = TensorDictModule(layer, ["x"], ["y"])
    with torch.no_grad():
        fast = net(batch(3, 5, features=8))["y"]
        td = capture(net, "linear1", Site("self_attn", leaf=0))(batch(3, 5, features=8))
        torch.testing.assert_close(td["y"], fast)
        normed = layer.norm1(td["x"] + td["activation", "self_attn:out.0"])
        torch.testing.assert_close(td["activation", "linear1"], layer.linear1(normed))
        with patch(net, {Site("linear1"): Replace(-1.0)}) as m:
            torch.testing.assert_close(m(batch(3, 5, features=8))["y"], layer.norm2(normed + layer.linear2.bias))
        assert net(batch(3, 5, features=8))["y"].equal(fast)
    gradient = capture(net, "linear1", gradients=Target("y", (0,)))(batch(3, 5, features=8))["gradient", "linear1"]
    assert gradient.shape == (3, 5, 16)


def test_42_a_module_that_torch_never_calls():
    """``MultiheadAttention`` reads its out_proj's weight and never calls it."""
    net = TensorDictModule(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), ["x"], ["y"])
    with torch.no_grad(), pytest.raises(BadValue, match=r"'self_attn\.out_proj' never ran"):
        capture(net, "self_attn.out_proj")(batch(3, 5, features=8))


# ---------------------------------------------------------------------------------------------------- forms of a call


def actor():
    """hidden -> logits -> action, as torchrl has it."""
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Sequential(linear(4, 3, 0), nn.Tanh()), ["x"], ["h"]),
        TensorDictModule(linear(3, 2, 1), ["h"], ["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type=InteractionType.DETERMINISTIC,
            return_log_prob=True,
        ),
    )


EDITS = {
    "entry": {"h": Replace(torch.tensor([1.0, 2.0, 3.0]))},
    "stage": {Site("0"): Replace(torch.tensor([1.0, 2.0, 3.0]))},
    "inside": {Site("0.1"): Replace(torch.tensor([1.0, 2.0, 3.0]))},
    "input": {Site("1", "input"): Replace(torch.tensor([1.0, 2.0, 3.0]))},
}
FORMS = {
    "by m": lambda m, net, td: m(td)["logits"],
    "m by dispatch": lambda m, net, td: m(x=td["x"])[m.out_keys.index("logits")],
    "m in a sequential": lambda m, net, td: TensorDictSequential(m, TensorDictModule(nn.Tanh(), ["logits"], ["t"]))(td)[
        "logits"
    ],
    "directly": lambda m, net, td: net(td)["logits"],
    "by dispatch": lambda m, net, td: net(x=td["x"])[net.out_keys.index("logits")],
    "get_dist": lambda m, net, td: td.get("logits", net.get_dist(td).logits),
    "wrapper": lambda m, net, td: TensorDictModuleWrapper(net)(td)["logits"],
    "select_subsequence": lambda m, net, td: net.select_subsequence(out_keys=["logits"])(td)["logits"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edits", EDITS)
def test_45_edits_are_the_same_in_each_form_of_a_call(edits, form):
    net, td = actor(), batch()
    logits = net[1].module(torch.tensor([1.0, 2.0, 3.0])).expand(5, 2)
    if form == "get_dist":
        logits = logits.log_softmax(-1)
    with patch(net, EDITS[edits]) as m:
        for _ in range(2):
            found = FORMS[form](m, net, td.copy())
            torch.testing.assert_close(found.log_softmax(-1), logits.log_softmax(-1))


@pytest.mark.parametrize("form", [form for form in FORMS if "dispatch" not in form])  # tensors bring no donor
@pytest.mark.parametrize("where", ["h", Site("0"), Site("0.1"), Site("0.1", call=0)])
def test_45_rows_from_keys_in_each_form_of_a_call(where, form):
    net = actor()
    td = batch(donor=torch.arange(15.0).view(5, 3))
    logits = net[1].module(td["donor"])
    with patch(net, {where: Replace("donor")}) as m:
        if form in ("get_dist", "select_subsequence") and str(where).startswith("0.1"):
            with pytest.raises((BadKey, BadValue, RuntimeError)) as error:
                FORMS[form](m, net, td.copy())  # the model is not called, and no TensorDict comes by inside a stage
            text = f"{error.value} {error.value.__cause__}"  # a TensorDictSequential wraps it
            assert re.search("without a TensorDict|the model itself is not called", text)
            return
        for _ in range(2):
            found = FORMS[form](m, net, td.copy())
            torch.testing.assert_close(found.log_softmax(-1), logits.log_softmax(-1))


def test_45_captures_are_the_same_in_each_form_of_a_call():
    net = actor()
    expected = net[0].module(batch()["x"])
    for site in ("0", "1:in", "0.1"):
        m = capture(net, site)
        key = ("activation", site)
        assert m(batch())[key].equal(expected)
        assert m(x=batch()["x"])[m.out_keys.index(key)].equal(expected)
        assert TensorDictModuleWrapper(m)(batch())[key].equal(expected)
        assert capture(TensorDictSequential(net), f"0.{site}")(batch())["activation", f"0.{site}"].equal(expected)
        alone = TensorDictSequential(m).select_subsequence(out_keys=[key])
        assert alone(batch())[key].equal(expected)


def test_45_paths_hide_the_layer_of_a_wrapper():
    net = actor()
    assert capture(TensorDictModuleWrapper(net), "0.1")(batch())["activation", "0.1"].equal(net[0].module(batch()["x"]))


def test_45_the_action_follows_the_edited_logits():
    for net in (actor(), TensorDictSequential(TensorDictModule(nn.Identity(), ["x"], ["x"]), *actor())):
        for action, logits in enumerate(([9.0, 0.0], [0.0, 9.0])):
            with patch(net, {"logits": Replace(torch.tensor(logits))}) as m:
                assert m(batch())["action"].eq(action).all()
                assert net(batch())["action"].eq(action).all()


def test_45_the_action_follows_the_edited_logits_of_a_nested_actor():
    net = TensorDictSequential(TensorDictModule(nn.Identity(), ["x"], ["x"]), actor())
    for action, logits in enumerate(([9.0, 0.0], [0.0, 9.0])):
        with patch(net, {"logits": Replace(torch.tensor(logits))}) as m:
            assert m(batch())["action"].eq(action).all()


def test_45_the_log_probability_is_that_of_the_edited_distribution():
    net = actor()
    with patch(net, {"logits": Replace(torch.tensor([0.0, 1.0]))}) as m:
        td = m(batch())
    expected = torch.tensor([0.0, 1.0]).log_softmax(-1)[1].expand(5)
    torch.testing.assert_close(td["action_log_prob"], expected)


def test_45_select_out_keys():
    net = pipeline()
    m = capture(net, "1")
    m.select_out_keys(("activation", "1"))
    td = m(batch())
    assert set(td.keys(True, True)) == {"x", ("activation", "1")}
    net.select_out_keys("y")
    td = capture(net, "1", gradients=Target("y", 0))(batch())
    assert set(td.keys(True, True)) == {"x", "y", ("activation", "1"), ("gradient", "1")}
