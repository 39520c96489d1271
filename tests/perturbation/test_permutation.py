"""Permutation: what is replaced comes from other rows, by one order for each feature."""

import pytest
import torch
from oracles import oracle
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts import Site, Target
from tdconcepts.errors import BadValue
from tdconcepts.hooks.drawing import Source
from tdconcepts.perturbation import FeaturePermutation


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 50])
@pytest.mark.parametrize("size", [(6,), (2, 3)])
def test_each_feature_comes_from_another_row(net, batch, chunk_size, size):
    td = batch(*size)
    found = FeaturePermutation(net, Target("logits", 1), generator=seeded(), chunk_size=chunk_size)(td.copy())
    orders = Source(seeded()).permutations(4, 6)
    x = td["x"].reshape(6, 4)
    whole = net(TensorDict(x=x.clone(), batch_size=[6]))["logits"][:, 1]
    for i in range(4):
        changed = x.clone()
        changed[:, i] = x[orders[i], i]
        loss = whole - net(TensorDict(x=changed, batch_size=[6]))["logits"][:, 1]
        torch.testing.assert_close(found["attribution", "x"].reshape(6, 4)[:, i], loss.detach())


def test_feature_permutation_of_captum(net, batch):
    """Captum's order is handed over by its perm_func."""
    orders = iter(Source(seeded()).permutations(4, 5))

    def shuffle(x, mask):
        changed = x.clone()
        order = next(orders)
        changed[:, mask.squeeze(0).bool()] = x[order][:, mask.squeeze(0).bool()]
        return changed

    td = batch(5)
    module = torch.nn.Sequential(net[0].module, net[1].module)
    theirs = oracle("captum.attr").FeaturePermutation(module, shuffle).attribute(td["x"], target=0)
    FeaturePermutation(net, Target("logits", 0), generator=seeded())(td)
    torch.testing.assert_close(td["attribution", "x"], theirs, check_dtype=False)


def test_sites_and_masks_are_permuted_too(net, batch):
    td = batch(5)
    mask = {"hidden": torch.tensor([0, 0, 1, 1, 1])}
    explain = FeaturePermutation(net, Target("logits", 0), ["hidden", Site("0.0")], mask=mask, generator=seeded())
    found = explain(td)["attribution"]
    assert torch.equal(found["hidden"][:, 0], found["hidden"][:, 1])
    assert found["0.0"].abs().max() > 0


def test_bad_input(net, batch):
    with pytest.raises(BadValue, match="no other row"):
        FeaturePermutation(net, Target("logits", 0))(batch(1))
    with pytest.raises(BadValue, match="baseline here"):
        FeaturePermutation(net, Target("logits", 0), baseline=0.0)
    norm = TensorDictModule(torch.nn.BatchNorm1d(4), ["x"], ["logits"])
    with pytest.raises(BadValue, match="statistics of the batch"):
        FeaturePermutation(norm, Target("logits", 0))(batch(5))
