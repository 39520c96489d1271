"""Expected gradients: by hand on the same draws, in the limit of all pairs, and on a linear net."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts import IntegratedGradients, Site, Target
from tdconcepts.attribution import ExpectedGradients
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.drawing import Source


def seeded():
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("size", [(), (3,), (2, 2)])
def test_by_hand_on_the_same_draws(pipeline, batch, size, chunk_size):
    td, rows = batch(*size), batch(3)
    explain = ExpectedGradients(
        pipeline, Target("logits", 1), baselines=rows, n_samples=4, generator=seeded(), chunk_size=chunk_size
    )
    found = explain(td.copy())["attribution"]
    source = Source(seeded())
    chosen, places = source.choices(torch.ones(3), 4), source.uniform(4).double()
    slow = {"x": 0.0, "z": 0.0}
    for m, u in zip(chosen, places, strict=True):
        point = {k: (rows[k][m] + u * (td[k] - rows[k][m])).requires_grad_() for k in slow}
        y = pipeline(TensorDict(point, batch_size=size))["logits"][..., 1].sum()
        for key, gradient in zip(slow, torch.autograd.grad(y, list(point.values())), strict=True):
            slow[key] = slow[key] + (td[key] - rows[key][m]) * gradient / 4
    for key, expected in slow.items():
        torch.testing.assert_close(found[key], expected)


def test_many_draws_come_near_integrated_gradients_over_all_baselines(net, batch):
    td, rows = batch(3), batch(4)
    found = ExpectedGradients(net, Target("logits", 0), baselines=rows, n_samples=20000, generator=seeded())(td.copy())
    each = [
        IntegratedGradients(net, Target("logits", 0), n_steps=200)(
            td.copy().set(("baseline", "x"), row["x"].expand(3, 4))
        )["attribution", "x"]
        for row in rows
    ]
    expected = torch.stack(each).mean(0)
    assert (found["attribution", "x"] - expected).abs().max() < 0.05 * expected.abs().max()


def test_several_targets_are_the_loop(net, batch):
    td, rows = batch(3), batch(2)
    both, one = (
        ExpectedGradients(net, Target("logits", s), baselines=rows, n_samples=5, generator=seeded())(td.copy())
        for s in ([2, 0], 0)
    )
    torch.testing.assert_close(both["attribution", "x"][:, 1], one["attribution", "x"])


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_at_sites_by_hand(net, batch, chunk_size):
    """The layer's own difference, times its gradient at the drawn point of the inputs."""
    td, rows = batch(3), batch(4)
    wrt = ["x", Site("0"), Site("3", index=(slice(1, 4),))]
    explain = ExpectedGradients(
        net, Target("logits", [2, 0]), wrt, baselines=rows, n_samples=3, generator=seeded(), chunk_size=chunk_size
    )
    found = explain(td.copy())["attribution"]
    source = Source(seeded())
    chosen, places = source.choices(torch.ones(4), 3), source.uniform(3).double()
    first, rest = net.module[0], net.module[1:]
    slow = 0.0
    for m, u in zip(chosen, places, strict=True):
        point = first(rows["x"][m] + u * (td["x"] - rows["x"][m])).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(rest(point.clone())[:, 2].sum(), point)
        slow = slow + (first(td["x"]) - first(rows["x"][m])) * gradient / 3
    torch.testing.assert_close(found["0"][:, 0], slow.detach())
    assert found["3[1:4]"].shape == (3, 2, 3)
    alone = ExpectedGradients(net, Target("logits", [2, 0]), "x", baselines=rows, n_samples=3, generator=seeded())
    torch.testing.assert_close(alone(td)["attribution", "x"], found["x"])


def test_bad_input(net, batch):
    def make(baselines, **options):
        return ExpectedGradients(net, Target("logits", 0), baselines=baselines, **options)

    with pytest.raises(BadType, match="not rows of baselines"):
        make(torch.zeros(3, 4))
    with pytest.raises(BadValue, match="not rows of baselines"):
        make(batch())
    with pytest.raises(BadKey, match="no entry 'x'"):
        make(batch(3).select("z"))
    with pytest.raises(BadValue, match="another shape"):
        make(TensorDict(x=torch.zeros(2, 5), batch_size=[2]))(batch(2))
    with pytest.raises(BadValue, match="number of samples"):
        make(batch(2), n_samples=0)
    with pytest.raises(BadKey, match="no entry 'x'"):
        make(batch(2).select("z"), wrt=Site("0"))
