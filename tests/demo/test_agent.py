"""The agent part on a real agent with a small budget: its numbers are those of the slow way."""

import pytest
import torch

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")
pytest.importorskip("matplotlib")
from tdconcepts.demo.agent import Budget, measure
from tdconcepts.demo.agent_story import LOGITS, METHODS, PROBE, tell_story
from tdconcepts.report import page
from tdconcepts.rl.rollouts import MASK


@pytest.fixture(scope="module")
def measured():
    notes = []
    budget = Budget(frames=10_240, steps=20, draws=5, episodes=6, controls=2, seeds=6)
    return measure(4, budget, lambda *note: notes.append(note)), notes


def test_every_logged_action_is_explained(measured):
    found, _ = measured
    explained, policy = found.explained, found.agent.policy
    mask = explained[MASK]
    rows = explained[mask]
    x = rows["observation"].clone().requires_grad_()
    logits = policy[2].module(policy[1].module(policy[0].module(x)))
    taken = logits.gather(-1, rows["action"].unsqueeze(-1)).squeeze(-1)
    (slow,) = torch.autograd.grad(taken.sum(), x)
    assert torch.allclose(rows["attribution", "gradient", "observation"], slow, atol=1e-5)
    product = rows["attribution", "input_x_gradient", "observation"]
    assert torch.allclose(product, slow * rows["observation"], atol=1e-5)
    zero = policy[2].module(policy[1].module(policy[0].module(torch.zeros_like(x))))
    change = taken - zero.gather(-1, rows["action"].unsqueeze(-1)).squeeze(-1)
    total = rows["attribution", "integrated_gradients", "observation"].sum(-1)
    assert torch.allclose(total, change, atol=1e-3)  # completeness
    for name in METHODS:
        assert (explained["attribution", name, "observation"][~mask] == 0).all()
    assert explained["explanation", "exploration_type"] == "deterministic"


def test_the_logit_direction_is_that_of_the_head(measured):
    found, _ = measured
    weight = found.agent.policy[2].module.weight.detach()
    expected = torch.nn.functional.normalize(weight[1] - weight[0], dim=0)
    assert torch.allclose(found.directions[LOGITS].edit.direction, expected, atol=1e-5)
    assert found.directions[LOGITS].cosine == pytest.approx(1.0, abs=1e-5)
    assert found.directions[PROBE].cosine < 0.9
    assert all(0.0 <= direction.variance <= 1.0 for direction in found.directions.values())


def test_the_probe_reads_the_angle_and_its_removal_is_no_catastrophe(measured):
    found, _ = measured
    assert found.probes[0].r2 > 0.9
    assert found.probes[0].r2 > found.probes[20].r2
    returns = found.returns
    assert returns.difference(LOGITS)[0] < -0.5 * returns.mean("unpatched")[0]
    assert abs(returns.difference(PROBE)[0]) < 0.3 * returns.mean("unpatched")[0]
    assert returns.names == ("unpatched", *found.directions)


def test_it_becomes_a_section_of_a_page(measured):
    found, notes = measured
    assert "What drives a CartPole agent" in page("Demo", [tell_story(found)])
    stages = list(dict.fromkeys(stage for stage, _, _ in notes))
    assert stages == ["training the agent", "explaining 8 episodes", "probing the concept stage", "closed-loop test"]
    for stage in stages:
        done = [share for name, share, _ in notes if name == stage]
        assert done == sorted(done)
        assert done[-1] == 1.0
