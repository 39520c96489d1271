"""Path patching against its three passes by hand, and against sums over paths of a linear net."""

import functools

import pytest
import torch
from experiments.models import language, mlp, residual
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.experiments import activation_patching, every, path_patching
from tdconcepts.hooks import Replace, Site, Target, capture, patch


def two_runs(make, rows=3):
    model, clean = make(rows)
    corrupt = TensorDict({key: value.flip(0).roll(1, -1) for key, value in clean.items()}, batch_size=[rows])
    return model, TensorDict(clean=clean, corrupt=corrupt, batch_size=[rows])


def taken(model, td, *sites):
    with capture(model, *sites, clone=True) as m:
        out = m(td.copy())["activation"]
    return {site: out[str(site)] for site in sites}


def by_hand(model, td, senders, receivers, frozen, key="y"):
    """One sender after the other, in three passes."""
    run, donor = td["corrupt"], td["clean"]
    at_donor, at_run = taken(model, donor, *senders), taken(model, run, *frozen)
    found = []
    for sender in senders:
        edits = {site: Replace(at_run[site]) for site in frozen if site != sender} | {sender: Replace(at_donor[sender])}
        with patch(model, edits) as m:
            received = taken(m, run, *receivers)
        with patch(model, {site: Replace(value) for site, value in received.items()}) as m:
            found.append(m(run.copy())[key].detach())
    return torch.stack(found, 1)


BLOCKS = [Site(f"blocks.{i}") for i in range(3)]


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_against_three_passes(chunk_size):
    model, td = two_runs(residual)
    through = path_patching(model, BLOCKS[:2], BLOCKS[2], Target("y", 0), chunk_size=chunk_size)
    out = through(td)
    expected = by_hand(model, td, BLOCKS[:2], BLOCKS[2:], BLOCKS[:2])
    torch.testing.assert_close(out["sweep", "y"], expected)
    y, y_clean = (model(td[name].copy())["y"][:, :1].detach() for name in ("corrupt", "clean"))
    torch.testing.assert_close(out["patching", "effect"], (expected[..., 0] - y) / (y_clean - y))
    assert through.names(td) == ("blocks.0", "blocks.1")


class Streams(nn.Module):
    """y = c (b (a x) + a x): two ways from a to c, and one from a past b."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.c(self.b(a) + a)


def test_the_paths_of_a_linear_net_add_up():
    net = Streams().double()
    model = TensorDictModule(net, ["x"], ["y"])
    clean, corrupt = torch.randn(2, 4, 2).double()
    td = TensorDict(clean={"x": clean}, corrupt={"x": corrupt}, batch_size=[4])
    a, b, c = (layer.weight for layer in (net.a, net.b, net.c))
    change = ((clean - corrupt) @ a.T).detach()
    y = net(corrupt).detach()

    def effect(receiver, frozen):
        return path_patching(model, Site("a"), receiver, frozen=frozen)(td.clone())["sweep", "y"][:, 0] - y

    through_b = (change @ b.T @ c.T).detach()
    around_b = (change @ c.T).detach()
    torch.testing.assert_close(effect(Site("b", "input"), []), through_b)
    torch.testing.assert_close(effect(Site("c", "input"), Site("b")), around_b)
    torch.testing.assert_close(effect(Site("c", "input"), []), through_b + around_b)


def test_heads_and_positions():
    model, td = two_runs(language)
    heads = functools.partial(every, groups=2)
    senders, receiver = Site("blocks.*.out", "input"), Site("ln_f", "input")
    out = path_patching(model, Site("blocks.0.out", "input"), receiver, split=heads, frozen=senders)(td.clone())
    assert out["sweep", "logits"].shape == (3, 2, 5, 11)
    run, donor = td["corrupt"], td["clean"]
    frozen = [Site(f"blocks.{i}.out", "input") for i in range(3)]
    at_donor, at_run = taken(model, donor, frozen[0]), taken(model, run, *frozen)
    mixed = at_run[frozen[0]].clone()
    mixed[..., 4:] = at_donor[frozen[0]][..., 4:]
    with patch(model, {site: Replace(value) for site, value in at_run.items()} | {frozen[0]: Replace(mixed)}) as m:
        received = taken(m, run, receiver)[receiver]
    with patch(model, {receiver: Replace(received)}) as m:
        torch.testing.assert_close(out["sweep", "logits"][:, 1], m(run.copy())["logits"].detach())


def test_every_way_is_activation_patching():
    """Where all that follows the sender goes through the receiver, and nothing is frozen, the path is the effect."""
    model, td = two_runs(mlp)
    path = path_patching(model, Site("0"), Site("2.0"), Target("y", 1), split=every, direction="noise", frozen=[])
    whole = activation_patching(model, Site("0"), Target("y", 1), split=every, direction="noise")
    torch.testing.assert_close(path(td.clone())["patching", "effect"], whole(td.clone())["patching", "effect"])


@pytest.mark.parametrize("shape", [[], [3, 1]])
def test_batch_dims(shape):
    model, td = two_runs(mlp)
    path = path_patching(model, Site("0"), Site("3"), Target("y", 1), split=every)
    flat = path(td.clone())["patching", "effect"]
    out = path((td[0] if not shape else td.reshape(shape)).clone())["patching", "effect"]
    torch.testing.assert_close(out, flat[0] if not shape else flat.reshape(*shape, 5))


def test_an_entry_as_sender():
    model, td = two_runs(mlp)
    out = path_patching(model, "x", Site("0"), frozen=[])(td.clone())
    torch.testing.assert_close(out["sweep", "y"][:, 0], model(td["clean"].copy())["y"].detach())


def test_errors():
    model, td = two_runs(mlp)
    with pytest.raises(BadValue, match="receiver too"):
        path_patching(model, [Site("0"), Site("1")], Site("1"))
    with pytest.raises(BadKey, match="no module"):
        path_patching(model, Site("0"), Site("nine"))
    with pytest.raises(BadKey, match="no module"):
        path_patching(model, Site("0"), Site("1"), frozen=Site("nine"))
    with pytest.raises(BadValue, match="direction"):
        path_patching(model, Site("0"), Site("1"), direction="up")
    with pytest.raises(BadValue, match="nothing flows"):
        path_patching(model, Site("3"), Site("1"), frozen=[])(td.clone())
    twice, runs = two_runs(residual)
    with pytest.raises(BadValue, match="several times"):
        path_patching(twice, Site("blocks.0"), Site("blocks.1"), frozen=Site("shared"))(runs)
    with pytest.raises(BadKey, match="corrupt"):
        path_patching(model, Site("0"), Site("1"))(td.select("clean"))
