"""Explained rollouts and policies against raw autograd, a hand-chunked loop, and themselves without a compiler."""

import itertools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Compiled, Gradient
from tdconcepts.rl import RolloutExplainer, chosen_value, explain_rollout

KEY = ("attribution", "observation")

pytestmark = pytest.mark.benchmark(group="rl")


def actor(*sizes):
    torch.manual_seed(0)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return TensorDictModule(nn.Sequential(*layers[:-1]), ["observation"], ["action_value"])


def rollout(*batch, latent=0):
    torch.manual_seed(0)
    td = TensorDict(observation=torch.randn(*batch, 4), action=torch.randint(0, 2, batch), batch_size=batch)
    td["next"] = TensorDict(observation=torch.randn(*batch, 4), reward=torch.ones(*batch, 1), batch_size=batch)
    return td.set("hidden", torch.randn(*batch, latent)) if latent else td


def raw(policy, observation, action):
    observation = observation.detach().requires_grad_()
    value = policy(TensorDict(observation=observation, batch_size=action.shape)).get("action_value")
    chosen = value.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return torch.autograd.grad(chosen, observation, torch.ones_like(chosen))[0]


@pytest.mark.parametrize("width", [64, 256])
def test_saliency_of_4000_states(compare, width):
    policy = actor(4, width, width, 2)
    explain = Gradient(policy, chosen_value())
    compare(
        f"saliency of [8, 500] states in one call, {width} wide / raw autograd",
        lambda td: explain_rollout(explain, td),
        {
            "as it lies": lambda td: td.set(KEY, raw(policy, td["observation"], td["action"])),
            "as rows": lambda td: td.set(
                KEY, raw(policy, td["observation"].flatten(0, 1), td["action"].flatten(0, 1)).unflatten(0, (8, 500))
            ),
        },
        rollout(8, 500),
        [KEY],
        at_most=1.1,
    )


def test_saliency_from_disk(compare, tmp_path):
    policy = actor(4, 64, 64, 2)
    explain = Gradient(policy, chosen_value())
    rollout(1024, 500, latent=16).memmap(tmp_path / "rollout")
    stored = TensorDict.load_memmap(tmp_path / "rollout")

    def by_hand(_):
        found = torch.empty(1024, 500, 4)
        for start in range(0, 1024, 32):
            part = stored[start : start + 32]
            found[start : start + 32] = raw(policy, part["observation"], part["action"])
        return [found]

    compare(
        "saliency of 512 000 steps from a memmap / a loop over chunks by hand",
        lambda _: [explain_rollout(explain, stored)[KEY]],
        by_hand,
        TensorDict(batch_size=[]),
        [KEY],
        at_most=1.2,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
def test_saliency_in_the_policy(compare):
    policy, td = actor(4, 64, 64, 2), rollout(16).exclude("next")
    explain = Gradient(policy, chosen_value(), outputs=True)
    compiled = Compiled(explain)
    with torch.no_grad():
        compare(
            "a policy of 16 environments that acts and explains, compiled / eager",
            lambda td: compiled(td),
            lambda td: explain(td),
            td,
            [KEY, "action_value"],
            faster=3,
        )


def test_a_postproc(compare):
    policy = actor(4, 64, 64, 2)
    explain = Gradient(policy, chosen_value())
    stage = RolloutExplainer(explain)
    compare(
        "the postproc of a collector, [16, 64] / raw autograd",
        lambda td: stage(td),
        lambda td: td.set(KEY, raw(policy, td["observation"], td["action"])),
        rollout(16, 64),
        [KEY],
    )
