"""Temporal probes: horizons stay within episodes, episodes are held out, and what is read is put to the test."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.rl.temporal import TemporalProbe, episodes_of


def rollout(slots=6, steps=40, episode=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(slots, steps, 4, generator=generator, dtype=torch.float64)
    td = TensorDict({"z": z, "x": z @ torch.tensor([1.0, -2.0, 0.0, 0.5]).double() + 3}, batch_size=[slots, steps])
    if episode is not None:
        done = (torch.arange(steps) % episode == episode - 1).expand(slots, steps)
        td.set(("next", "done"), done.unsqueeze(-1).clone())
    return td


def test_episodes_are_cut_at_done_and_by_the_mask():
    td = rollout(2, 5, 3)
    td.set(("collector", "mask"), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]).bool())
    at, counts = episodes_of(td)
    assert [row[mask].tolist() for row, mask in zip(at, counts, strict=True)] == [[0, 1, 2], [3], [5, 6], [8, 9]]


def test_one_long_episode():
    at, counts = episodes_of(rollout(1, 7)[0])
    assert at.tolist() == [list(range(7))]
    assert counts.all()


def test_now_is_read_and_later_is_not():
    probe = TemporalProbe("z", "x", [0, 1]).fit(rollout())
    assert probe.scores["horizon"].tolist() == [0, 1]
    assert probe.scores["r2"][0] > 0.999
    assert probe.scores["r2"][1] < 0.1
    assert probe.scores["control"].max() < 0.1
    torch.testing.assert_close(
        probe.edit().direction,
        torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.0, 0.5]), dim=0),
        atol=1e-4,
        rtol=0,
    )


def test_later_is_read_where_the_latent_knows_it():
    td = rollout(8, 30, 10)
    future = torch.zeros_like(td["x"])
    future[:, 3:] = td["x"][:, :-3]  # what z says now happens three steps later
    probe = TemporalProbe("z", "y", [0, 3]).fit(td.set("y", future))
    assert probe.scores["r2"][1] > 0.999
    assert probe.scores["r2"][0] < 0.1
    assert probe.scores["rows"].tolist() == [8 * 30, 8 * 3 * 7]  # three of ten steps have no label within the episode


def test_scores_are_of_held_out_episodes_by_hand():
    td = rollout(4, 12)
    td["x"] += torch.randn(4, 12, generator=torch.Generator().manual_seed(3)).double()
    probe = TemporalProbe("z", "x", folds=4, ridge=0.5).fit(td)
    errors, spreads = [], []
    for out in range(4):
        train = [i for i in range(4) if i != out]
        z, y = td["z"][train].reshape(-1, 4), td["x"][train].reshape(-1)
        centred = z - z.mean(0)
        w = torch.linalg.solve(centred.T @ centred + 0.5 * torch.eye(4), centred.T @ (y - y.mean()))
        predicted = (td["z"][out] - z.mean(0)) @ w + y.mean()
        errors.append((td["x"][out] - predicted) ** 2)
        spreads.append((td["x"][out] - y.mean()) ** 2)
    errors, spreads = torch.stack(errors), torch.stack(spreads)
    torch.testing.assert_close(probe.scores["r2"][0], 1 - errors.sum() / spreads.sum(), atol=1e-5, rtol=0)
    torch.testing.assert_close(probe.scores["by_step"][0], 1 - errors.sum(0) / spreads.sum(0), atol=1e-4, rtol=1e-4)


def test_the_control_sees_what_time_alone_explains():
    td = rollout(8, 30)
    clock = torch.arange(30).double().expand(8, 30)
    td["z"][..., 3] = clock
    probe = TemporalProbe("z", "clock").fit(td.set("clock", clock.clone()))
    assert probe.scores["r2"][0] > 0.999
    assert probe.scores["control"][0] > 0.999


def test_two_episodes_are_enough_and_one_is_not():
    assert TemporalProbe("z", "x").fit(rollout(2)).scores["r2"][0] > 0.99
    with pytest.raises(BadValue, match="too few episodes"):
        TemporalProbe("z", "x").fit(rollout(1))


def test_as_a_stage():
    td = rollout()
    probe = TemporalProbe("z", lambda td: td["x"] * 2, [0, 2], name="double").fit(td)
    out = probe(td.copy())
    torch.testing.assert_close(out["probe", "double"][..., 0], td["x"] * 2, atol=1e-3, rtol=0)
    assert out["probe", "double"].shape == (6, 40, 2)
    one = TemporalProbe("z", "x").fit(td)
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again(td.copy())["probe", "x"].equal(one(td.copy())["probe", "x"])


def test_bad_input():
    with pytest.raises(BadValue, match="horizons"):
        TemporalProbe("z", "x", [])
    with pytest.raises(BadValue, match="horizons"):
        TemporalProbe("z", "x", [-1])
    with pytest.raises(BadType, match="not a label"):
        TemporalProbe("z", 3)
    with pytest.raises(BadKey, match="no entry 'v'"):
        TemporalProbe("v", "x").fit(rollout())
    with pytest.raises(BadValue, match="vector and a number"):
        TemporalProbe("x", "x").fit(rollout())
    with pytest.raises(BadValue, match="too few episodes"):
        TemporalProbe("z", "x", [40]).fit(rollout())
    with pytest.raises(BadType, match="the label is no tensor"):
        TemporalProbe("z", lambda td: 3).fit(rollout())
    with pytest.raises(BadValue, match="not fitted"):
        TemporalProbe("z", "x")(rollout())
    with pytest.raises(BadValue, match="no probe of that horizon"):
        TemporalProbe("z", "x").fit(rollout()).edit(1)
    with pytest.raises(BadValue, match="not a rollout"):
        TemporalProbe("z", "x").fit(rollout()[0, 0])


def test_the_angle_is_read_and_not_used_the_logits_are(agent, env):
    """The measured facts: R^2 above .99, the return stays without it; the logit direction destroys the return."""
    from tdconcepts.hooks import RemoveDirection
    from tdconcepts.rl import compare_returns, rollout_episodes

    logged = rollout_episodes(env, agent.policy, seeds=range(8), greedy=False, max_steps=200)
    probe = TemporalProbe("concept", lambda td: td["observation"][..., 2], [0, 10], name="angle").fit(logged)
    assert probe.scores["r2"][0] > 0.99
    assert probe.scores["r2"][1] < probe.scores["r2"][0]
    assert probe.scores["control"][0] < 0.5
    result = probe.causal_test(env, agent.policy, range(8), controls=2)
    low, high = result.difference("without angle")[1:]
    assert low <= 0 <= high or abs(result.difference("without angle")[0]) < 25
    weight = agent.policy[2].module.weight.detach()
    logits = {"logits": {"concept": RemoveDirection(weight[1] - weight[0])}}
    assert compare_returns(env, agent.policy, logits, range(8)).difference("logits")[2] < -300
