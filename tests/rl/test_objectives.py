"""Concept losses beside torchrl's own: PPO and DQN, by key and by observation."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts import ConceptActivation, ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.rl import cartpole_concepts
from tdconcepts.rl.objectives import ConceptObjective

objectives = pytest.importorskip("torchrl.objectives")
SPEC = ConceptSpec(["leans right", "falls right", "is right", "moves right"], [1, 1, 1, 1])


def q_network():
    from torchrl.modules import QValueModule

    torch.manual_seed(0)
    return TensorDictSequential(
        TensorDictModule(nn.Linear(4, 4), ["observation"], ["concepts_logits"]),
        ConceptActivation(SPEC, "concepts_logits", "concepts"),
        TensorDictModule(nn.Linear(4, 2), ["concepts"], ["action_value"]),
        QValueModule(action_space="categorical"),
    )


def minibatch(rows=7):
    torch.manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(rows, 4),
            "action": torch.randint(0, 2, (rows,)),
            "next": {
                "observation": torch.randn(rows, 4),
                "reward": torch.ones(rows, 1),
                "done": torch.zeros(rows, 1).bool(),
                "terminated": torch.zeros(rows, 1).bool(),
            },
        },
        batch_size=[rows],
    )


def made(labels=cartpole_concepts, **options):
    policy = q_network()
    loss = objectives.DQNLoss(policy, action_space="categorical", delay_value=False)
    return policy, loss, ConceptObjective(loss, policy, SPEC, labels, **options)


def test_it_is_the_loss_and_the_cross_entropy():
    policy, loss, objective = made(weight=0.5)
    td = minibatch()
    out = objective(td.clone())
    torch.testing.assert_close(out["loss"], loss(td.clone())["loss"])
    logits, labels = policy[0](td.clone())["concepts_logits"], (td["observation"][:, [2, 3, 0, 1]] > 0).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(out["loss_concept"], 0.5 * expected)
    assert objective.out_keys[-1] == "loss_concept"


def test_it_trains_the_policys_own_parameters_once():
    policy, loss, objective = made()
    objective(minibatch())["loss_concept"].backward()
    assert policy[0].module.weight.grad.abs().sum() > 0
    assert policy[2].module.weight.grad is None
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == len(list(loss.parameters()))


def test_labels_by_key_and_missing_ones():
    _, _, objective = made("labels")
    assert "labels" in objective.in_keys
    td = minibatch().set("labels", cartpole_concepts(minibatch()))
    whole = objective(td.clone())["loss_concept"]
    td["labels"][3:] = float("nan")
    part = objective(td.clone())["loss_concept"]
    assert part.isfinite()
    assert not torch.equal(whole, part)
    with pytest.raises(BadKey, match="labels"):
        objective(minibatch())


def test_minibatch_stays():
    _, _, objective = made()
    td = minibatch()
    keys = set(td.keys(True, True))
    objective(td)
    assert not {"concepts", "concepts_logits", ("loss", "concept"), "labels"} & (set(td.keys(True, True)) - keys)


def test_errors():
    with pytest.raises(BadValue, match="negative"):
        made(weight=-1.0)
    with pytest.raises(BadType, match="not labels"):
        made(labels=3)
    with pytest.raises(BadKey):
        made(key="nothing")
