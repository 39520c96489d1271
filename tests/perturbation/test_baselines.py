"""Baselines: each kind against the slow way, and what is none."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts import Target
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.perturbation import Blur, FeatureAblation, Mean


def slow(net, td, index, base):
    """``y(x) - y(x with one element replaced)``, element by element; ``base [*B, 4]``."""
    whole, columns = net(td.copy())["logits"][..., index], []
    for i in range(4):
        x = td["x"].clone()
        x[..., i] = base[..., i]
        columns.append(whole - net(td.copy().set("x", x))["logits"][..., index])
    return torch.stack(columns, -1).detach()


ROW = torch.tensor([0.1, -0.2, 0.3, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("baseline", "base"),
    [
        (None, torch.zeros_like),
        (0.5, lambda x: torch.full_like(x, 0.5)),
        (-2, lambda x: torch.full_like(x, -2.0)),
        (ROW, lambda x: ROW.expand(x.shape)),
        (ROW.float(), lambda x: ROW.float().double().expand(x.shape)),
        ({"x": 3.0}, lambda x: torch.full_like(x, 3.0)),
        ({}, torch.zeros_like),
        (Mean(), lambda x: x.mean(-1, keepdim=True).expand(x.shape)),
        (Mean(0), lambda x: x.mean(-1, keepdim=True).expand(x.shape)),
        (lambda value, lead: value.flip(-1), lambda x: x.flip(-1)),
    ],
)
def test_what_stands_in_for_a_feature(net, batch, baseline, base):
    td = batch(3)
    expected = slow(net, td, 1, base(td["x"]))
    found = FeatureAblation(net, Target("logits", 1), baseline=baseline)(td)["attribution", "x"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "baseline"), [("baseline", None), ("reference", "reference")])
def test_an_entry_holds_a_baseline_for_each_row(net, batch, name, baseline):
    td = batch(3).set((name, "x"), torch.randn(3, 4, dtype=torch.float64))
    explain = FeatureAblation(net, Target("logits", 1), baseline=baseline)
    assert ((name, "x") in explain.in_keys) == (baseline is not None)
    torch.testing.assert_close(explain(td)["attribution", "x"], slow(net, td, 1, td[name, "x"]))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_rows_of_a_data_set_are_averaged_over(pair, batch, chunk_size):
    td, rows = batch(3), batch(5)
    explain = FeatureAblation(pair, Target("y"), baseline=rows, chunk_size=chunk_size)
    each = [FeatureAblation(pair, Target("y"), baseline={"x": row["x"], "z": row["z"]}) for row in rows]
    found = explain(td.copy())
    for key in ("x", "z"):
        expected = torch.stack([one(td.copy())["attribution", key] for one in each]).mean(0)
        torch.testing.assert_close(found["attribution", key], expected)


def test_a_blur_is_a_gaussian_over_a_repeated_border():
    row = torch.randn(7, dtype=torch.float64)
    found = Blur(1.5, dims=1)(row.unsqueeze(0), 1)[0]
    weights = {shift: math.exp(-0.5 * (shift / 1.5) ** 2) for shift in range(-6, 7)}
    for i in range(7):
        expected = sum(weight * row[min(6, max(0, i + shift))] for shift, weight in weights.items())
        torch.testing.assert_close(found[i], expected / sum(weights.values()))


def test_a_blur_of_an_image_goes_over_both_dims_and_no_other():
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    found = Blur(1.0)(images, 1)
    down = Blur(1.0, dims=1)(images.mT, 1).mT
    torch.testing.assert_close(found, Blur(1.0, dims=1)(down, 1))


def test_a_mean_over_some_dims():
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Mean((-2, -1))(images, 1), images.mean((2, 3), keepdim=True).expand(images.shape))
    assert torch.equal(Mean()(images[:, 0, 0, 0], 1), images[:, 0, 0, 0])


def test_what_is_no_baseline(net, batch):
    def make(baseline):
        return FeatureAblation(net, Target("logits", 1), baseline=baseline)

    for wrong in (float("nan"), True, [1.0], lambda value: value):
        with pytest.raises(BadType, match="not a baseline"):
            make(wrong)
    with pytest.raises(BadKey, match="not explained"):
        make({"z": 0.0})
    with pytest.raises(BadKey, match="rows of the baseline"):
        make(TensorDict(y=torch.zeros(3, 4), batch_size=[3]))
    with pytest.raises(BadValue, match="not rows"):
        make(TensorDict(x=torch.zeros(4)))
    with pytest.raises(BadValue, match="another shape"):
        make(TensorDict(x=torch.zeros(3, 5), batch_size=[3]))(batch(2))
    with pytest.raises(BadValue, match="another shape"):
        make(torch.zeros(5))(batch(2))
    with pytest.raises(BadKey, match="no baseline for 'x'"):
        make("reference")(batch(2))
    with pytest.raises(BadValue, match="2 dims in a row"):
        make(Blur())(batch(2))
    with pytest.raises(BadType, match="not a baseline of 'x'"):
        make(lambda value, lead: None)(batch(2))
    for nan in (torch.tensor(math.nan), TensorDict(x=torch.full((1, 4), math.nan), batch_size=[1])):
        with pytest.raises(BadValue, match="not a number"):
            make(nan)(batch(2))
    for sigma, dims in ((0.0, 2), ("1", 2), (1.0, 1.5), (1.0, 0)):
        with pytest.raises(BadValue, match="not a blur"):
            Blur(sigma, dims)
    with pytest.raises(BadValue, match="no such dim"):
        Mean((3,))(torch.zeros(2, 3), 1)
    with pytest.raises(BadValue, match="not dims"):
        Mean((0.5,))


def test_whole_numbers_stay_whole():
    """Images of bytes; and what would be rounded in silence is refused."""
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    for made, whole in ((Blur(1.0), Blur(1.0)(images.double(), 1)), (Mean((1, 2)), images.double().mean((2, 3), True))):
        assert made(images, 1).dtype == torch.uint8
        assert (made(images, 1) - whole).abs().max() <= 0.5 + 1e-9
    model = TensorDictModule(lambda image: image.double().flatten(1).sum(-1), ["image"], ["y"])
    td = TensorDict(image=images, batch_size=[2])
    found = FeatureAblation(model, Target("y"), baseline=7.0)(td.copy())["attribution", "image"]
    torch.testing.assert_close(found, images - 7.0, check_dtype=False)
    with pytest.raises(BadValue, match="would be rounded"):
        FeatureAblation(model, Target("y"), baseline=0.5)(td)
