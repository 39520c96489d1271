"""Marks: which policy made which step, in this process and in workers."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from tdconcepts import Ablate, Do, Site, Steps, When, intervene, patch
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.rl import cartpole_policy
from tdconcepts.rl.marking import MARK, Marked, check_marked

torchrl = pytest.importorskip("torchrl")


def step(acting, rows=3):
    return acting(TensorDict(observation=torch.zeros(rows, 4), batch_size=[rows]))


def test_every_intervention_has_its_own_mark():
    policy = cartpole_policy(8)
    acting = [
        policy,
        patch(policy, {"concept": Ablate([3])}),
        patch(policy, {"concept": Ablate([4])}),
        patch(policy, {Site("0.0"): Ablate([3])}),
        intervene(policy, "concept", strategy=Do(0.0), k=2),
        intervene(policy, "concept", strategy=Do(1.0), k=2),
        intervene(policy, "concept", strategy=Do(1.0), k=3),
    ]
    marks = [Marked(one).mark for one in acting]
    assert len(set(marks)) == len(marks)


def test_learning_keeps_it_and_copies_have_it():
    acting = Marked(patch(cartpole_policy(8), {"concept": Ablate([3])}))
    mark = acting.mark
    for parameter in acting.parameters():
        parameter.data += 1
    for again in (copy.deepcopy(acting), pickle.loads(pickle.dumps(acting))):
        assert again.mark == mark
    assert step(acting)[MARK].tolist() == [mark] * 3


def test_check():
    policy = cartpole_policy(8)
    acting, plain = Marked(patch(policy, {"concept": Ablate([3])})), Marked(policy)
    check_marked(step(acting), acting)
    with pytest.raises(BadValue, match="3 of 6 steps"):
        check_marked(torch.cat([step(acting), step(plain)]), acting)
    with pytest.raises(BadType, match="not data"):
        check_marked(None, acting)
    with pytest.raises(BadKey, match="no marks"):
        check_marked(step(policy), acting)


def make_env():
    from torchrl.envs import Compose, GymEnv, InitTracker, StepCounter, TransformedEnv

    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    return TransformedEnv(env, Compose(StepCounter(), InitTracker()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchrl's own making
@pytest.mark.parametrize("several", [False, True])
def test_collectors(several):
    from torchrl.collectors import Collector, MultiSyncCollector

    pytest.importorskip("gymnasium")
    policy = cartpole_policy(8)
    acting = Marked(patch(policy, {"concept": When(Ablate(), Steps(2))}))
    make = MultiSyncCollector if several else Collector
    collector = make([make_env] * 2 if several else make_env(), acting, frames_per_batch=8, total_frames=8)
    try:
        (data,) = list(collector)
    finally:
        collector.shutdown()
    check_marked(data, acting)
    late = data["step_count"].squeeze(-1) >= 2
    assert late.any()
    assert data["concept"][late].eq(0).all()
    assert data["concept"][~late].ne(0).all()
    with pytest.raises(BadValue, match="another mark"):
        check_marked(data, Marked(policy))
