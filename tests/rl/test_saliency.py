"""Perturbation saliency: each against a loop over the formula, and the degenerate cases."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.perturbation import Blur
from tdconcepts.rl.saliency import Greydanus, Sarfa, Spots, object_saliency
from tdconcepts.rl.targets import chosen_value

KEY, PIXELS = ("attribution", "observation"), ("attribution", "pixels")


def vectors(actions=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, actions)).double()
    td = TensorDict(observation=torch.randn(2, 3, 4).double(), batch_size=[2, 3])
    return TensorDictModule(net, ["observation"], ["q"]), td.set("action", torch.randint(0, actions, (2, 3)))


def images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 7 * 6, 3)).double()
    td = TensorDict(pixels=torch.rand(4, 2, 9, 8).double(), batch_size=[4])
    return TensorDictModule(net, ["pixels"], ["q"]), td.set("action", torch.randint(0, 3, (4,)))


def squared(before, after, action):
    return 0.5 * (before - after).square().sum()


def sarfa(before, after, action):
    p, new = before.softmax(0), after.softmax(0)
    change = p[action] - new[action]
    if change <= 0:
        return torch.zeros((), dtype=p.dtype)
    rest = torch.arange(len(p)) != action
    r, s = p[rest] / p[rest].sum(), new[rest] / new[rest].sum()
    k = 1 / (1 + (r * (r / s).log()).sum())
    return 2 * k * change / (k + change)


@pytest.mark.parametrize("actions", [2, 3])
@pytest.mark.parametrize(("make", "score"), [(Greydanus, squared), (Sarfa, sarfa)])
def test_features_by_the_formula(make, score, actions):
    module, td = vectors(actions)
    td["baseline", "observation"] = torch.ones(2, 3, 4).double()
    explain = make(module, "q", wrt="observation")
    found = explain(td.copy())[KEY]
    for i in range(2):
        for j in range(3):
            x = td["observation"][i, j]
            for f in range(4):
                moved = x.clone()
                moved[f] = 1.0
                slow = score(module.module(x), module.module(moved), td["action"][i, j])
                torch.testing.assert_close(found[i, j, f], slow)
    groups = make(module, "q", wrt="observation", mask=torch.tensor([0, 1, 1, -1]), baseline=0.0)(td.copy())[KEY]
    assert torch.equal(groups[..., 1], groups[..., 2])
    assert (groups[..., 3] == 0).all()


def test_sarfa_does_not_overflow_and_ignores_what_moves_all_values():
    big = TensorDictModule(lambda x: torch.stack([x[..., 0] + x[..., 1], x[..., 1], x[..., 1]], -1), ["o"], ["q"])
    td = TensorDict(o=torch.tensor([[1.0, 1e4]]), action=torch.tensor([0]), batch_size=[1])
    found = Sarfa(big, "q", wrt="o")(td.copy())["attribution", "o"]
    assert found.isfinite().all()
    assert found[0, 0] > 0.1
    assert found[0, 1].abs() < 1e-3
    assert Greydanus(big, "q", wrt="o")(td.copy())["attribution", "o"][0, 1] > 1e7


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(("make", "score"), [(Greydanus, squared), (Sarfa, sarfa)])
def test_spots_by_the_formula(make, score, chunk_size):
    module, td = images()
    spots = Spots(sigma=2.0, stride=4, blur=1.5)
    found = make(module, "q", wrt="pixels", features=spots, chunk_size=chunk_size)(td.copy())[PIXELS]
    assert found.shape == (4, 2, 9, 8)
    assert torch.equal(found[:, 0], found[:, 1])
    gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter
    blurred = torch.from_numpy(gaussian_filter(td["pixels"].numpy(), (0, 0, 1.5, 1.5), mode="nearest"))
    torch.testing.assert_close(Blur(1.5)(td["pixels"], 1), blurred, atol=1e-4, rtol=1e-4)
    blurred = Blur(1.5)(td["pixels"], 1)
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(8.0), indexing="ij")
    for i in range(4):
        before = module.module(td["pixels"][i : i + 1])[0]
        for row in (0, 4, 8):
            for column in (0, 4):
                mask = torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 8.0).double()
                moved = td["pixels"][i] * (1 - mask) + blurred[i] * mask
                slow = score(before, module.module(moved.unsqueeze(0))[0], td["action"][i])
                torch.testing.assert_close(found[i, 0, row, column], slow)
    middle = (found[:, 0, 0, 0] + found[:, 0, 4, 0]) / 2
    torch.testing.assert_close(found[:, 0, 2, 0], middle)
    torch.testing.assert_close(found[:, 0, 0, 7], found[:, 0, 0, 4])


def test_objects_differ_from_state_to_state():
    module, td = images()
    outlines = torch.randint(-1, 3, (4, 9, 8))
    outlines[0][outlines[0] == 2] = 1  # a state without the third object
    td["objects", "pixels"] = outlines
    found = object_saliency(module, chosen_value("q"), wrt="pixels")(td.copy())[PIXELS]
    moved = Greydanus(module, "q", wrt="pixels", mask="objects")(td.copy())[PIXELS]
    for i in range(4):
        x, a = td["pixels"][i : i + 1], td["action"][i]
        for o in range(3):
            place = outlines[i] == o
            before, after = (module.module(one)[0] for one in (x, torch.where(place, 0.0, x)))
            torch.testing.assert_close(found[i, :, place], (before - after)[a].expand_as(found[i, :, place]))
            torch.testing.assert_close(moved[i, :, place], squared(before, after, a).expand_as(moved[i, :, place]))
        assert (found[i, :, outlines[i] == -1] == 0).all()


def test_bad_input():
    module, td = vectors()
    for make in (lambda: Spots(sigma=0.0), lambda: Spots(stride=0)):
        with pytest.raises(BadValue, match="not "):
            make()
    with pytest.raises(BadValue, match="spots need pixels"):
        Greydanus(module, "q", wrt="observation", features=Spots())(td)
    with pytest.raises(BadValue, match="features and a mask"):
        Greydanus(module, "q", features=Spots(), mask=torch.zeros(4).long())
    with pytest.raises(BadKey, match="writes no entry 'logits'"):
        Greydanus(module)
    with pytest.raises(BadKey, match="objects"):
        object_saliency(module, chosen_value("q"), wrt="observation")(td)
    with pytest.raises(BadKey, match="no entry 'action'"):
        Sarfa(module, "q", wrt="observation")(td.exclude("action"))
