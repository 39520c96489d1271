"""Targets at a time step: against the loop over steps, on torchrl's recurrent modules and on plain memories."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.rl.targets import advantage
from tdconcepts.rl.times import at_time

KEY = ("attribution", "observation")


class Memory(nn.Module):
    def forward(self, x):
        return torch.tanh(x.cumsum(-2))


def model():
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(4, 6), Memory(), nn.Linear(6, 3)), ["observation"], ["logits"])


def rows(batch=(2, 5)):
    torch.manual_seed(1)
    td = TensorDict(observation=torch.randn(*batch, 4), batch_size=batch)
    td["action"] = torch.randint(0, 3, batch)
    td["when"] = torch.tensor([[1], [4]]).expand(2, 5)
    td["mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return td


def slow(net, td, times):
    x = td["observation"].clone().requires_grad_()
    logits = net(x).gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    return torch.autograd.grad(sum(logits[i, t] for i, t in enumerate(times)), x)[0]


@pytest.mark.parametrize(("time", "times"), [(2, [2, 2]), (-1, [4, 4]), ("when", [1, 4]), ("mask", [2, 4])])
def test_one_step(time, times):
    module, td = model(), rows()
    found = Gradient(module, at_time(Target("logits", by="action"), time), wrt="observation")(td.copy())[KEY]
    torch.testing.assert_close(found, slow(module.module, td, times))
    assert (found[0, times[0] + 1 :] == 0).all()


def test_several_steps_and_other_targets():
    module, td = model(), rows()
    found = Gradient(module, at_time(Target("logits", by="action"), [0, 3]), wrt="observation")(td.copy())[KEY]
    torch.testing.assert_close(found, torch.stack([slow(module.module, td, [t, t]) for t in (0, 3)], 2))
    chosen = Gradient(module, at_time(advantage("logits"), 3), wrt="observation")(td.copy())[KEY]
    assert not torch.allclose(chosen, found[:, :, 1])


@pytest.mark.parametrize("kind", ["LSTMModule", "GRUModule"])
def test_recurrent_policies(kind):
    modules = pytest.importorskip("torchrl.modules")
    torch.manual_seed(0)
    state = ["h", "c"][: 2 if kind == "LSTMModule" else 1]
    memory = getattr(modules, kind)(
        input_size=4, hidden_size=6, in_keys=["observation", *state], out_keys=["z", *(("next", s) for s in state)]
    )
    head = nn.Linear(6, 3)
    policy = TensorDictSequential(memory, TensorDictModule(head, ["z"], ["logits"]))
    td = rows().set("is_init", torch.zeros(2, 5, 1, dtype=torch.bool))
    td["is_init"][:, 0] = True
    for s in state:
        td[s] = torch.zeros(2, 5, 1, 6)
    inner = memory.lstm if kind == "LSTMModule" else memory.gru
    with modules.set_recurrent_mode(True):
        found = Gradient(policy, at_time(Target("logits", by="action"), 3), wrt="observation")(td.copy())[KEY]
    torch.testing.assert_close(found, slow(lambda x: head(inner(x)[0]), td, [3, 3]))


def test_a_decision_transformer():
    pytest.importorskip("transformers")
    modules = pytest.importorskip("torchrl.modules")
    torch.manual_seed(0)
    config = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 8, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    config |= {"activation": "relu", "n_positions": 64}
    net = modules.DTActor(state_dim=4, action_dim=2, transformer_config=config).eval()
    td = rows().set("action", torch.randn(2, 5, 2)).set("return_to_go", torch.randn(2, 5, 1))
    module = TensorDictModule(net, ["observation", "action", "return_to_go"], ["param"])
    found = Gradient(module, at_time(Target("param", 0), 2), wrt="observation")(td.copy())[KEY]
    x = td["observation"].clone().requires_grad_()
    out = net(x, td["action"], td["return_to_go"])[:, 2, 0]
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), x)[0])
    assert (found[:, 3:] == 0).all()
    assert (found[:, :2] != 0).any()


def test_bad_input():
    module, td = model(), rows()
    target = Target("logits", 0)
    for time, match in ((5, "no such step"), ("observation", "holds no time")):
        with pytest.raises(BadValue, match=match):
            Gradient(module, at_time(target, time))(td)
    with pytest.raises(BadValue, match="a time dim besides the batch"):
        Gradient(module, at_time(target, 0))(td[0])
    with pytest.raises(BadKey, match="'nowhere'"):
        Gradient(module, at_time(target, "nowhere"))(td)
    with pytest.raises(BadType, match="several targets"):
        at_time(Target("logits", [0, 1]), 0)
    with pytest.raises(BadType, match="not a time"):
        at_time(target, [])
