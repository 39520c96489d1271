"""The conformance scenarios of hooks: rollouts, and the forms of a call."""

import re

import pytest
import torch
from hooks.nets import batch, linear, mlp, pipeline
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
from tdconcepts.hooks import Replace, Scale, Site, Target, capture, patch

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
