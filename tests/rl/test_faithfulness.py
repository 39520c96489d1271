"""Return curves: on an environment whose returns are known, and on the trained agent."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts.attribution import InputXGradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.faithfulness import Partial, return_curves
from tdconcepts.rl.targets import chosen_value


class Sum:
    """Two slots, two steps; what is seen is [1, 2, 3], the reward is the action."""

    batch_size, action_key, reward_key, done_keys = torch.Size([2]), "action", "reward", ["done"]

    def set_seed(self, seed):
        pass

    def reset(self):
        return TensorDict({"observation": torch.tensor([1.0, 2.0, 3.0]).expand(2, 3), "time": torch.zeros(2)}, [2])

    def step_and_maybe_reset(self, td):
        time = td["time"] + 1
        td["next"] = TensorDict({"reward": td["action"].unsqueeze(-1), "done": (time == 2).unsqueeze(-1)}, [2])
        return td, TensorDict({"observation": td["observation"], "time": time % 2}, batch_size=[2])


def total():
    return TensorDictModule(lambda o: o.sum(-1), ["observation"], ["action"])


def explain():
    return InputXGradient(total(), Target("action"))


def test_deletion_and_insertion_by_hand():
    found = return_curves(Sum(), total(), explain(), [0, 0, 0])
    assert found.features == (0, 1, 2, 3)
    assert found.curve("most")[1].tolist() == [12.0, 6.0, 2.0, 0.0]
    assert found.curve("least")[1].tolist() == [12.0, 10.0, 6.0, 0.0]
    assert found.curve("random")[1][[0, 3]].tolist() == [12.0, 0.0]
    assert found.area("most") < found.area("least")
    assert found.area("most") == pytest.approx((9 + 4 + 1) / 3)
    shown = return_curves(Sum(), total(), explain(), [0, 0], mode="insertion", orders=["most", "least"])
    assert shown.curve("most")[1].tolist() == [0.0, 6.0, 10.0, 12.0]
    assert shown.curve("least")[1].tolist() == [0.0, 2.0, 6.0, 12.0]
    based = return_curves(Sum(), total(), explain(), [0, 0], baseline=torch.tensor([1.0, 1.0, 1.0]), features=[1])
    assert based.curve("most")[1].tolist() == [8.0]


def test_random_orders_repeat_with_a_generator():
    one, other = (
        return_curves(
            Sum(), total(), explain(), range(6), orders=["random"], generator=torch.Generator().manual_seed(3)
        )
        for _ in range(2)
    )
    assert (one.episodes == other.episodes).all()
    assert one.curve("random")[1][1] not in (6.0, 10.0)


def test_on_the_trained_agent(agent, env):
    explainer = InputXGradient(agent.policy, chosen_value("logits"), wrt="observation")
    found = return_curves(
        env, agent.policy, explainer, range(8), features=[0, 1], orders=["most", "least"], max_steps=120
    )
    assert found.curve("most")[1][0] == found.curve("least")[1][0] == 120.0
    assert found.curve("most")[1][1] < 60.0
    assert found.curve("least")[1][1] > 100.0


def test_bad_input():
    with pytest.raises(BadValue, match="not a mode"):
        return_curves(Sum(), total(), explain(), [0], mode="both")
    with pytest.raises(BadValue, match="not an order"):
        return_curves(Sum(), total(), explain(), [0], orders=["best"])
    with pytest.raises(BadValue, match="not a number of features"):
        return_curves(Sum(), total(), explain(), [0], features=[4])
    with pytest.raises(BadType, match="not an environment"):
        return_curves(None, total(), explain(), [0])
    with pytest.raises(BadType, match="no floating-point entry"):
        return_curves(Sum(), total(), explain(), [0], wrt="pixels")
    with pytest.raises(BadKey, match="does not explain"):
        Partial(total(), total(), "observation", 1)
    with pytest.raises(BadKey, match="reads no entry"):
        Partial(total(), explain(), "state", 1)
    with pytest.raises(BadValue, match="no order"):
        return_curves(Sum(), total(), explain(), [0], features=[0]).curve("best")
