"""Ridge and mass-mean probes against scikit-learn and the definitions."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadValue
from tdconcepts.representations import LinearProbe, MassMeanProbe


def make(n=60, width=5):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(n, width, generator=generator).double() @ torch.randn(width, width, generator=generator).double()
        + 2
    )
    y = torch.randn(n, 2, generator=generator).double() + x[:, :2]
    return TensorDict(x=x, y=y, c=(y > y.mean(0)).long(), batch_size=[n])


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_ridge_equals_scikit_learns(ridge):
    linear = pytest.importorskip("sklearn.linear_model")
    td = make()
    oracle = linear.Ridge(alpha=ridge).fit(td["x"].numpy(), td["y"].numpy())
    probe = LinearProbe("x", "y", ridge).fit(td)
    torch.testing.assert_close(probe.of().weight.T, torch.from_numpy(oracle.coef_))
    torch.testing.assert_close(probe(td)["probe", "x"], torch.from_numpy(oracle.predict(td["x"].numpy())))


@pytest.mark.parametrize("whiten", [True, False])
def test_mass_mean_is_the_definition(whiten):
    td = make()
    probe = MassMeanProbe("x", "c", whiten).fit(td)
    for k in range(2):
        one, other = (td["x"][td["c"][:, k] == v] for v in (1, 0))
        theta, middle = one.mean(0) - other.mean(0), 0.5 * (one.mean(0) + other.mean(0))
        within = torch.cat([one - one.mean(0), other - other.mean(0)])
        weight = torch.linalg.inv(within.T @ within / 60) @ theta if whiten else theta
        expected = torch.sigmoid((td["x"] - middle) @ weight)
        torch.testing.assert_close(probe(td.clone())["probe", "x"][:, k], expected)


def test_whitened_it_has_the_direction_of_fishers_discriminant():
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    td = make()
    oracle = discriminant.LinearDiscriminantAnalysis(solver="lsqr").fit(td["x"].numpy(), td["c"][:, 0].numpy())
    w = torch.from_numpy(oracle.coef_[0])
    torch.testing.assert_close(MassMeanProbe("x", "c").fit(td).direction()[0], w / w.norm())


def test_constant_and_equal_units_are_left_out():
    td = make()
    more = td.clone().set("x", torch.cat([td["x"], td["x"][:, :1], torch.ones(60, 2)], -1))
    torch.testing.assert_close(
        MassMeanProbe("x", "c").fit(more)(more)["probe", "x"], MassMeanProbe("x", "c").fit(td)(td)["probe", "x"]
    )


def test_ridge_makes_few_rows_enough():
    td = make(8, 12)
    with pytest.raises(BadValue, match="no spread"):
        MassMeanProbe("x", "c").fit(td)
    assert MassMeanProbe("x", "c", ridge=1e-2).fit(td)(td)["probe", "x"].isfinite().all()


@pytest.mark.parametrize(
    ("make_probe", "change", "text"),
    [
        (lambda: LinearProbe("x", "y", -1.0), {}, "ridge"),
        (lambda: LinearProbe("x", "y", float("nan")), {}, "ridge"),
        (lambda: MassMeanProbe("x", "c", ridge=-1.0), {}, "ridge"),
        (lambda: MassMeanProbe("x", "y"), {}, "not binary"),
        (lambda: MassMeanProbe("x", "c"), {"c": torch.ones(60, dtype=torch.int64)}, "a class has no rows"),
        (lambda: MassMeanProbe("x", "c"), {"x": torch.ones(60, 3)}, "no spread"),
    ],
)
def test_bad_input(make_probe, change, text):
    with pytest.raises(BadValue, match=text):
        make_probe().fit(make().update(change))
