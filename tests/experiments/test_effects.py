"""Effects of ablations by hand; attribution patching against its formula and against patching itself."""

import functools

import pytest
import torch
from experiments.models import cnn, language, mlp, pipeline, residual
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import ablation_effects, activation_patching, attribution_patching, each, every
from tdconcepts.hooks import Ablate, Add, Site, Target, capture, patch

TARGET = Target("y", 0)


def two_runs(make, rows=3):
    model, clean = make(rows)
    _, corrupt = make(rows)
    return model, clean, corrupt, TensorDict(clean=clean, corrupt=corrupt, batch_size=[rows])


def units_by_hand(model, td, site, size, to):
    y = model(td.copy())["y"][:, 0]
    found = []
    for i in range(size):
        with patch(model, {Site(site): to(i)}) as m:
            found.append(m(td.copy())["y"][:, 0] - y)
    return torch.stack(found, 1).detach()


def test_zero_and_mean():
    model, td = mlp(4)
    for edit, to in ((None, "zero"), (Ablate(to="mean"), "mean")):
        effect = ablation_effects(model, Site("1"), TARGET, edit)(td.copy())["ablation", "effect"]
        expected = units_by_hand(model, td, "1", 5, lambda i, to=to: Ablate([i], to=to))
        torch.testing.assert_close(effect, expected)


def test_resample():
    model, td = mlp(4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3))
    with capture(model, "1", clone=True) as m:
        other = m(td.copy())["activation", "1"][order]

    def to(i):
        return lambda v, td: torch.cat([v[:, :i], other[:, i : i + 1], v[:, i + 1 :]], 1)

    before = torch.get_rng_state()
    effects = ablation_effects(model, Site("1"), TARGET, resample=torch.Generator().manual_seed(3))
    assert effects.in_keys == ["x"]
    torch.testing.assert_close(effects(td.copy())["ablation", "effect"], units_by_hand(model, td, "1", 5, to))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(BadValue, match="one row"):
        effects(td[0])


def test_channels_heads_and_whole_sites():
    model, td = cnn(2)
    channels = ablation_effects(model, Site("2"), TARGET, split=functools.partial(every, dim=-3))
    assert channels(td.copy())["ablation", "effect"].shape == (2, 4)
    model, td = language(2)
    heads = functools.partial(every, groups=2)
    target = Target("logits", (-1, 0))
    effects = ablation_effects(model, Site("blocks.*.out", "input"), target, split=heads)(td.copy())
    assert effects["ablation", "effect"].shape == (2, 6)
    whole = ablation_effects(model, Site("blocks.*"), target, split=each)(td.copy())["ablation", "effect"]
    assert whole.shape == (2, 3)


def test_the_largest_of_the_model_as_it_is():
    model, td = mlp(4)
    largest, both = (
        ablation_effects(model, Site("1"), target)(td.copy())["ablation", "effect"]
        for target in (Target("y", "argmax"), Target("y", [0, 1]))
    )
    torch.testing.assert_close(largest, both[torch.arange(4), :, model(td.copy())["y"].argmax(-1)])


def test_attribution_patching_by_its_formula():
    model, clean, corrupt, td = two_runs(mlp)
    x0, x1 = corrupt["x"], clean["x"]
    first, rest = model.module[0], model.module[1:]
    for n_steps in (1, 4):
        out = attribution_patching(model, Site("0"), TARGET, n_steps=n_steps)(td.copy())
        gradients = []
        for k in range(n_steps):
            a = first(x0 + k / n_steps * (x1 - x0)).detach().requires_grad_()
            gradients.append(torch.autograd.grad(rest(a)[:, 0].sum(), a)[0])
        expected = (first(x1) - first(x0)).detach() * sum(gradients) / n_steps
        torch.testing.assert_close(out["patching", "0"], expected)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_exact_for_a_linear_model(direction):
    layers = [nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)]
    model = TensorDictModule(nn.Sequential(*layers).double(), ["x"], ["y"])
    inputs = {name: {"x": torch.randn(3, 4).double()} for name in ("clean", "corrupt")}
    td = TensorDict(inputs, batch_size=[3])
    estimate = attribution_patching(model, [Site("*"), "x"], TARGET, direction=direction)(td.copy())["patching"]
    patching = activation_patching(model, [Site("0"), Site("1")], TARGET, split=every, direction=direction)
    clean, corrupt = (model(td[name].copy())["y"][:, 0].detach() for name in ("clean", "corrupt"))
    change = clean - corrupt if direction == "denoise" else corrupt - clean
    effect = patching(td)["patching", "effect"] * change[:, None]
    torch.testing.assert_close(torch.cat([estimate["0"], estimate["1"]], -1), effect)
    torch.testing.assert_close(estimate["x"].sum(-1), change)


def test_more_steps_come_closer():
    model, clean, corrupt, td = two_runs(mlp, 16)
    change = (model(clean.copy())["y"] - model(corrupt.copy())["y"])[:, 0]
    errors = []
    for n_steps in (1, 64):
        out = attribution_patching(model, "x", TARGET, n_steps=n_steps)(td.copy())
        errors.append((out["patching", "x"].sum(-1) - change).abs().mean().item())
    assert errors[1] < 0.1 * errors[0]


def test_sites_entries_and_targets_at_once():
    model, _, _, td = two_runs(pipeline)
    several = attribution_patching(model, ["hidden", Site("0.0"), "x"], Target("y", [0, 1]), n_steps=2)
    assert several.out_keys == [("patching", "hidden"), ("patching", "0.0"), ("patching", "x")]
    out = several(td)["patching"]
    assert (out["hidden"].shape, out["x"].shape) == ((3, 2, 5), (3, 2, 4))
    model, _, _, td = two_runs(residual)
    assert attribution_patching(model, Site("blocks.*"), TARGET)(td)["patching", "blocks.0"].shape == (3, 6)


def test_the_largest_is_held():
    model, clean, _, td = two_runs(mlp)
    chosen = model(clean.copy())["y"].argmax(-1)
    for direction in ("denoise", "noise"):
        largest, both = (
            attribution_patching(model, "x", target, direction=direction, n_steps=3)(td.copy())["patching", "x"]
            for target in (Target("y", "argmax"), Target("y", [0, 1]))
        )
        torch.testing.assert_close(largest, both[torch.arange(3), chosen])


def test_batch_dims():
    model, _ = mlp(1)
    flat = {name: torch.randn(6, 4).double() for name in ("clean", "corrupt")}
    td = TensorDict({name: {"x": x.view(2, 3, 4)} for name, x in flat.items()}, batch_size=[2, 3])
    single = TensorDict({name: {"x": x[1]} for name, x in flat.items()}, batch_size=[])
    for n_steps in (1, 3):
        patching = attribution_patching(model, Site("1"), TARGET, n_steps=n_steps)
        whole = patching(td.copy())["patching", "1"]
        torch.testing.assert_close(whole[0, 1], patching(single.copy())["patching", "1"])
    effects = ablation_effects(model, Site("1"), TARGET)
    torch.testing.assert_close(
        effects(td["clean"].copy())["ablation", "effect"][0, 1],
        effects(single["clean"].copy())["ablation", "effect"],
    )


class Density:
    """The log-density of a logged number: it reads two entries that the model writes, and one that it doesn't."""

    goals, in_keys = ("loc", "scale"), ("a",)

    def __call__(self, value, td):
        return torch.distributions.Normal(td["loc"], td["scale"]).log_prob(td["a"]).squeeze(-1)


def test_a_target_of_several_entries():
    torch.manual_seed(1)
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 3), ["x"], ["h"]),
        TensorDictModule(nn.Linear(3, 1), ["h"], ["loc"]),
        TensorDictModule(nn.Sequential(nn.Linear(3, 1), nn.Softplus()), ["h"], ["scale"]),
    )
    clean, corrupt = (TensorDict(x=torch.randn(2, 5, 4), batch_size=[2, 5]) for _ in range(2))
    td, target = clean.copy().set("a", torch.randn(2, 5, 1)), Target("loc", Density())

    def y(run, edits=None):
        with patch(model, edits or {"h": Add(0.0)}) as m:
            return Density()(None, m(run.copy()).set("a", td["a"]))

    effect = ablation_effects(model, "h", target)(td.copy())["ablation", "effect"]
    torch.testing.assert_close(effect, torch.stack([y(td, {"h": Ablate([i])}) - y(td) for i in range(3)], -1))
    both = TensorDict(clean=clean, corrupt=corrupt, a=td["a"], batch_size=[2, 5])
    out = activation_patching(model, "h", target)(both)
    assert sorted(out["sweep"].keys()) == ["loc", "scale"]
    torch.testing.assert_close(out["patching", "effect"], torch.ones(2, 5, 1))
    with pytest.raises(BadKey, match="no entry 'scale'"):
        ablation_effects(model[:2], "h", target)


def test_errors():
    model, _, _, td = two_runs(mlp)
    with pytest.raises(BadValue, match="one value"):
        ablation_effects(model, Site("1"), TARGET, Ablate(), resample=torch.Generator())
    with pytest.raises(BadType, match="not a way to split"):
        ablation_effects(model, Site("1"), TARGET, split=None)
    with pytest.raises(BadType, match="not a generator"):
        ablation_effects(model, Site("1"), TARGET, resample=3)
    with pytest.raises(BadType, match="not a Target"):
        ablation_effects(model, Site("1"), None)
    with pytest.raises(BadValue, match="direction"):
        attribution_patching(model, Site("1"), TARGET, direction="up")
    with pytest.raises(BadValue, match="steps"):
        attribution_patching(model, Site("1"), TARGET, n_steps=0)
    with pytest.raises(BadKey, match="clean"):
        attribution_patching(model, Site("1"), TARGET)(td.select("corrupt"))
    model, _, _, td = two_runs(residual)
    with pytest.raises(BadValue, match="call"):
        attribution_patching(model, Site("shared"), TARGET)(td)
    with pytest.raises(BadValue, match="which call"):
        ablation_effects(model, Site("shared"), TARGET, resample=torch.Generator())(td["clean"])
    model, _, _, td = two_runs(language)
    with pytest.raises(BadType, match="no way"):
        attribution_patching(model, Site("blocks.0"), Target("logits", (0, 0)), n_steps=2)(td)
