"""The closed-loop test: pairing, intervals, every kind of variant, and the errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Ablate, Patch, Scale, Site, Steps, When, patch
from tdconcepts.hooks.controls import _rotation
from tdconcepts.rl.returns import Returns, compare_returns, student_t


def returns_of(*rows, **more):
    values = torch.tensor(rows, dtype=torch.float64)
    names = ("unpatched", *(f"v{i}" for i in range(1, len(rows))))
    return Returns(names, TensorDict({"return": values, **more}, batch_size=values.shape))


# ---------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 63, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_student_t_equals_scipy(degrees, confidence):
    stats = pytest.importorskip("scipy.stats")
    assert student_t(confidence, degrees) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, degrees), rel=1e-7)


def test_student_t_without_degrees_of_freedom():
    assert math.isnan(student_t(0.95, 0))


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500)), min_size=2, max_size=20))
def test_the_paired_difference_and_its_interval(pairs):
    base, other = zip(*pairs, strict=True)
    result = returns_of(base, other)
    mean, low, high = result.difference("v1")
    differences = torch.tensor(other, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    assert mean == pytest.approx(float(differences.mean()), abs=1e-9)
    half = student_t(0.95, len(pairs) - 1) * float(differences.std()) / len(pairs) ** 0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-9)


def test_pairing_matters():
    noise = [100.0, 200.0, 300.0, 400.0]
    result = returns_of(noise, [value - 1.0 for value in noise])
    assert result.difference("v1") == pytest.approx((-1.0, -1.0, -1.0))
    assert result.mean("v1")[2] - result.mean("v1")[1] > 100.0


def test_one_seed_has_no_interval():
    mean, low, high = returns_of([3.0], [1.0]).difference("v1")
    assert mean == -2.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_table():
    finished = torch.tensor([[True, True, True], [True, False, True]])
    flips = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.25, 0.0]])
    result = returns_of([10.0, 12.0, 8.0], [9.0, 12.0, 6.0], finished=finished, flips=flips)
    assert result.table().splitlines() == [
        "variant    mean return  difference  95% interval  open-loop flips  cut episodes",
        "unpatched         10.0                                                        0",
        "v1                 9.0        -1.0  [-3.5, +1.5]            25.0%             1",
    ]
    with pytest.raises(BadValue, match="no variant 'v2'"):
        result.of("v2")


# ------------------------------------------------------------------------------------------------- in environments


class Echo:
    """An environment of two slots: the reward is the action, an episode has three steps, the start is the seed."""

    batch_size, action_key, reward_key, done_keys = torch.Size([2]), "action", "reward", ["done", "truncated"]

    def __init__(self, repeats=True):
        self.repeats, self.resets = repeats, 0

    def set_seed(self, seed):
        self.seed = seed

    def reset(self):
        self.resets += 1
        start = float(self.seed) if self.repeats else float(self.resets)
        return TensorDict({"observation": torch.full((2, 1), start), "time": torch.zeros(2)}, batch_size=[2])

    def step_and_maybe_reset(self, td):
        time = td["time"] + 1
        done = (time == 3).unsqueeze(-1)
        td["next"] = TensorDict({"reward": td["action"].unsqueeze(-1), "done": done}, batch_size=[2])
        return td, TensorDict({"observation": td["observation"], "time": time % 3}, batch_size=[2])


def policy():
    first = TensorDictModule(torch.nn.Sequential(torch.nn.Identity()), ["observation"], ["z"])
    return TensorDictSequential(first, TensorDictModule(lambda z: z.squeeze(-1) + 1.0, ["z"], ["action"]))


def test_every_kind_of_variant_gives_the_same_numbers():
    actor = policy()
    variants = {
        "mapping": {"z": Scale(0.0)},
        "site": {Site("0.0"): Scale(0.0)},
        "program": Patch({"z": Ablate()}),
        "context": patch(actor, {"z": Ablate()}),
        "policy": TensorDictModule(lambda z: torch.ones(len(z)), ["observation"], ["action"]),
        "function": lambda td: td.set("action", torch.ones(2)),
    }
    result = compare_returns(Echo(), actor, variants, seeds=[10, 10, 20, 20, 30])
    assert result.names == ("unpatched", *variants)
    assert result.episodes.batch_size == torch.Size([7, 5])
    assert result.of("unpatched")["return"].tolist() == [33.0, 33.0, 63.0, 63.0, 93.0]
    for name in variants:
        assert result.of(name)["return"].tolist() == [3.0] * 5, name
    assert result.episodes["finished"].all()


def test_flip_rate_is_open_loop_on_the_baselines_states():
    result = compare_returns(Echo(), policy(), {"zero": {"z": Scale(0.0)}}, seeds=[0, 0, 5], flip_rate=True)
    assert result.of("zero")["flips"].tolist() == [0.0, 0.0, 1.0]
    assert result.of("unpatched")["flips"].tolist() == [0.0, 0.0, 0.0]


def test_variants_may_read_what_the_policy_does_not():
    envs = pytest.importorskip("torchrl.envs")
    from tdconcepts.rl import cartpole_env

    env = envs.TransformedEnv(cartpole_env(2), envs.StepCounter())
    lean = TensorDictSequential(
        TensorDictModule(lambda o: o[..., 2:3], ["observation"], ["z"]),
        TensorDictModule(lambda z: (z[..., 0] > 0).long(), ["z"], ["action"]),
    )
    variants = {
        "late": {"z": When(Scale(-1.0), Steps(4))},
        "ended": {"z": When(Scale(-1.0), "truncated")},
        "counted": TensorDictModule(lambda n: (n[..., 0] < 0).long(), ["step_count"], ["action"]),
    }
    result = compare_returns(env, lean, variants, seeds=[0, 1], max_steps=8, flip_rate=True)
    assert result.of("late")["flips"].tolist() == [0.5, 0.5]
    assert result.of("ended")["flips"].tolist() == [0.0, 0.0]
    assert (result.of("counted")["flips"] > 0).all()
    controlled = {"late": variants["late"]}
    assert compare_returns(env, lean, controlled, seeds=[0], max_steps=8, flip_rate=True, controls=1)


class Coin:
    """Two slots, two steps an episode; the observation is the logit of action 1 against 0."""

    batch_size, action_key, reward_key, done_keys = torch.Size([2]), "action", "reward", ["done"]

    def set_seed(self, seed):
        self.seed = seed

    def reset(self):
        z = torch.tensor([[1.0, -2.0], [0.5, 3.0]]) * (1 + self.seed)
        return TensorDict({"observation": z, "time": torch.zeros(2)}, batch_size=[2])

    def step_and_maybe_reset(self, td):
        time = td["time"] + 1
        reward = td["action"].double().unsqueeze(-1)
        td["next"] = TensorDict({"reward": reward, "done": (time == 2).unsqueeze(-1)}, batch_size=[2])
        return td, TensorDict({"observation": td["observation"], "time": time % 2}, batch_size=[2])


def drawn():
    return ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Identity(), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )


def test_total_variation():
    result = compare_returns(Coin(), drawn(), {"half": {"logits": Scale(0.5)}}, seeds=[0, 1], flip_rate=True)
    z = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    far = (z.softmax(-1) - (0.5 * z).softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(result.of("half")["total_variation"], far)
    assert result.of("half")["flips"].tolist() == [0.0, 0.0]
    assert "total variation" in result.table()
    silent = compare_returns(Echo(), policy(), {"zero": {"z": Scale(0.0)}}, seeds=[0], flip_rate=True)
    assert "total_variation" not in list(silent.episodes.keys())


def test_controls_move_as_far():
    vectors = TensorDictModule(lambda o: torch.cat([o, 0 * o], -1), ["observation"], ["z"])
    actor = TensorDictSequential(vectors, TensorDictModule(lambda z: z[..., 0], ["z"], ["action"]))
    result = compare_returns(Echo(), actor, {"zero": {"z": Scale(0.0)}}, seeds=[5, 7], controls=2)
    assert result.names == ("unpatched", "zero", "zero: control 0", "zero: control 1")
    assert result.controls == {"zero": ("zero: control 0", "zero: control 1")}
    for seed, name in enumerate(result.controls["zero"]):
        cosine = _rotation(2, seed)[0, 0]
        torch.testing.assert_close(result.of(name)["return"], 15 * (1 - cosine).repeat(2), atol=1e-4, rtol=0)
    others = torch.stack([result.of(name)["return"] for name in result.controls["zero"]]).mean(0)
    assert result.against_controls("zero")[0] == pytest.approx(float((0 - others).mean()))
    with pytest.raises(BadValue, match="no controls"):
        result.against_controls("unpatched")
    with pytest.raises(BadType, match="no controls"):
        compare_returns(Echo(), actor, {"other": actor}, seeds=[1], controls=1)
    with pytest.raises(BadValue, match="not a number of controls"):
        compare_returns(Echo(), actor, {}, seeds=[1], controls=-1)


def test_flips_do_not_count_what_comes_after_the_episode():
    pytest.importorskip("torchrl")
    from tdconcepts.rl import cartpole_env

    lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
    fall = TensorDictModule(lambda o: (o[..., 2] <= 0).long(), ["observation"], ["action"])
    result = compare_returns(cartpole_env(3), lean, {"fall": fall, "same": lean}, seeds=range(5), flip_rate=True)
    assert len(set(result.of("unpatched")["length"].tolist())) > 1
    assert result.of("fall")["flips"].tolist() == [1.0] * 5
    assert result.of("same")["flips"].tolist() == [0.0] * 5
    assert result.difference("same") == (0.0, 0.0, 0.0)


def test_the_policy_is_as_it_was_and_progress_ends_at_one():
    actor, calls = policy(), []
    compare_returns(Echo(), actor, {"z": {"z": Scale(0.0)}}, seeds=[1], progress=lambda *call: calls.append(call))
    assert not any(module._forward_hooks for module in actor.modules())
    assert calls[0] == ("closed-loop test", 0.0, "unpatched")
    assert calls[-1][1] == 1.0


def test_an_environment_that_does_not_repeat_its_starts_is_refused():
    with pytest.raises(BadValue, match="does not start from the same states"):
        compare_returns(Echo(repeats=False), policy(), {"z": {"z": Scale(1.0)}}, seeds=[1])


def test_bad_input():
    env, actor = Echo(), policy()
    with pytest.raises(BadType, match="not an environment"):
        compare_returns(None, actor, {}, seeds=[1])
    with pytest.raises(BadType, match="not variants by name"):
        compare_returns(env, actor, [actor], seeds=[1])
    for plain in (torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Linear(1, 1))):
        with pytest.raises(BadType, match="TensorDictModule"):
            compare_returns(env, plain, {}, seeds=[1])
    for seeds in (3, [0.5], [-1], "a", None):
        with pytest.raises(BadType, match="not seeds"):
            compare_returns(env, actor, {}, seeds=seeds)
    with pytest.raises(BadType, match="the variant 'three' is no policy"):
        compare_returns(env, actor, {"three": 3}, seeds=[1])
    with pytest.raises(BadValue, match="named 'unpatched'"):
        compare_returns(env, actor, {"unpatched": actor}, seeds=[1])
    for confidence in (95, "high"):
        with pytest.raises(BadValue, match="confidence"):
            compare_returns(env, actor, {}, seeds=[1], confidence=confidence)
    for controls in (-1, "two"):
        with pytest.raises(BadValue, match="not a number of controls"):
            compare_returns(env, actor, {}, seeds=[1], controls=controls)
    with pytest.raises(BadValue, match="no episode"):
        compare_returns(env, actor, {}, seeds=[1], max_steps=2.5)
    with pytest.raises(BadValue, match="no episode"):
        compare_returns(env, actor, {}, seeds=[])
    with pytest.raises(BadType, match="flip_rate"):
        compare_returns(env, lambda td: td, {}, seeds=[1], flip_rate=True)


def test_a_trained_agent_needs_its_logit_direction_and_no_random_one(agent):
    from tdconcepts.interventions.directions import RemoveDirection, random_directions
    from tdconcepts.rl import cartpole_env

    weight = agent.policy[2].module.weight.detach()
    logits = RemoveDirection(weight[1] - weight[0])
    chance = RemoveDirection(random_directions(1, 64, torch.Generator().manual_seed(0))[0])
    variants = {"logits": {"concept": logits}, "chance": {"concept": chance}}
    result = compare_returns(cartpole_env(12), agent.policy, variants, seeds=range(12), flip_rate=True)
    assert result.mean("unpatched")[0] > 400
    assert result.difference("logits")[2] < -300
    assert result.difference("chance")[0] > -100
    assert result.of("logits")["flips"].mean() > result.of("chance")["flips"].mean()
