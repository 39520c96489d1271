"""Bilinear probes: the closed form against ridge on products, low rank against the full form and the truth."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.representations import BilinearProbe, cross_validate, score


def make(n=200, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(n, w, generator=generator).double() for w in (4, 3, 3))
    u, v = torch.randn(4, 2, generator=generator).double(), torch.randn(3, 2, generator=generator).double()
    y = torch.stack([((a @ u) * (b @ v)).sum(-1), a[:, 0] * b[:, 1]], -1)
    return TensorDict(a=a, b=b, c=c, y=y + noise * torch.randn(n, 2, generator=generator), batch_size=[n])


def test_the_full_form_is_ridge_on_all_products():
    linear = pytest.importorskip("sklearn.linear_model")
    td = make(noise=1.0)
    products = torch.einsum("na,nb->nab", td["a"], td["b"]).flatten(1).numpy()
    oracle = linear.Ridge(alpha=2.0).fit(products, td["y"].numpy())
    probe = BilinearProbe("a", "b", "y", ridge=2.0).fit(td)
    torch.testing.assert_close(probe.of().weight.flatten(0, 1).T, torch.from_numpy(oracle.coef_))
    torch.testing.assert_close(probe(td)["probe", "a", "b"], torch.from_numpy(oracle.predict(products)))


def test_low_rank_finds_the_truth_and_full_rank_the_closed_form():
    td = make()
    assert score(BilinearProbe("a", "b", "y", rank=2, ridge=1e-6).fit(td), td)["a", "b"].min() > 0.9999
    noisy = make(noise=1.0)
    full = BilinearProbe("a", "b", "y").fit(noisy).of().weight
    torch.testing.assert_close(
        BilinearProbe("a", "b", "y", rank=9, steps=300).fit(noisy).of().weight, full, atol=1e-3, rtol=0
    )
    low = BilinearProbe("a", "b", "y", rank=1).fit(noisy).of().weight
    assert torch.linalg.matrix_rank(low.movedim(-1, 0), rtol=1e-9).tolist() == [1, 1]


def test_a_low_rank_is_no_worse_than_the_truncated_closed_form():
    td = make(noise=3.0)

    def objective(weight):
        z = torch.einsum("na,abk,nb->nk", td["a"], weight, td["b"])
        rest = td["y"] - z
        return (rest - rest.mean(0)).square().sum(0) + weight.square().sum((0, 1))

    full = BilinearProbe("a", "b", "y").fit(td).of().weight.movedim(-1, 0)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    cut = (u[..., :1] * s[..., None, :1] @ vh[:, :1]).movedim(0, -1)
    assert (objective(BilinearProbe("a", "b", "y", rank=1).fit(td).of().weight) <= objective(cut) + 1e-6).all()


def test_pairs_streams_and_folds():
    td = make(noise=0.1)
    probe = BilinearProbe(["a", "a"], ["b", "c"], "y", rank=2)
    scores = cross_validate(probe, [td[:90], td[90:]], folds=3)
    assert scores.score["a", "b"].min() > 0.9
    assert scores.score["a", "c"].max() < 0.2
    assert probe.in_keys == ["a", "b", "c"]
    with pytest.raises(BadKey, match="no one direction"):
        probe.direction(("a", "b"))


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((["a", "b"], "b", "y"), {}, "pair up"),
        (("a", "b", "y"), {"rank": 0}, "rank"),
        (("a", "b", "y"), {"ridge": 0.0}, "out of range"),
    ],
)
def test_bad_settings(args, options, text):
    with pytest.raises(BadValue, match=text):
        BilinearProbe(*args, **options)


def test_too_many_products_ask_for_a_rank():
    td = TensorDict(a=torch.ones(2, 100), b=torch.ones(2, 100), y=torch.ones(2), batch_size=[2])
    with pytest.raises(BadValue, match="rank=4"):
        BilinearProbe("a", "b", "y").fit(td)
