"""Logistic probes against scikit-learn, and their optimum against the gradient."""

import warnings

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.errors import BadType, BadValue
from tdconcepts.representations import LogisticProbe
from tdconcepts.representations.logistic import Weighed, logistic


def make(n=150, width=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator).double() * torch.logspace(-1, 1, width).double() + 5
    z = (x - 5) @ torch.randn(width, 3, generator=generator).double() + torch.randn(n, 3, generator=generator)
    return TensorDict(x=x, y=(z[:, :2] > 0).long(), many=z.argmax(-1), batch_size=[n])


@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
def test_two_classes_equal_scikit_learns(ridge):
    linear = pytest.importorskip("sklearn.linear_model")
    td = make()
    probe = LogisticProbe("x", "y", ridge=ridge, tol=1e-13).fit(td)
    for k in range(2):
        oracle = linear.LogisticRegression(C=1 / ridge, tol=1e-8, max_iter=10000)
        oracle.fit(td["x"].numpy(), td["y"][:, k].numpy())
        torch.testing.assert_close(
            probe(td.clone())["probe", "x"][:, k],
            torch.from_numpy(oracle.predict_proba(td["x"].numpy()))[:, 1],
            atol=1e-4,
            rtol=0,
        )


def test_more_classes_equal_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    td = make()
    probe = LogisticProbe("x", "many", classes=3, tol=1e-13).fit(td)
    oracle = linear.LogisticRegression(tol=1e-8, max_iter=10000).fit(td["x"].numpy(), td["many"].numpy())
    found, expected = probe(td)["probe", "x"], torch.from_numpy(oracle.predict_proba(td["x"].numpy()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(150).double())


@pytest.mark.parametrize("classes", [None, 3])
def test_the_gradient_is_zero_at_the_optimum_of_every_weighted_problem(classes):
    td = make()
    y = td["many"].unsqueeze(-1).double() if classes else td["y"].double()
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(150, 3, generator=generator).double().round()
    x = torch.stack([td["x"], td["x"].flip(-1) / 3])
    found, bias, mean = logistic([Weighed(x, y, weight)].__iter__, 2.0, classes, tol=1e-14)
    torch.testing.assert_close(mean, x.mean(1))
    for s in range(2):
        for g in range(3):
            for k in range(y.shape[-1]):
                w, b = found[s, :, g, k].clone().requires_grad_(), bias[s, g, k].clone().requires_grad_()
                z = x[s] @ w + b
                if classes:
                    loss = torch.nn.functional.cross_entropy(z, y[:, k].long(), reduction="none")
                else:
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y[:, k], reduction="none")
                ((loss * weight[:, g]).sum() + w.square().sum()).backward()
                assert max(float(w.grad.abs().max()), float(b.grad.abs().max())) < 2e-4


def test_separable_classes_have_an_optimum_too():
    x = torch.linspace(-1, 1, 20).double().unsqueeze(-1)
    td = TensorDict(x=x, y=(x[:, 0] > 0).long(), batch_size=[20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = LogisticProbe("x", "y", ridge=1e-4).fit(td)
    assert ((probe(td)["probe", "x"] > 0.5) == td["y"].bool()).all()


def test_too_few_steps_are_told():
    with pytest.warns(UserWarning, match="did not converge"):
        LogisticProbe("x", "y", max_iter=1).fit(make())


@pytest.mark.parametrize(
    ("options", "change", "text"),
    [
        ({"ridge": 0.0}, {}, "ridge"),
        ({"classes": 1}, {}, "classes"),
        ({"max_iter": 0}, {}, "steps"),
        ({"tol": 0.0}, {}, "tolerance"),
        ({}, {"y": torch.full((150,), 2)}, "not binary"),
        ({"classes": 3}, {"y": torch.full((150,), 3)}, "none of the classes"),
        ({}, {"y": torch.zeros(150)}, "one class only"),
    ],
)
def test_bad_input(options, change, text):
    with pytest.raises(BadValue, match=text):
        LogisticProbe("x", "y", **options).fit(make().update(change))


def test_a_stream_that_ends_is_refused():
    with pytest.raises(BadType, match="several passes"):
        LogisticProbe("x", "y").fit(iter([make()]))
