"""TracIn: against gradients transition by transition, and against what a step of training does."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.agents import cartpole_policy
from tdconcepts.rl.influence import PolicyGradient, SquaredError, TracIn
from tdconcepts.rl.targets import log_prob, state_value


def critic():
    torch.manual_seed(0)
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double(), ["observation"], ["state_value"]
    )


def rows(n=7):
    torch.manual_seed(1)
    return TensorDict(observation=torch.randn(n, 3).double(), value_target=torch.randn(n, 1).double(), batch_size=[n])


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def slow(module, td, tests):
    """Each transition's gradient, each test state's gradient, their dot products."""
    parameters = list(module.parameters())
    losses = (module.module(td["observation"]) - td["value_target"]).square().squeeze(-1)
    values = module.module(tests["observation"]).squeeze(-1)
    one = torch.stack([flat(torch.autograd.grad(x, parameters, retain_graph=True)) for x in losses])
    other = torch.stack([flat(torch.autograd.grad(x, parameters, retain_graph=True)) for x in values])
    return one @ other.T


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_dot_products_of_gradients(chunk_size):
    module, td, tests = critic(), rows(), rows(2)
    trace = TracIn(module, SquaredError(), state_value(), tests, chunk_size=chunk_size)
    before = td.clone()
    found = trace(td)["influence"]
    torch.testing.assert_close(found, slow(module, td, tests))
    assert (td.exclude("influence") == before).all()
    shaped = trace(before.clone()[:6].reshape(2, 3))["influence"]
    torch.testing.assert_close(shaped.reshape(6, 2), found[:6])


def test_checkpoints_and_layers():
    module, td, tests = critic(), rows(), rows(2)
    states, total = [], 0.0
    for rate in (0.5, 0.1):
        states.append(({k: v.clone() for k, v in module.state_dict().items()}, rate))
        total = total + rate * slow(module, td, tests)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1)
    torch.testing.assert_close(
        TracIn(module, SquaredError(), state_value(), tests, states)(td.copy())["influence"], total
    )
    last = TracIn(module, SquaredError(), state_value(), tests, parameters=["*.2.*"])(td.copy())["influence"]
    for p in module.module[0].parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(last, TracIn(module, SquaredError(), state_value(), tests)(td.copy())["influence"])


def test_a_step_of_training_moves_the_value_by_the_influence():
    module, td, tests = critic(), rows(), rows(2)
    influence = TracIn(module, SquaredError(), state_value(), tests)(td.copy())["influence"]
    before = module.module(tests["observation"]).detach()
    for i in range(3):
        twin = critic()
        loss = (twin.module(td["observation"][i]) - td["value_target"][i]).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in twin.parameters():
                p.sub_(1e-5 * p.grad)
        moved = (before - twin.module(tests["observation"]).detach()).squeeze(-1) / 1e-5
        torch.testing.assert_close(moved, influence[i], rtol=1e-3, atol=1e-4)


def test_a_policy_by_the_logged_actions():
    policy = cartpole_policy(8)
    td = TensorDict(observation=torch.randn(5, 4), action=torch.tensor([0, 1, 1, 0, 1]), batch_size=[5])
    td["advantage"] = torch.randn(5, 1)
    found = TracIn(policy, PolicyGradient(policy), log_prob(policy), td[:2].copy())(td.copy())["influence"]
    parameters = list(policy.parameters())
    logits = nn.Sequential(*(policy[i].module for i in range(3)))

    def gradient(i, weight):
        one = logits(td["observation"][i]).log_softmax(-1)[td["action"][i]] * weight
        return flat(torch.autograd.grad(one, parameters))

    for i in range(5):
        for k in range(2):
            dot = gradient(i, -td["advantage"][i, 0]) @ gradient(k, 1.0)
            torch.testing.assert_close(found[i, k], dot)


def test_over_a_replay_buffer():
    data = pytest.importorskip("torchrl.data")
    module, td, tests = critic(), rows(30), rows(2)
    buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(30), batch_size=8)
    buffer.extend(td)
    trace = TracIn(module, SquaredError(), state_value(), tests)
    torch.testing.assert_close(trace(buffer[:].copy())["influence"], slow(module, td, tests))
    buffer.append_transform(trace)
    assert buffer.sample()["influence"].shape == (8, 2)


def test_bad_input():
    module, td, tests = critic(), rows(), rows(2)
    with pytest.raises(BadValue, match="no test states"):
        TracIn(module, SquaredError(), state_value(), tests[:0])
    with pytest.raises(BadKey, match="no entry 'observation' in the test states"):
        TracIn(module, SquaredError(), state_value(), tests.exclude("observation"))
    with pytest.raises(BadKey, match="no parameters count"):
        TracIn(module, SquaredError(), state_value(), tests, parameters=["nowhere"])
    with pytest.raises(BadKey, match="a checkpoint lacks parameters"):
        TracIn(module, SquaredError(), state_value(), tests, checkpoints=[({}, 1.0)])
    with pytest.raises(BadKey, match="no entry 'value_target'"):
        TracIn(module, SquaredError(), state_value(), tests)(td.exclude("value_target"))
    with pytest.raises(BadValue, match="the loss does not fit"):
        TracIn(module, lambda out: out["state_value"], state_value(), tests)(td)
    with pytest.raises(BadValue, match="the label"):
        TracIn(module, SquaredError(), state_value(), tests)(td.set("value_target", torch.zeros(7)))
    with pytest.raises(BadType, match="a loss and a target"):
        TracIn(module, None, state_value(), tests)
    with pytest.raises(BadKey, match="writes no entry 'q'"):
        TracIn(module, SquaredError(), Target("q"), tests)
