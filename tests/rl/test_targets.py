"""Targets of agents, against autograd by hand on torchrl's own actors."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.rl.targets import advantage, chosen_value, contrast, entropy, log_prob, state_value

KEY = ("attribution", "observation")


def rows(actions=2, batch=(3, 5), one_hot=False):
    generator = torch.Generator().manual_seed(0)
    td = TensorDict({"observation": torch.randn(*batch, 4, generator=generator)}, batch_size=batch)
    index = torch.randint(0, actions, batch, generator=generator)
    return td.set("action", nn.functional.one_hot(index, actions) if one_hot else index), index


def by_hand(function, td):
    x = td["observation"].clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def net(outputs, key, inputs=4):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    return TensorDictModule(layers, ["observation"], [key])


def discrete(outputs=2):
    draw = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
    return ProbabilisticTensorDictSequential(net(outputs, "logits"), draw)


def check(module, target, td, function):
    explainer = Gradient(module, target, wrt="observation")
    before = td.clone()
    for one in (explainer, pickle.loads(pickle.dumps(explainer))):
        found = one(td.copy())[KEY]
        torch.testing.assert_close(found, by_hand(function, td))
    assert found.abs().sum() > 0
    assert (td == before).all()


@pytest.mark.parametrize("one_hot", [False, True])
def test_discrete_values(one_hot):
    td, index = rows(3, one_hot=one_hot)
    value = net(3, "action_value")
    q = value.module

    def logged(v):
        return v.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def second(v):
        return torch.stack(
            [torch.cat([r[:i], r[i + 1 :]]).max() for r, i in zip(v.reshape(-1, 3), index.flatten(), strict=True)]
        )

    check(value, chosen_value(), td, lambda x: logged(q(x)))
    check(value, contrast(), td, lambda x: logged(q(x)).flatten() - second(q(x)))
    check(value, contrast(-1), td.clone().set("other", index), lambda x: logged(q(x)) - q(x)[..., 2])
    td["other"] = (index + 1) % 3
    check(value, contrast("other"), td, lambda x: logged(q(x)) - q(x).gather(-1, td["other"].unsqueeze(-1)).squeeze(-1))
    check(value, advantage(), td, lambda x: logged(q(x)) - q(x).mean(-1))
    check(value, advantage(baseline="max"), td, lambda x: logged(q(x)) - q(x).max(-1).values)


def test_a_state_value_and_an_advantage_over_it():
    td, index = rows(3)
    torch.manual_seed(2)
    critic, logits = nn.Linear(4, 1), nn.Linear(4, 3)
    agent = TensorDictSequential(
        net(3, "action_value"),
        TensorDictModule(critic, ["observation"], ["state_value"]),
        TensorDictModule(logits, ["observation"], ["logits"]),
    )
    q = agent[0].module

    def logged(x):
        return q(x).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    check(agent, state_value(), td, lambda x: critic(x))
    check(agent, advantage(baseline="state_value"), td, lambda x: logged(x) - critic(x).squeeze(-1))
    check(agent, advantage(baseline="logits"), td, lambda x: logged(x) - (logits(x).softmax(-1) * q(x)).sum(-1))
    with pytest.raises(BadKey, match="writes no entry 'state_valu'"):
        Gradient(agent, advantage(baseline="state_valu"))


def test_log_prob_and_entropy_of_a_discrete_policy():
    td, index = rows(2)
    policy = discrete()
    logits = policy[0].module
    check(policy, log_prob(policy), td, lambda x: torch.distributions.Categorical(logits=logits(x)).log_prob(index))
    check(
        policy,
        entropy(policy),
        td.exclude("action"),
        lambda x: torch.distributions.Categorical(logits=logits(x)).entropy(),
    )
    with pytest.raises(BadKey, match="no entry 'action'"):
        Gradient(policy, log_prob(policy))(td.exclude("action"))
    with pytest.raises(BadType, match="no distribution"):
        log_prob(net(2, "q"))


def test_several_agents():
    td, index = rows(3, batch=(6, 2))
    td.batch_size = [6]
    value = net(3, "action_value")

    def logged(x):
        return value.module(x).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    check(value, chosen_value(agent=1), td, lambda x: logged(x)[:, 1])
    check(value, advantage(agent=-1), td, lambda x: logged(x)[:, 1] - value.module(x)[:, 1].mean(-1))
    several = Gradient(value, chosen_value(agent=range(2)))(td.copy())[KEY]
    assert several.shape == (6, 2, 2, 4)
    torch.testing.assert_close(several.sum(1), by_hand(logged, td))
    assert (several[:, 0, 1] == 0).all()
    policy = discrete(3)
    joint = Gradient(policy, log_prob(policy))(td.copy())[KEY]
    torch.testing.assert_close(
        joint, by_hand(lambda x: torch.distributions.Categorical(logits=policy[0].module(x)).log_prob(index), td)
    )
    with pytest.raises(BadValue, match="no such agent"):
        Gradient(value, chosen_value(agent=2))(td)
    with pytest.raises(BadValue, match="agent=, 0 to 1"):
        Gradient(value, advantage())(td)
    with pytest.raises(BadType, match="not an agent"):
        chosen_value(agent="first")


def test_bad_actions():
    td, _ = rows(3)
    with pytest.raises(BadValue, match="does not index the actions"):
        Gradient(net(2, "action_value"), advantage())(td.set("action", torch.full((3, 5), 2)))
    with pytest.raises(BadValue, match="no such action"):
        Gradient(net(2, "action_value"), contrast(2))(rows(2)[0])
    with pytest.raises(BadValue, match="another action"):
        Gradient(net(1, "action_value"), contrast())(rows(1)[0])


# ----------------------------------------------------------------------------------------------------- torchrl's actors


def test_the_logged_action_of_a_value_actor_not_its_greedy_one():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    actor = modules.QValueActor(net(2, "action_value").module, in_keys=["observation"], spec=data.Categorical(2))
    td, index = rows(2)
    q = actor.module[0].module
    greedy = q(td["observation"]).argmax(-1)
    assert (greedy != index).any()
    check(actor, chosen_value(), td, lambda x: q(x).gather(-1, index.unsqueeze(-1)))
    check(actor, advantage(), td, lambda x: q(x).gather(-1, index.unsqueeze(-1)).squeeze(-1) - q(x).mean(-1))
    written = Gradient(actor, advantage(), outputs=True)(td.copy())  # with outputs it acts anew, and explains that
    assert torch.equal(written["action"], greedy)
    torch.testing.assert_close(written[KEY], by_hand(lambda x: q(x).max(-1).values - q(x).mean(-1), td))


def test_a_continuous_actor_critic_with_a_shared_trunk():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    torch.manual_seed(0)
    trunk = TensorDictModule(nn.Linear(4, 8), ["observation"], ["hidden"])
    head = nn.Sequential(nn.Linear(8, 4), modules.NormalParamExtractor())
    actor = modules.ProbabilisticActor(
        TensorDictModule(head, ["hidden"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=modules.TanhNormal,
        return_log_prob=True,
        spec=data.Bounded(-1, 1, (2,)),
    )
    agent = modules.ActorValueOperator(trunk, actor, modules.ValueOperator(nn.Linear(8, 1), in_keys=["hidden"]))
    td, _ = rows()
    td["action"] = torch.rand(3, 5, 2) * 1.6 - 0.8

    def density(x):
        loc, scale = head(trunk.module(x))
        return modules.TanhNormal(loc, scale).log_prob(td["action"])

    for module in (agent, agent.get_policy_operator()):
        check(module, log_prob(module), td, density)
    for module in (agent, agent.get_value_operator()):
        check(module, state_value(), td, lambda x: agent.module[2].module(trunk.module(x)))
    latent = Gradient(agent, state_value(), wrt="hidden")(td.copy())
    assert torch.allclose(latent["attribution", "hidden"], agent.module[2].module.weight.expand(3, 5, 8))
    with pytest.raises(BadType, match="without a closed form"):
        Gradient(agent, entropy(agent), wrt="observation")(td)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("centralised", [True, False])
def test_a_multi_agent_net(share, centralised):
    modules = pytest.importorskip("torchrl.modules")
    torch.manual_seed(0)
    mlp = modules.MultiAgentMLP(4, 2, n_agents=3, centralized=centralised, share_params=share, num_cells=[8])
    module = TensorDictModule(mlp, [("agents", "observation")], [("agents", "action_value")])
    td = TensorDict({"agents": TensorDict({"observation": torch.randn(6, 3, 4)}, [6, 3])}, [6])
    td["agents", "action"] = torch.randint(0, 2, (6, 3))
    target = chosen_value(("agents", "action_value"), ("agents", "action"), agent=[0, 2])
    found = Gradient(module, target)(td.copy())["attribution", "agents", "observation"]
    for place, agent in enumerate([0, 2]):
        x = td["agents", "observation"].clone().requires_grad_()
        value = mlp(x).gather(-1, td["agents", "action"].unsqueeze(-1)).squeeze(-1)[:, agent]
        torch.testing.assert_close(found[:, place], torch.autograd.grad(value.sum(), x)[0])


def test_pixels_and_duelling():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    torch.manual_seed(0)
    cnn = {"num_cells": [4, 4], "kernel_sizes": [3, 3], "strides": [2, 2]}
    q = modules.DuelingCnnDQNet(out_features=3, cnn_kwargs=cnn, mlp_kwargs={"depth": 1, "num_cells": 8})
    actor = modules.QValueActor(q, in_keys=["pixels"], spec=data.Categorical(3))
    td = TensorDict(pixels=torch.rand(2, 2, 3, 12, 12), action=torch.randint(0, 3, (2, 2)), batch_size=[2, 2])
    actor(td.clone())
    found = Gradient(actor, advantage(), wrt="pixels")(td.copy())["attribution", "pixels"]
    x = td["pixels"].clone().requires_grad_()
    value = q(x)
    slow = value.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1) - value.mean(-1)
    torch.testing.assert_close(found, torch.autograd.grad(slow.sum(), x)[0])


def test_they_compile():
    td, _ = rows(2, batch=(5,))
    policy = discrete()
    explain = Gradient(policy, log_prob(policy), wrt="observation")
    compiled = torch.compile(explain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(td.copy())[KEY], explain(td.copy())[KEY])
