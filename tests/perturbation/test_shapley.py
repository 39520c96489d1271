"""Shapley values: all orders, all subsets, Captum 0.9, and the axioms."""

import itertools
import math

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts import Target
from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.drawing import Source
from tdconcepts.perturbation import ShapleyExact, ShapleySampling


@pytest.fixture
def over_orders(net, played):
    """``over_orders(td, orders)``: the mean of what each feature adds to those in front of it."""

    def mean(td, orders):
        total = torch.zeros_like(td["x"])
        for order in orders:
            fronts = [[i in order[:position] for i in range(4)] for position in range(5)]
            for feature, gain in zip(order, played(net, td, fronts).diff(dim=0), strict=True):
                total[..., feature] += gain
        return total / len(orders)

    return mean


@pytest.mark.parametrize("size", [(), (3,), (2, 2)])
def test_exact_values_are_the_mean_over_all_orders(net, batch, over_orders, size):
    td = batch(*size)
    found = ShapleyExact(net, Target("logits", 1))(td.copy())["attribution", "x"]
    slow = over_orders(td, list(itertools.permutations(range(4))))
    torch.testing.assert_close(found, slow)


@pytest.mark.parametrize("size", [(), (3,), (2, 2)])
def test_sampled_values_are_the_mean_over_the_drawn_orders(net, batch, over_orders, size):
    td = batch(*size)
    explain = ShapleySampling(net, Target("logits", 1), n_samples=3, generator=torch.Generator().manual_seed(1))
    orders = Source(torch.Generator().manual_seed(1)).permutations(3, 4).tolist()
    torch.testing.assert_close(explain(td.copy())["attribution", "x"], over_orders(td, orders))


def test_shapley_values_of_captum(net, batch):
    td = batch(3)
    module = torch.nn.Sequential(net[0].module, net[1].module)
    mask = torch.tensor([0, 1, 1, 2])
    captum = oracle("captum.attr").ShapleyValues(module)
    theirs = captum.attribute(td["x"], target=2, baselines=0.5, feature_mask=mask.unsqueeze(0))
    ShapleyExact(net, Target("logits", 2), mask=mask, baseline=0.5)(td)
    torch.testing.assert_close(td["attribution", "x"], theirs, check_dtype=False, atol=1e-6, rtol=1e-6)


def test_sampled_values_come_near_the_exact_ones_and_sum_to_the_difference(pair, batch):
    td = batch(4)
    mask = {"x": torch.tensor([0, 0, 1, 2]), "z": torch.tensor([3, 2])}
    exact = ShapleyExact(pair, Target("y"), mask=mask)(td.copy())["attribution"]
    sampled = ShapleySampling(pair, Target("y"), mask=mask, n_samples=400, generator=torch.Generator().manual_seed(0))
    found = sampled(td.copy())["attribution"]
    difference = pair(td.copy())["y"] - pair(td.copy().set("x", td["x"] * 0).set("z", td["z"] * 0))["y"]
    for scores in (exact, found):
        groups = torch.stack([scores["x"][:, 0], scores["x"][:, 2], scores["x"][:, 3], scores["z"][:, 0]], -1)
        torch.testing.assert_close(groups.sum(-1), difference[:, 0].detach())
        assert torch.equal(scores["x"][:, 3], scores["z"][:, 1])
    for key in ("x", "z"):
        assert (found[key] - exact[key]).abs().max() < 0.05 * exact[key].abs().max()


def test_one_feature_gets_the_whole_difference(net, batch, played):
    td, mask = batch(3), torch.zeros(4, dtype=torch.long)
    difference = played(net, td, [[False] * 4, [True] * 4]).diff(dim=0)[0]
    for cls in (ShapleyExact, ShapleySampling):
        found = cls(net, Target("logits", 1), mask=mask)(td.copy())["attribution", "x"]
        torch.testing.assert_close(found, difference.unsqueeze(-1).expand(3, 4))


def test_the_weights_of_the_definition():
    """The formula of Shapley 1953, on a game whose values are arbitrary numbers."""
    table = torch.randn(2**5, dtype=torch.float64)
    powers = 2 ** torch.arange(5, dtype=torch.float64)
    net = TensorDictModule(lambda x: table[(x @ powers).long()], ["x"], ["y"])
    td = TensorDict(x=torch.ones(1, 5, dtype=torch.float64), batch_size=[1])
    found = ShapleyExact(net, Target("y"))(td)["attribution", "x"][0]
    for g in range(5):
        expected = 0.0
        for subset in itertools.chain(*(itertools.combinations([i for i in range(5) if i != g], k) for k in range(5))):
            weight = math.factorial(len(subset)) * math.factorial(4 - len(subset)) / math.factorial(5)
            at = sum(2**i for i in subset)
            expected += weight * (table[at + 2**g] - table[at])
        torch.testing.assert_close(found[g], expected)


def test_bad_input(net, image_net, images):
    with pytest.raises(BadValue, match="too many features"):
        ShapleyExact(image_net, Target("logits", 0))(images)
    with pytest.raises(BadValue, match="number of samples"):
        ShapleySampling(net, Target("logits", 0), n_samples=0)
    with pytest.raises(BadType, match="not a generator"):
        ShapleySampling(net, Target("logits", 0), generator=3)
