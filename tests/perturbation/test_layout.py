"""Channels that lie last change no number, and no model has to cope with them."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts import Site, Target
from tdconcepts.perturbation import FeatureAblation, FeaturePermutation, Grid, KernelShap, Occlusion, perturbing
from tdconcepts.perturbation.layout import Layout


class Body(nn.Module):
    """``[N, 3, 6, 6] -> [N, 4]``, by what ``flat`` makes of the planes; keeps how its input lies."""

    def __init__(self, flat, noise=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(noise), nn.MaxPool2d(2))
        self.flat, self.last, self.lying = flat, nn.Linear(20, 4), []

    def forward(self, x):
        self.lying.append(x.is_contiguous())
        return self.last(self.flat(self.layers(x.reshape(-1, *x.shape[-3:])))).reshape(*x.shape[:-3], 4)


def viewed(x):
    return x.view(len(x), -1)


def flattened(x):
    return x.flatten(1)


def model_of(flat, noise=0.0):
    torch.manual_seed(0)
    return TensorDictModule(Body(flat, noise), ["image"], ["y"])


def images(*batch):
    return TensorDict(image=torch.randn(*batch, 3, 6, 6), batch_size=batch)


def in_order(explain):
    """The same explainer, whose rows lie in order."""
    explain = copy.deepcopy(explain)
    explain._perturbing.layout = Layout(nn.Identity())
    return explain


ROWS = TensorDict(image=torch.linspace(-1, 1, 216).view(2, 3, 6, 6), batch_size=[2])


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FeatureAblation, {"chunk_size": 7}),
        (FeatureAblation, {"mask": Grid((4, 3)), "baseline": 0.3}),
        (FeatureAblation, {"mask": torch.arange(3).view(3, 1, 1)}),
        (FeatureAblation, {"mask": "parts"}),
        (Occlusion, {"window": (2, 4), "stride": (2, 3)}),
        (KernelShap, {"mask": Grid((3, 3)), "baseline": ROWS, "n_samples": 14}),
        (FeaturePermutation, {"mask": Grid((3, 3))}),
    ],
)
def test_no_number_depends_on_it(method, options, batch):
    if method is FeaturePermutation:
        if not batch:
            return
        options = {**options, "generator": torch.Generator().manual_seed(1)}
    td, model = images(*batch), model_of(flattened)
    td["parts", "image"] = torch.randint(-1, 3, (*batch, 3, 6, 6))
    explain = method(model, Target("y", [1, 3]), **options)
    ordered = in_order(explain)
    found = explain(td.copy())["attribution", "image"]
    assert not any(model.module.lying[1:])
    torch.testing.assert_close(found, ordered(td.copy())["attribution", "image"], rtol=1e-5, atol=1e-6)
    assert all(ordered.module.module.lying)
    assert found.is_contiguous()


def test_a_model_that_takes_a_view_gets_rows_in_order():
    """From its first forward on, and as if nothing had been tried: what it draws is the same, too."""
    model = model_of(viewed, noise=0.5)
    explain = FeatureAblation(model, Target("y", 1), mask=Grid((3, 3)), chunk_size=2)
    ordered, td = in_order(explain), images(2)
    for attempt in range(2):
        torch.manual_seed(3)
        found = explain(td.copy())["attribution", "image"]
        torch.manual_seed(3)
        assert torch.equal(found, ordered(td.copy())["attribution", "image"])
        assert model.module.lying.count(False) == 1, attempt


def test_other_errors_of_the_model_are_its_own():
    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        FeatureAblation(model_of(broken), Target("y", 1))(images(2))


@pytest.mark.parametrize(
    ("layers", "value", "takes"),
    [
        ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)], torch.zeros(2, 3, 5, 5), True),
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)], torch.zeros(3, 5, 5), True),
        ([nn.Conv2d(3, 4, 3)], torch.zeros(2, 3, 5, 5), False),  # nothing to gain
        ([nn.MaxPool2d(2), nn.AvgPool2d(2)], torch.zeros(2, 3, 5, 5), False),
        ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)], torch.zeros(2, 2, 5, 5), False),  # not what is convolved
        ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)], torch.zeros(2, 3, 5, 5).double(), False),  # far slower
        ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)], torch.zeros(2, 3), False),
    ],
)
def test_what_lies_with_its_channels_last(layers, value, takes):
    layout = Layout(nn.Sequential(*layers))
    assert layout.takes(value) == takes
    assert layout.of(value).is_contiguous() != takes
    assert torch.equal(layout.of(value), value)


def test_what_stays_is_worked_out_for_some_experiments_at_a_time(monkeypatch):
    td = images(2)
    for options in ({}, {"chunk_size": 7}, {"chunk_size": 3, "baseline": ROWS}):
        explain = FeatureAblation(model_of(flattened), Target("y", 1), **options)
        whole = explain(td.copy())["attribution", "image"]
        for most in (1, 11 * 108):  # 11 experiments
            monkeypatch.setattr(perturbing, "_MASKS", most)
            torch.testing.assert_close(explain(td.copy())["attribution", "image"], whole, rtol=1e-5, atol=1e-6)
            monkeypatch.undo()


def test_sites_and_graphs_are_left_alone():
    model, td = model_of(viewed), images(2)
    td["image"].requires_grad_()
    explain = FeatureAblation(model, Target("y", 1), Site("module.layers.0"), mask=Grid((2, 2)))
    explain(td.copy())
    found = FeatureAblation(model, Target("y", 1), mask=Grid((3, 3)), create_graph=True)(td.copy())
    found["attribution", "image"].sum().backward()
    assert all(model.module.lying)
    assert td["image"].grad.abs().sum() > 0
