"""Mean and quantile of a distribution over returns: by the formula, by torchrl's own expectation, by finite steps."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadType, BadValue
from tdconcepts.rl.distributional import distribution_mean, distribution_quantile

SUPPORT = torch.tensor([-1.0, 0.0, 2.0, 3.0], dtype=torch.float64)


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(-1, (4, 2))).double()
    return TensorDictModule(net, ["observation"], ["action_value"])


def rows():
    torch.manual_seed(1)
    td = TensorDict(observation=torch.randn(3, 5, 4, dtype=torch.float64), batch_size=[3, 5])
    return td.set("action", torch.randint(0, 2, (3, 5)))


def slow_quantile(p, q):
    total = 0.0
    for i, one in enumerate(p.tolist()):
        if total + one >= q:
            return SUPPORT[0] if i == 0 else SUPPORT[i - 1] + (SUPPORT[i] - SUPPORT[i - 1]) * (q - total) / one
        total += one
    return SUPPORT[-1]


@pytest.mark.parametrize("q", [0.05, 0.3, 0.5, 0.9])
def test_by_the_formula(q):
    module, td = model(), rows()
    value = module(td.copy())["action_value"]
    p = value.softmax(-2).gather(-1, td["action"][..., None, None].expand(3, 5, 4, 1)).squeeze(-1)
    mean, _ = distribution_mean(module, support=SUPPORT).read(value, td, 2)
    torch.testing.assert_close(mean, (p * SUPPORT).sum(-1))
    found, _ = distribution_quantile(module, q, support=SUPPORT).read(value, td, 2)
    for one, expected in zip(p.reshape(-1, 4), found.flatten(), strict=True):
        torch.testing.assert_close(torch.as_tensor(slow_quantile(one, q)).double(), expected)


def test_gradients_by_finite_steps():
    module, td = model(), rows()
    for target in (distribution_mean(module, support=SUPPORT), distribution_quantile(module, 0.5, support=SUPPORT)):
        found = Gradient(module, target)(td.copy())["attribution", "observation"]
        for feature in range(4):
            step = torch.zeros(4, dtype=torch.float64)
            step[feature] = 1e-6
            ends = [target.read(module.module(td["observation"] + s * step), td, 2)[0] for s in (1, -1)]
            torch.testing.assert_close(found[..., feature], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_torchrls_actor():
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    torch.manual_seed(0)
    actor = modules.DistributionalQValueActor(
        modules.MLP(4, (5, 3), num_cells=[8]),
        in_keys=["observation"],
        spec=data.OneHot(3),
        support=torch.linspace(-2, 2, 5),
    )
    td = TensorDict(observation=torch.randn(7, 4), batch_size=[7])
    logged = nn.functional.one_hot(torch.randint(0, 3, (7,)), 3)
    ran = actor(td.copy())
    expected = (actor[-1]._support_expected(ran["action_value"]) * logged).sum(-1)
    mean, _ = distribution_mean(actor).read(ran["action_value"], td.copy().set("action", logged), 1)
    torch.testing.assert_close(mean, expected)
    explained = Gradient(actor, distribution_mean(actor))(td.copy().set("action", logged))
    x = td["observation"].clone().requires_grad_()
    value = actor[-1]._support_expected(actor(td.copy().set("observation", x))["action_value"])
    slow = torch.autograd.grad((value * logged).sum(), x)[0]
    torch.testing.assert_close(explained["attribution", "observation"], slow)


def test_bad_input():
    module, td = model(), rows()
    with pytest.raises(BadType, match="no support"):
        distribution_mean(module)
    for support in (SUPPORT.flip(0), SUPPORT[:1], SUPPORT.view(2, 2)):
        with pytest.raises(BadValue, match="not a support"):
            distribution_mean(module, support=support)
    with pytest.raises(BadValue, match="do not fit the support"):
        Gradient(module, distribution_mean(module, support=SUPPORT[:3]))(td)
    with pytest.raises(BadValue, match="not a quantile"):
        distribution_quantile(module, 1.0, support=SUPPORT)
