"""Ablation and occlusion: slow re-derivations, and Captum 0.9 where it is right."""

import pytest
import torch
from oracles import oracle

from tdconcepts import Target
from tdconcepts.errors import BadKey, BadValue
from tdconcepts.perturbation import FeatureAblation, Grid, Occlusion


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, check_dtype=False)  # Captum gives float32 at times


@pytest.mark.parametrize("mask", [None, torch.tensor([[[0, 0, 1, 1, 2, 2]] * 6]), Grid((3, 2))])
def test_feature_ablation_of_captum(image_net, images, mask):
    captum = oracle("captum.attr").FeatureAblation(image_net.module)
    ids = mask(torch.Size([2, 6, 6])) if isinstance(mask, Grid) else mask
    given = None if ids is None else ids.unsqueeze(0)
    theirs = captum.attribute(images["image"], target=1, baselines=0.3, feature_mask=given)
    FeatureAblation(image_net, Target("logits", 1), mask=mask, baseline=0.3)(images)
    close(images["attribution", "image"], theirs)


def test_features_shared_across_entries(pair, batch):
    td, mask = batch(3), {"x": torch.tensor([0, 0, 1, -1]), "z": torch.tensor([1, 2])}
    found = FeatureAblation(pair, Target("y"), mask=mask)(td.copy())["attribution"]
    whole = pair(td.copy())["y"][:, 0]
    for group in range(3):
        changed = td.copy()
        for key in ("x", "z"):
            changed.set(key, torch.where(mask[key] == group, 0.0, td[key]))
        loss = (whole - pair(changed)["y"][:, 0]).detach()
        for key in ("x", "z"):
            for i in (mask[key] == group).nonzero().flatten():
                torch.testing.assert_close(found[key][:, i], loss)
    assert found["x"][:, 3].abs().max() == 0  # -1 is never touched


def test_the_same_explainer_again_with_another_chunk(net, batch):
    """Captum 0.9 keeps a check from its first call and returns [-9, -9, 9] for [5, 7, 9]."""
    explain = FeatureAblation(net, Target("logits", 0))
    td = batch(3)
    first = explain(td.copy())["attribution", "x"]
    explain(batch(7))
    assert torch.equal(explain(td.copy())["attribution", "x"], first)


@pytest.mark.parametrize(
    ("window", "stride"),
    [((2, 3, 3), (2, 1, 1)), ((1, 2, 4), (1, 2, 3)), ((2, 4, 6), (2, 4, 6)), ((1, 5, 2), (1, 4, 2))],
)
def test_occlusion_of_captum(image_net, images, window, stride):
    captum = oracle("captum.attr").Occlusion(image_net.module)
    theirs = captum.attribute(images["image"], window, strides=stride, target=2, baselines=-0.5)
    Occlusion(image_net, Target("logits", 2), window=window, stride=stride, baseline=-0.5)(images)
    close(images["attribution", "image"], theirs)


def test_a_window_of_fewer_dims_covers_the_channels(image_net, images):
    td = images.copy()
    two = Occlusion(image_net, Target("logits", 0), window=(3, 3))(td.copy())["attribution", "image"]
    three = Occlusion(image_net, Target("logits", 0), window=(2, 3, 3), stride=(2, 1, 1))(td)["attribution", "image"]
    torch.testing.assert_close(two, three)


def test_occlusion_by_hand(net, batch):
    td = batch(3)
    found = Occlusion(net, Target("logits", [0, 1]), window=2, stride=2, baseline=1.0)(td.copy())["attribution", "x"]
    odd = Occlusion(net, Target("logits", 0), window=3, stride=2, baseline=1.0)(td.copy())["attribution", "x"]

    def loss(*covered):
        x = td["x"].clone()
        x[:, list(covered)] = 1.0
        return (net(td.copy())["logits"] - net(td.copy().set("x", x))["logits"])[:, :2].detach()

    first, second = loss(0, 1), loss(2, 3)
    torch.testing.assert_close(found, torch.stack([first, first, second, second], -1))
    one, two = loss(0, 1, 2)[:, 0], loss(2, 3)[:, 0]
    torch.testing.assert_close(odd, torch.stack([one, one, (one + two) / 2, two], -1))


def test_windows_of_several_entries_slide_one_after_the_other(pair, batch):
    td = batch(3)
    both = Occlusion(pair, Target("y"), window={"x": 2, "z": 1})(td.copy())["attribution"]
    alone = Occlusion(pair, Target("y"), "x", window=2)(td.copy())["attribution", "x"]
    torch.testing.assert_close(both["x"], alone)
    single = FeatureAblation(pair, Target("y"), "z")(td.copy())["attribution", "z"]
    torch.testing.assert_close(both["z"], single)


def test_what_is_no_window(net, batch):
    def make(**options):
        return Occlusion(net, Target("logits", 0), **options)

    for window in (0, (), (1, 2.0), "x"):
        with pytest.raises(BadValue, match="not a window"):
            make(window=window)
    with pytest.raises(BadValue, match="leaves elements out"):
        make(window=2, stride=3)
    with pytest.raises(BadValue, match="more dims than the row"):
        make(window=(2, 2))(batch(2))
    with pytest.raises(BadValue, match="no mask"):
        make(window=2, mask=torch.zeros(4, dtype=torch.long))
    with pytest.raises(BadKey, match="other entries"):
        make(window={"z": 2})
