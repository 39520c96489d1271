"""TCAV: derivatives along vectors, scores and their test, against autograd and scipy."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Site, Target
from tdconcepts.representations import TCAV
from tdconcepts.representations.tcav import welch


def draw(shift=0.0, n=40, at=0, seed=0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double()
    x[:, at] += shift
    return TensorDict(x=x, batch_size=[n])


def model():
    """The output listens to the first input alone."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
    with torch.no_grad():
        first.weight.copy_(torch.eye(4))
        last.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    return TensorDictModule(nn.Sequential(first, nn.Tanh(), last), ["x"], ["y"]).double()


def fitted(target, runs=12, **options):
    tcav = TCAV(model(), target, Site("0"), runs, generator=torch.Generator().manual_seed(1), **options)
    return tcav.fit({"first": draw(3.0, seed=2), "second": draw(3.0, at=1, seed=3)}, random=draw(n=90, seed=4))


def test_the_derivative_along_the_mean_vector():
    tcav, td = fitted(Target("y", [0, 1])), draw(seed=5)
    vectors = tcav.kept(0)[0].mean(1)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    h = td["x"].clone().requires_grad_()
    y = tcav.module.module[1:](h)
    slopes = torch.stack([torch.autograd.grad(y[:, i].sum(), h, retain_graph=True)[0] for i in range(2)], 1)
    torch.testing.assert_close(tcav(td)["tcav", "0"], slopes @ vectors.T)
    assert vectors[0, 0] > 0.9
    assert vectors[1, 1] > 0.9


def test_a_concept_that_matters_differs_from_random_ones():
    found = fitted(Target("y", 0)).test([draw(seed=5), draw(seed=6)])
    assert found.concepts == ("first", "second")
    assert found.score["0"][0] == 1.0
    assert found.magnitude["0"][0] > 0.3
    assert found.p_value["0"][0] < 0.01
    assert found.magnitude["0"][0] > 3 * found.magnitude["0"][1].abs()
    assert "first: 1 (p=" in repr(found)


def test_scores_are_shares_of_rows():
    stats = pytest.importorskip("scipy.stats")
    tcav, td = fitted(Target("y", [1, 0])), draw(seed=5)
    vectors, random = tcav.kept(0)
    weight = tcav.module.module[2].weight[[1, 0]].detach()
    slopes = (1 - td["x"].tanh().square()).unsqueeze(1) * weight
    scores = (torch.einsum("ntf,crf->ntcr", slopes, vectors) > 0).double().mean(0)
    blind = (torch.einsum("ntf,rf->ntr", slopes, random) > 0).double().mean(0)
    found = tcav.test(td)
    torch.testing.assert_close(found.score["0"], scores.mean(-1))
    torch.testing.assert_close(found.random["0"], blind.mean(-1))
    for t in range(2):
        for c in range(2):
            if scores[t, c].std() > 0 and blind[t].std() > 0:
                p = stats.ttest_ind(scores[t, c], blind[t], equal_var=False).pvalue
                assert float(found.p_value["0"][t, c]) == pytest.approx(p, abs=1e-9)


def test_the_generator_decides():
    one, other = fitted(Target("y", 0)), fitted(Target("y", 0))
    assert all(torch.equal(a, b) for a, b in zip(one.kept(0), other.kept(0), strict=True))


def test_sites_of_any_shape_and_entries():
    torch.manual_seed(0)
    body = TensorDictModule(nn.Conv2d(1, 2, 3), ["image"], ["map"])
    head = TensorDictModule(nn.Sequential(nn.Flatten(), nn.Linear(18, 2)), ["map"], ["y"])
    net = TensorDictSequential(body, head)
    td = TensorDict(image=torch.randn(20, 1, 5, 5), batch_size=[20])
    tcav = TCAV(net, Target("y", 1), ["map", Site("0")], 3).fit({"a": td[:8]}, random=td[8:])
    found = tcav(td.clone())
    torch.testing.assert_close(found["tcav", "map"], found["tcav", "0"], atol=0.2, rtol=0)
    assert tcav.kept(0)[0].shape == (1, 3, 18)
    assert tcav.test(td).score["map"].shape == (1,)


def test_welch_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for n, m, shift in ((3, 40, 0.0), (8, 5, 0.5), (30, 30, 3.0), (4, 4, 1e-9), (100, 2, 1.0)):
        a, b = torch.randn(2, n, generator=generator), torch.randn(2, m, generator=generator) + shift
        expected = stats.ttest_ind(a.double(), b.double(), equal_var=False, axis=-1).pvalue
        torch.testing.assert_close(welch(a, b), torch.from_numpy(expected), atol=1e-10, rtol=1e-6)
    assert welch(torch.ones(3), torch.ones(4)) == 1.0
    assert welch(torch.ones(3), torch.zeros(4)) == 0.0


def test_more_units_than_examples_have_the_same_vectors():
    torch.manual_seed(0)
    wide = torch.linalg.qr(torch.randn(50, 50).double()).Q[:4]

    def fit(site, grow):
        body = TensorDictModule(grow, ["x"], ["wide"])
        model = TensorDictSequential(body, TensorDictModule(nn.Linear(site, 2).double(), ["wide"], ["y"]))
        tcav = TCAV(model, Target("y", 0), "wide", 3, generator=torch.Generator().manual_seed(1))
        return tcav.fit({"a": draw(2.0, n=6)}, random=draw(n=8, seed=4)).kept(0)[0]

    torch.testing.assert_close(fit(50, lambda x: x @ wide), fit(4, lambda x: x) @ wide, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: fitted(Target("y", 0), runs=1), BadValue, "runs"),
        (lambda: TCAV(model(), Target("y", 0), Site("0"), create_graph=True), BadType, "no graph"),
        (lambda: TCAV(model(), Target("y", 0), Site("0"))(draw()), BadValue, "not fitted"),
        (lambda: TCAV(model(), Target("y", 0), Site("0")).fit({}, draw()), BadValue, "no concepts"),
        (lambda: TCAV(model(), Target("y", 0), Site("0")).fit({"a": draw(n=1)}, draw()), BadValue, "too few"),
        (lambda: TCAV(model(), Target("y", 0), Site("0")).fit({"a": []}, draw()), BadValue, "no examples"),
        (lambda: fitted(Target("y", 0)).test([]), BadValue, "no rows"),
    ],
)
def test_bad_input(act, error, text):
    with pytest.raises(error, match=text):
        act()
