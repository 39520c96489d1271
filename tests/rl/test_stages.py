"""The networks and stages of agents, and of the losses of torchrl that hide them."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType
from tdconcepts.hooks import Site, Target, capture
from tdconcepts.rl.agents import cartpole_policy
from tdconcepts.rl.stages import agent_stages


def test_a_policy():
    policy = cartpole_policy(8)
    found = agent_stages(policy)
    assert found["policy"] is policy
    assert [(s.reads, s.writes) for s in found.stages][:2] == [
        (("observation",), ("hidden",)),
        (("hidden",), ("concept",)),
    ]
    assert found.latents == ["hidden", "concept", "logits"]
    td = TensorDict(observation=torch.zeros(2, 4), batch_size=[2])
    assert [stage.sites for stage in found.stages] == [("0.0", "0.1"), ("1.0", "1.1"), ("2",), ()]
    for stage in found.stages:
        for site in stage.sites:
            with capture(policy, Site(site)) as m:
                assert m(td.copy())["activation", site].shape[0] == 2
    with pytest.raises(BadKey, match="did you mean 'concept'"):
        found.writer("concpt")
    with pytest.raises(BadKey, match="no network 'actor'"):
        found["actor"]


def test_no_agent():
    for wrong in (nn.Linear(4, 2), "policy"):
        with pytest.raises(BadType, match="no agent"):
            agent_stages(wrong)


def continuous():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 1)

        def forward(self, observation, action):
            return self.net(torch.cat([observation, action], -1))

    net = nn.Sequential(nn.Linear(4, 4), modules.NormalParamExtractor())
    actor = modules.ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=modules.TanhNormal,
        return_log_prob=True,
        spec=data.Bounded(-1, 1, (2,)),
    )
    return actor, modules.ValueOperator(Critic(), in_keys=["observation", "action"])


def test_a_shared_trunk():
    modules = pytest.importorskip("torchrl.modules")
    trunk = TensorDictModule(nn.Linear(4, 8), ["observation"], ["hidden"])
    actor = TensorDictModule(nn.Linear(8, 2), ["hidden"], ["action"])
    agent = modules.ActorValueOperator(trunk, actor, modules.ValueOperator(nn.Linear(8, 1), in_keys=["hidden"]))
    found = agent_stages(agent)
    assert list(found) == ["agent", "policy", "value"]
    assert found.latents == ["hidden"]
    assert found.writer("state_value", "value").kind == "Linear"
    both = [s.sites for s in found.stages if s.writes == ("hidden",)]
    assert len(both) == 3


def test_an_actor_and_its_critic():
    modules = pytest.importorskip("torchrl.modules")
    _, critic = continuous()
    actor = TensorDictModule(nn.Linear(4, 2), ["observation"], ["action"])
    found = agent_stages(modules.ActorCriticWrapper(actor, critic))
    assert list(found) == ["agent", "policy", "value"]
    assert (found["policy"], found["value"]) == (actor, critic)
    assert found.latents == ["action"]
    td = TensorDict(observation=torch.randn(3, 4), action=torch.rand(3, 2), batch_size=[3])
    one = Gradient(found["value"], Target("state_action_value"), wrt="observation")(td.copy())
    whole = Gradient(found["agent"], Target("state_action_value"), wrt="observation")(td.copy())  # through the action
    key = ("attribution", "observation")
    through = critic.module.net.weight[0, 4:] @ actor.module.weight
    torch.testing.assert_close(whole[key] - one[key], through.detach().expand(3, 4))


def test_a_multi_agent_net_has_its_layers():
    modules = pytest.importorskip("torchrl.modules")
    net = modules.MultiAgentMLP(4, 2, n_agents=3, centralized=False, share_params=False, num_cells=[8])
    (stage,) = agent_stages(TensorDictModule(net, ["observation"], ["action_value"])).stages
    assert stage.kind == "MultiAgentMLP"
    assert stage.sites == ("_empty_net.0", "_empty_net.1", "_empty_net.2")


def test_networks_behind_a_ppo_loss():
    actor, _ = continuous()
    objectives, modules = pytest.importorskip("torchrl.objectives"), pytest.importorskip("torchrl.modules")
    loss = objectives.ClipPPOLoss(actor, modules.ValueOperator(nn.Linear(4, 1), in_keys=["observation"]))
    found = agent_stages(loss)
    assert list(found) == ["actor_network", "critic_network"]
    assert found["actor_network"] is actor
    assert found.latents == ["loc", "scale"]


def test_the_copies_that_a_sac_loss_trains():
    actor, critic = continuous()
    objectives = pytest.importorskip("torchrl.objectives")
    loss = objectives.SACLoss(actor, critic)
    found = agent_stages(loss)
    copies = ["qvalue_network.0", "qvalue_network.1"]
    assert list(found) == ["actor_network", *copies, *(f"target_{name}" for name in copies)]
    td = TensorDict(observation=torch.randn(5, 4), action=torch.rand(5, 2), batch_size=[5])
    explain = Gradient(found["qvalue_network.1"], Target("state_action_value"))
    weight = loss.qvalue_network_params["module", "net", "weight"]
    for _ in range(2):  # the second time after a step of the training
        found_now = explain(td.copy())["attribution", "observation"]
        assert torch.equal(found_now, weight[1, 0, :4].detach().expand(5, 4))
        with torch.no_grad():
            weight.add_(1.0)
    assert not torch.equal(critic.module.net.weight, weight[1])


def test_target_networks_of_a_dqn_loss():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    objectives = pytest.importorskip("torchrl.objectives")
    actor = modules.QValueActor(modules.MLP(4, 2, num_cells=[8]), in_keys=["observation"], spec=data.Categorical(2))
    loss = objectives.DQNLoss(actor, delay_value=True)
    found = agent_stages(loss)
    assert list(found) == ["value_network", "target_value_network"]
    assert found["value_network"] is actor
    with torch.no_grad():
        next(actor.parameters()).zero_()
    td = TensorDict(observation=torch.randn(5, 4), batch_size=[5])
    one, other = (found[name](td.copy())["action_value"] for name in found)
    assert not torch.allclose(one, other)
