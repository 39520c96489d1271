"""How a target finds the logged action and the agent, in every form that torchrl writes."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.rl.selections import Alone, Chosen, of_agent, one_hot


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("form", ["index", "column", "one_hot", "bool", "float"])
def test_every_form_of_an_action(lead, form):
    value = torch.arange(4.0).expand(*lead, 4)
    index = torch.full(lead, 2)
    code = torch.nn.functional.one_hot(index, 4)
    action = {
        "index": index,
        "column": index.unsqueeze(-1),
        "one_hot": code,
        "bool": code.bool(),
        "float": code.float(),
    }
    td = TensorDict({"action": action[form]}, batch_size=lead)
    assert one_hot(value, td, "action").sum(-1).eq(1).all()
    assert torch.equal(Chosen("action")(value, td), torch.full(lead, 2.0))


def test_what_is_no_action():
    value = torch.zeros(3, 4)
    for action in (
        torch.full((3,), 4),
        torch.full((3,), -1),
        torch.zeros(3),
        torch.zeros(3, 4),
        torch.ones(3, 4).long(),
        torch.eye(4)[:3] * 0.3,  # a continuous action
    ):
        with pytest.raises(BadValue, match="does not index the actions"):
            one_hot(value, TensorDict({"action": action}, batch_size=[3]), "action")
    with pytest.raises(BadKey, match="no entry 'action'"):
        one_hot(value, TensorDict({}, batch_size=[3]), "action")


def test_agents():
    td, value = TensorDict({}, batch_size=[2]), torch.arange(6.0).reshape(2, 3, 1)
    assert of_agent(Alone(), 1)(value, td).tolist() == [1.0, 4.0]
    assert [one.agent for one in of_agent(Alone(), range(2))] == [0, 1]
    assert of_agent(Alone(), None)(value[:, :1, 0], td).tolist() == [0.0, 3.0]
    for wrong in ([], [1.5], "one", [None, "a"]):
        with pytest.raises(BadType, match="not an agent"):
            of_agent(Alone(), wrong)
