"""Activation patching and causal tracing against patches by hand."""

import copy
import functools
import pickle

import pytest
import torch
from experiments.models import Language, language, mlp, pipeline, residual
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import activation_patching, causal_trace, every
from tdconcepts.experiments.patching import called
from tdconcepts.hooks import Replace, Site, Target, capture, patch

TARGET = Target("y", 0)


def two_runs(make, rows=3):
    model, clean = make(rows)
    _, corrupt = make(rows)
    other = TensorDict({key: value.flip(0).roll(1, -1) for key, value in corrupt.items()}, batch_size=[rows])
    return model, clean, other, TensorDict(clean=clean, corrupt=other, batch_size=[rows])


def by_hand(model, donor, run, edits, target):
    key, i = target.of, target.select
    y, y_donor = (model(td.copy())[key][..., i] for td in (run, donor))
    found = []
    for edit in edits:
        with patch(model, edit) as m:
            found.append((m(run.copy())[key][..., i] - y) / (y_donor - y))
    return torch.stack(found, 1).detach()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_layers(direction):
    model, clean, corrupt, td = two_runs(mlp)
    donor, run = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    with capture(model, "0", "2.0", clone=True) as m:
        taken = m(donor.copy())["activation"]
    out = activation_patching(model, [Site("0"), Site("2.0")], TARGET, direction=direction)(td)
    edits = [{Site(name): Replace(taken[name])} for name in ("0", "2.0")]
    expected = by_hand(model, donor, run, edits, TARGET)
    torch.testing.assert_close(out["patching", "effect"], expected)
    torch.testing.assert_close(expected, torch.ones_like(expected))  # a layer of a chain carries everything


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_units_and_what_is_inside_a_branch(direction):
    model, clean, corrupt, td = two_runs(residual)
    donor, run = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    with capture(model, "blocks.1.1", clone=True) as m:
        taken = m(donor.copy())["activation", "blocks.1.1"]
    patching = activation_patching(model, Site("blocks.1.1"), TARGET, split=every, direction=direction)
    edits = [
        {Site("blocks.1.1"): lambda v, td, i=i: torch.cat([v[..., :i], taken[..., i : i + 1], v[..., i + 1 :]], -1)}
        for i in range(6)
    ]
    torch.testing.assert_close(patching(td)["patching", "effect"], by_hand(model, donor, run, edits, TARGET))
    assert patching.names(td)[2] == "blocks.1.1[2]"


def test_a_module_that_runs_twice():
    model, clean, corrupt, td = two_runs(residual)
    with capture(model, Site("shared", call="all"), clone=True) as m:
        taken = m(clean.copy())["activation", "shared@all"]
    out = activation_patching(model, [Site("shared"), Site("shared", call=0)], TARGET)(td)["patching", "effect"]
    both = {Site("shared", call=0): Replace(taken[:, 0]), Site("shared", call=1): Replace(taken[:, 1])}
    one = {Site("shared", call=0): Replace(taken[:, 0])}
    torch.testing.assert_close(out, by_hand(model, clean, corrupt, [both, one], TARGET))
    units = activation_patching(model, Site("shared"), TARGET, split=every)(td)["patching", "effect"]
    assert units.shape == (3, 6)
    assert not torch.allclose(units, torch.ones_like(units))


def test_entries():
    model, clean, corrupt, td = two_runs(pipeline)
    out = activation_patching(model, ["hidden", "x", "side"], TARGET)(td)["patching", "effect"]
    torch.testing.assert_close(out[:, 1], torch.ones(3).double())
    torch.testing.assert_close(out[:, 0] + out[:, 2], torch.ones(3).double())  # y is a sum of the two branches
    edits = [{"hidden": Replace(model(clean.copy())["hidden"].detach())}]
    torch.testing.assert_close(out[:, :1], by_hand(model, clean, corrupt, edits, TARGET))


def test_positions_and_heads():
    model, _, _, td = two_runs(language)
    target = Target("logits", (-1, 3))
    positions = activation_patching(model, Site("blocks.*"), target, split=functools.partial(every, dim=-2))
    effect = positions(td.copy())["patching", "effect"].unflatten(-1, (3, 5))
    torch.testing.assert_close(effect[:, -1, -1], torch.ones(3).double())  # all that the last logits see
    torch.testing.assert_close(effect[:, -1, :-1], torch.zeros(3, 4).double(), atol=1e-9, rtol=0)
    sites = Site("blocks.*.out", "input")
    heads = activation_patching(model, sites, target, split=functools.partial(every, groups=2))
    assert heads(td.copy())["patching", "effect"].shape == (3, 6)
    assert heads.names(td)[-1] == "blocks.2.out:in[1]"


def test_several_targets_and_the_largest():
    model, clean, _, td = two_runs(mlp)
    several = activation_patching(model, Site("1"), Target("y", [1, 0]), split=every)(td.copy())["patching", "effect"]
    single = activation_patching(model, Site("1"), TARGET, split=every)(td.copy())["patching", "effect"]
    assert several.shape == (3, 5, 2)
    torch.testing.assert_close(several[..., 1], single)
    for direction in ("denoise", "noise"):
        patching = [
            activation_patching(model, Site("1"), target, split=every, direction=direction)(td.copy())
            for target in (Target("y", "argmax"), Target("y", [0, 1]))
        ]
        chosen = model(clean.copy())["y"].argmax(-1)
        largest, both = (out["patching", "effect"] for out in patching)
        torch.testing.assert_close(largest, both[torch.arange(3), :, chosen])


def test_a_target_by_an_entry():
    model, _, _, td = two_runs(mlp)
    td["action"] = torch.tensor([0, 1, 1])
    patching = activation_patching(model, Site("1"), Target("y", by="action"), split=every)
    assert patching.in_keys == [("clean", "x"), ("corrupt", "x"), "action"]
    both = activation_patching(model, Site("1"), Target("y", [0, 1]), split=every)(td.copy())["patching", "effect"]
    torch.testing.assert_close(patching(td)["patching", "effect"], both[torch.arange(3), :, td["action"]])


def test_without_a_target():
    model, _, _, td = two_runs(pipeline)
    patching = activation_patching(model, "hidden")
    assert patching.out_keys == [("sweep", *([k] if isinstance(k, str) else k)) for k in model.out_keys]
    assert patching(td)["sweep", "more", "y"].shape[:2] == (3, 1)


def test_causal_trace():
    model, td = language(3)
    std = model.module.wte.weight.std().item()
    td["noise"] = 3 * std * torch.randn(3, 5, 8).double()
    td["noise"][:, 2:] = 0.0
    target = Target("logits", (-1, 3))
    sites = [Site("wte"), Site("blocks.0"), Site("blocks.2")]
    out = causal_trace(model, sites, target, at=Site("wte"))(td.copy())["patching", "effect"].unflatten(-1, (3, 5))
    y = model(td.copy())["logits"][:, -1, 3]
    with capture(model, "wte", "blocks.0", "blocks.2", clone=True) as m:
        clean = m(td.copy())["activation"]

    def restored(site, position):
        def edit(value, td):
            value = value.clone()
            value[:, position] = clean[site][:, position]
            return value

        noisy = lambda value, _: value + td["noise"]  # noqa: E731
        if site == "wte":
            return {Site("wte"): lambda value, _: edit(noisy(value, _), _)}
        return {Site("wte"): noisy, Site(site): edit}

    with patch(model, {Site("wte"): lambda value, _: value + td["noise"]}) as m:
        base = m(td.copy())["logits"][:, -1, 3]
    for i, site in enumerate(["wte", "blocks.0", "blocks.2"]):
        for position in range(5):
            with patch(model, restored(site, position)) as m:
                new = m(td.copy())["logits"][:, -1, 3]
            torch.testing.assert_close(out[:, i, position], ((new - base) / (y - base)).detach(), atol=1e-8, rtol=1e-6)


def test_causal_trace_of_an_entry_and_some_positions():
    net = TensorDictModule(Language().double(), ["tokens"], ["logits"])
    td = TensorDict(tokens=torch.randint(0, 11, (2, 4)), shift=torch.randn(2, 4, 8).double(), batch_size=[2])
    trace = causal_trace(
        net, Site("blocks.*"), Target("logits", (-1, 0)), at=Site("wte"), noise="shift", positions=[-1]
    )
    assert trace.in_keys == ["tokens", "shift"]
    assert trace(td)["patching", "effect"].shape == (2, 3)


def test_it_leaves_everything_as_it_was():
    model, clean, _, td = two_runs(mlp)
    before = model(clean.copy())["y"]
    patching = activation_patching(model, [Site("0"), Site("2")], TARGET)
    out = patching(td)["patching", "effect"]
    torch.testing.assert_close(model(clean.copy())["y"], before)
    assert (td["clean"] == clean).all()
    assert set(td.keys()) == {"clean", "corrupt", "sweep", "patching"}
    for other in (copy.deepcopy(patching), pickle.loads(pickle.dumps(patching))):
        torch.testing.assert_close(other(td.select("clean", "corrupt"))["patching", "effect"], out)


def test_errors():
    model, _, _, td = two_runs(mlp)
    with pytest.raises(BadValue, match="direction"):
        activation_patching(model, Site("0"), TARGET, direction="up")
    with pytest.raises(BadType, match="not a way to split"):
        activation_patching(model, Site("0"), TARGET, split="every")
    with pytest.raises(BadType, match="not a Target"):
        activation_patching(model, Site("0"), "y")
    with pytest.raises(BadKey, match="target"):
        activation_patching(model, Site("0"), Target(Site("0"), 0))
    with pytest.raises(BadKey, match="no module"):
        activation_patching(model, Site("nine"), TARGET)
    with pytest.raises(BadKey, match="corrupt"):
        activation_patching(model, Site("0"), TARGET)(td.select("clean"))
    with pytest.raises(BadKey, match="noise"):
        causal_trace(model, Site("0"), TARGET, at="x")(td["clean"])


def test_called():
    assert called(Site("0"), 0, 1) == Site("0")
    assert called(Site("0"), 1, 2) == Site("0", call=1)
    assert called(Site("0", call="all"), 0, 1) == Site("0")
    assert called(Site("0", call=3), 0, 1) == Site("0", call=3)
    assert called("x", 0, 1) == "x"
