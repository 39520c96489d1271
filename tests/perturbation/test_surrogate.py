"""KernelShap and Lime: exact games, the regression solved slowly, scikit-learn's ridge and Captum 0.9."""

import pytest
import torch
from oracles import oracle

from tdconcepts import Target
from tdconcepts.errors import BadValue
from tdconcepts.perturbation import KernelShap, Lime, ShapleyExact


def seeded():
    return torch.Generator().manual_seed(2)


def test_all_subsets_give_the_exact_values(pair, batch):
    td = batch(3)
    exact = ShapleyExact(pair, Target("y"))(td.copy())["attribution"]
    found = KernelShap(pair, Target("y"), n_samples=62)(td.copy())["attribution"]
    for key in ("x", "z"):
        torch.testing.assert_close(found[key], exact[key])


@pytest.mark.parametrize("n_samples", [3, 8, 13])
def test_sampled_subsets_solve_the_regression(net, batch, played, n_samples):
    """The same subsets, with the two ends at weight 1e9 in place of an exact constraint."""
    td = batch(3)
    explain = KernelShap(net, Target("logits", 1), n_samples=n_samples, generator=seeded())
    kept = KernelShap(net, Target("logits", 1), n_samples=n_samples, generator=seeded())._design(4).kept
    found = explain(td.copy())["attribution", "x"]
    values = played(net, td, kept)
    torch.testing.assert_close(found.sum(-1), values[1] - values[0])
    weights = torch.tensor([1e9, 1e9] + [1.0] * n_samples, dtype=torch.float64).sqrt().unsqueeze(-1)
    design = torch.cat([torch.ones(len(kept), 1), kept], 1).double()
    if torch.linalg.matrix_rank(design) == 5:
        slow = torch.linalg.lstsq(weights * design, weights * values).solution[1:].T
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


def test_sampled_values_come_near_the_exact_ones(image_net, images):
    mask = torch.arange(9).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    exact = ShapleyExact(image_net, Target("logits", 0), mask=mask)(images.copy())["attribution", "image"]
    found = KernelShap(image_net, Target("logits", 0), mask=mask, n_samples=400, generator=seeded())(images)
    assert (found["attribution", "image"] - exact).abs().max() < 0.2 * exact.abs().max()


def test_sizes_are_drawn_in_proportion_to_the_kernel(net):
    """p(k) ~ (G - 1) / (k (G - k)), and each subset of a size is as likely as any other."""
    kept = KernelShap(net, Target("logits", 0), n_samples=20000, generator=seeded())._design(30).kept[2:]
    sizes = torch.arange(1, 30, dtype=torch.float64)
    expected = 1 / (sizes * (30 - sizes))
    expected = 20000 * expected / expected.sum()
    found = kept.sum(-1).bincount(minlength=31)[1:30]
    assert ((found - expected).abs() < 5 * expected.sqrt()).all()
    each = kept.sum(0).double()
    assert (each - 10000).abs().max() < 400


def test_kernel_shap_of_captum_on_a_game_that_is_linear(net, batch):
    """Any subsets will do there; Captum's ends have weight 1e6."""
    linear = torch.nn.Linear(4, 3)
    td = batch(3).select("x").to(torch.float32)
    model = torch.nn.Sequential(linear)
    captum = oracle("captum.attr").KernelShap(model)
    rows = [captum.attribute(row, target=1, n_samples=60, baselines=0.2) for row in td["x"].split(1)]
    module = type(net[0])(model, ["x"], ["logits"])
    KernelShap(module, Target("logits", 1), baseline=0.2, n_samples=10)(td)
    torch.testing.assert_close(td["attribution", "x"], torch.cat(rows), atol=1e-3, rtol=1e-3)


def test_fewer_subsets_than_features_still_sum_to_the_difference(image_net, images):
    found = KernelShap(image_net, Target("logits", 0), n_samples=5, generator=seeded())(images.copy())
    difference = (
        image_net(images.copy())["logits"] - image_net(images.copy().set("image", images["image"] * 0))["logits"]
    )
    total = found["attribution", "image"].flatten(1).sum(-1)
    torch.testing.assert_close(total, difference[:, 0].detach())


@pytest.mark.parametrize("cls", [KernelShap, Lime])
def test_one_feature(net, batch, played, cls):
    """Captum's KernelShap gives NaN probabilities."""
    td = batch(3)
    options = {} if cls is KernelShap else {"alpha": 0.0, "kernel_width": 1.0}
    explain = cls(net, Target("logits", 1), mask=torch.zeros(4, dtype=torch.long), **options)
    found = explain(td.copy())["attribution", "x"]
    ends = played(net, td, torch.tensor([[False], [True]]).expand(2, 4))
    torch.testing.assert_close(found, (ends[1] - ends[0]).unsqueeze(-1).expand(3, 4))


@pytest.mark.parametrize(("width", "alpha"), [(0.25, 1.0), (1.0, 0.01)])
def test_lime_is_a_weighted_ridge_regression(net, batch, played, width, alpha):
    ridge = pytest.importorskip("sklearn.linear_model").Ridge
    td, options = batch(3), {"n_samples": 30, "kernel_width": width, "alpha": alpha}
    found = Lime(net, Target("logits", 1), generator=seeded(), **options)(td.copy())["attribution", "x"]
    kept = Lime(net, Target("logits", 1), generator=seeded(), **options)._design(4).kept
    cosine = torch.nn.functional.cosine_similarity(kept.double(), torch.ones(1, 4).double(), dim=-1)
    weights = torch.exp(-((1 - cosine) ** 2) / (2 * width**2))
    fit = ridge(alpha).fit(kept.double(), played(net, td, kept), sample_weight=weights.numpy())
    torch.testing.assert_close(found, torch.tensor(fit.coef_))


@pytest.mark.parametrize(("width", "alpha"), [(0.25, 0.001), (1.0, 0.01), (1.0, 0.0)])
@pytest.mark.parametrize("target", [1, [1, 0]])
def test_lime_is_a_weighted_lasso(net, batch, played, width, alpha, target):
    linear = pytest.importorskip("sklearn.linear_model")
    td, options = batch(3), {"n_samples": 30, "kernel_width": width, "alpha": alpha, "penalty": "l1"}
    explain = Lime(net, Target("logits", target), generator=seeded(), **options)
    found = explain(td.copy())["attribution", "x"]
    kept = explain.replace(generator=seeded())._design(4).kept
    cosine = torch.nn.functional.cosine_similarity(kept.double(), torch.ones(1, 4).double(), dim=-1)
    weights = torch.exp(-((1 - cosine) ** 2) / (2 * width**2)).numpy()
    model = linear.Lasso(alpha, tol=1e-14, max_iter=100_000) if alpha else linear.LinearRegression()
    values = played(net, td, kept)
    fits = [torch.tensor(model.fit(kept.double(), one, sample_weight=weights).coef_) for one in values.T]
    torch.testing.assert_close(found[:, 0] if isinstance(target, list) else found, torch.stack(fits))
    if alpha == 0.01:
        assert (found == 0).any()
        assert (found != 0).any()


def test_the_lasso_has_a_derivative(net, batch):
    td = batch(2)

    def scores(x):
        explain = Lime(
            net, Target("logits", 1), n_samples=20, alpha=0.002, generator=seeded(), penalty="l1", create_graph=True
        )
        return explain(td.copy().set("x", x))["attribution", "x"]

    x = td["x"].requires_grad_()
    assert scores(x).requires_grad
    torch.testing.assert_close(scores(x).detach(), scores(x.detach()))
    assert torch.autograd.gradcheck(scores, x)


def test_bad_input(net):
    with pytest.raises(BadValue, match="no such penalty"):
        Lime(net, Target("logits", 0), penalty="l3")
    with pytest.raises(BadValue, match="number of samples"):
        KernelShap(net, Target("logits", 0), n_samples=0)
    with pytest.raises(BadValue, match="not a width"):
        Lime(net, Target("logits", 0), kernel_width=0.0)
    with pytest.raises(BadValue, match="not a penalty"):
        Lime(net, Target("logits", 0), alpha=-1.0)
