"""Policies of torchrl, as they are: each against plain layers with the same weights, in both conventions."""

import pytest
import torch
from lrp.cases import close
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts import Target
from tdconcepts.lrp import LRP, EpsilonPlus, EpsilonPlusFlat

modules = pytest.importorskip("torchrl.modules")


def without_biases(net):
    net = net.double().eval()
    for name, p in net.named_parameters():
        if name.endswith("bias") or "bias_" in name:
            nn.init.zeros_(p)
    return net


def explained(net, td, select=1, composite=None, wrt="x", **options):
    composite = EpsilonPlus(1e-9, 1e-9) if composite is None else composite
    explainer = LRP(net, composite, Target("logits", select), wrt, outputs=True, **options)
    out = explainer(td.copy())
    return out["attribution", "x"], out["logits"]


def conv_net():
    sizes = {"in_features": 3, "num_cells": [4, 4], "kernel_sizes": [4, 3], "strides": [2, 2]}
    body = modules.ConvNet(**sizes)
    width = body(torch.rand(1, 3, 16, 16)).shape[-1]
    return nn.Sequential(body, modules.MLP(width, 3, num_cells=[8], activation_class=nn.ReLU))


def dueling():
    sizes = {"in_features": 3, "num_cells": [4, 4], "kernel_sizes": [4, 3], "strides": [2, 2]}
    net = modules.DuelingCnnDQNet(3, 1, sizes, {"num_cells": [8]})
    net(torch.rand(1, 3, 16, 16))
    return net


def mlp():
    return modules.MLP(5, 3, num_cells=[8, 8], norm_class=nn.LayerNorm, norm_kwargs=[{"normalized_shape": 8}] * 2)


NETS = {"MLP": (mlp, (5,)), "ConvNet": (conv_net, (3, 16, 16)), "DuelingCnnDQNet": (dueling, (3, 16, 16))}


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("name", NETS)
def test_nets(name, convention):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = TensorDictModule(without_biases(make()), ["x"], ["logits"])
    td = TensorDict(x=torch.rand(2, 2, *shape, dtype=torch.float64), batch_size=[2, 2])
    for composite in (EpsilonPlus(1e-9, 1e-9), EpsilonPlusFlat(1e-9, 1e-9)):
        found, logits = explained(net, td, 1, composite, convention=convention)
        assert found.flatten(2).sum(-1).allclose(logits[..., 1], rtol=1e-5)
    row, _ = explained(net, td[1, :1], 1, composite, convention=convention)
    close(found[1, :1], row)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("centralized", [True, False])
def test_multi_agent_mlp(share, centralized, convention):
    torch.manual_seed(0)
    options = {"centralized": centralized, "share_params": share, "num_cells": [8], "activation_class": nn.Tanh}
    agents = modules.MultiAgentMLP(5, 2, 3, **options).double()
    net = TensorDictModule(agents, ["x"], ["logits"])
    td = TensorDict(x=torch.randn(4, 3, 5, dtype=torch.float64), batch_size=[4])
    alone = modules.MLP(15 if centralized else 5, 2, num_cells=[8], activation_class=nn.Tanh).double()
    for agent in range(3):
        params = agents.params if share else agents.params[agent]
        with params.to_module(alone):
            plain = TensorDictModule(alone, ["x"], ["logits"])
            x = td["x"].flatten(1) if centralized else td["x"][:, agent]
            wanted, _ = explained(plain, TensorDict(x=x, batch_size=[4]), 1, EpsilonPlus(0.1), convention=convention)
        found, _ = explained(net, td, (agent, 1), EpsilonPlus(0.1), convention=convention)
        close(found.flatten(1) if centralized else found[:, agent], wanted)
        assert found.count_nonzero() == wanted.count_nonzero()
    both, _ = explained(net, td, [(0, 1), (agent, 1)], EpsilonPlus(0.1), convention=convention)
    close(both[:, 1], found)


@pytest.mark.parametrize("convention", ["gradient", "relevance"])
@pytest.mark.parametrize("kind", ["LSTMModule", "GRUModule"])
def test_recurrent_modules(kind, convention):
    torch.manual_seed(0)
    memory = getattr(modules, kind)(input_size=5, hidden_size=6, in_key="x", out_key="h")
    head = TensorDictModule(nn.Linear(6, 3), ["h"], ["logits"])
    net = without_biases(TensorDictSequential(memory, head))
    td = TensorDict(x=torch.randn(2, 4, 5, dtype=torch.float64), batch_size=[2, 4])
    td["is_init"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    for key in memory.in_keys[1:]:
        if "state" in str(key):
            td[key] = torch.zeros(2, 4, 1, 6, dtype=torch.float64)
    found, logits = explained(net, td[:, 0].clone(), 1, convention=convention)
    assert found.sum(-1).allclose(logits[:, 1], rtol=1e-5)
    with modules.set_recurrent_mode(True):
        found, logits = explained(net, td, 1, convention=convention)
    assert found.sum((1, 2)).allclose(logits[..., 1].sum(1), rtol=1e-5)  # a step also explains those after it
