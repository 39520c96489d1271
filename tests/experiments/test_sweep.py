"""Sweeps: every experiment as if it were run alone, whichever plan runs them."""

import copy
import pickle

import pytest
import torch
from experiments.models import CASES, data, mlp, pipeline, residual
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments import Sweep, each, every, grid
from tdconcepts.hooks import Ablate, Replace, Scale, Site, capture, patch


def by_hand(model, td, edits, keys):
    """One patched forward for each experiment, side by side."""
    found = []
    for edit in edits:
        with patch(model, edit) as m:
            found.append(m(td.copy()))
    return [torch.stack([one[key] for one in found], td.batch_dims).detach() for key in keys]


def unit(i):
    return lambda value, td: torch.cat([value[..., :i], 0 * value[..., i : i + 1], value[..., i + 1 :]], -1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_single_forwards(name, rows):
    make, experiments = CASES[name]
    model, td = make(rows)
    sweep = Sweep(model, experiments)
    first = sweep(td.copy())
    again = sweep(td.copy())
    n = len(sweep.names(td))
    sequential = Sweep(model, experiments)
    sequential._candidates = lambda *args: []
    expected = sequential(td.copy())
    assert sequential.plan(td).name == "sequential"
    for key in sweep.out_keys:
        assert first[key].shape[:2] == (rows, n)
        torch.testing.assert_close(first[key], expected[key], atol=1e-10, rtol=0)
        torch.testing.assert_close(again[key], expected[key], atol=1e-10, rtol=0)


PLANS = {
    "mlp: units of all layers": "resume",
    "pipeline: entries and sites": "resume",
    "cnn: channels": "resume",
    "residual: between blocks": "grow",
    "residual: inside blocks": "batch",
    "residual: a layer that runs twice": "grow",
    "language: blocks and positions": "grow",
    "rows that see each other": "vmap",
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name):
    make, experiments = CASES[name]
    model, td = make(2)
    plan = Sweep(model, experiments).plan(td)
    assert plan.name == PLANS[name]
    assert plan.name in str(plan)
    if plan.name in ("resume", "grow"):
        assert plan.ideal >= 0.999


def test_units_by_hand():
    model, td = mlp(3)
    out = Sweep(model, every(Site("1"), Ablate()))(td.copy())
    (expected,) = by_hand(model, td, [{Site("1"): unit(i)} for i in range(5)], ["y"])
    torch.testing.assert_close(out["sweep", "y"], expected)
    assert not torch.allclose(out["sweep", "y"][:, 0], out["sweep", "y"][:, 1])


def test_entries_by_hand():
    model, td = pipeline(3)
    out = Sweep(model, every("concepts", Scale(-1.0)))(td.copy())
    flip = [{"concepts": lambda v, td, i=i: v - 2 * (v - unit(i)(v, td))} for i in range(3)]
    for key, expected in zip(["y", ("more", "y")], by_hand(model, td, flip, ["y", ("more", "y")]), strict=True):
        torch.testing.assert_close(out[("sweep", *([key] if isinstance(key, str) else key))], expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_policy_of_torchrl(rows):
    modules = pytest.importorskip("torchrl.modules")
    net = modules.MLP(in_features=4, out_features=2, num_cells=[6, 5], activation_class=nn.Tanh)
    policy = modules.ProbabilisticActor(
        TensorDictSequential(TensorDictModule(net, ["observation"], ["logits"])),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        default_interaction_type="deterministic",
    )
    td = TensorDict(observation=torch.randn(rows, 4), batch_size=[rows])
    experiments = every([Site("0.0.1"), Site("0.0.3")], Ablate()) + every("observation", Ablate())
    sweep = Sweep(policy, experiments, outputs=["logits", "action"])
    out = sweep(td.copy())
    edits = [{Site("0.0.1"): unit(i)} for i in range(6)] + [{Site("0.0.3"): unit(i)} for i in range(5)]
    edits += [{"observation": unit(i)} for i in range(4)]
    logits, action = by_hand(policy, td, edits, ["logits", "action"])
    torch.testing.assert_close(out["sweep", "logits"], logits, atol=1e-6, rtol=0)
    assert torch.equal(out["sweep", "action"], action)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_language_model_of_transformers(rows):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=20, n_positions=12)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens):
            return self.net(tokens).logits

    net = TensorDictModule(Logits().eval(), ["input_ids"], ["logits"])
    td = TensorDict(input_ids=torch.randint(0, 20, (rows, 5)), batch_size=[rows])
    sweep = Sweep(net, grid(Site("net.transformer.h.*"), None, Ablate()))
    edits = [
        {Site(f"net.transformer.h.{layer}"): lambda v, td, p=p: v * (torch.arange(5) != p)[:, None]}
        for layer in range(3)
        for p in range(5)
    ]
    (expected,) = by_hand(net, td, edits, ["logits"])
    torch.testing.assert_close(sweep(td.copy())["sweep", "logits"], expected, atol=1e-6, rtol=0)
    assert sweep.plan(td).name == "grow"
    assert sweep.plan(td).ideal > 0.99


def test_a_value_of_each_row():
    model, td = mlp(4)
    td["donor"] = torch.randn(4, 5).double()
    sweep = Sweep(model, every(Site("1"), Replace("donor")))
    assert sweep.in_keys == ["x", "donor"]
    edits = [
        {Site("1"): lambda v, td, i=i: v + (td["donor"] - v) * nn.functional.one_hot(torch.tensor(i), 5)}
        for i in range(5)
    ]
    torch.testing.assert_close(sweep(td.copy())["sweep", "y"], by_hand(model, td, edits, ["y"])[0])


def test_an_edit_that_reads_what_the_model_writes():
    model, td = pipeline(3)

    class Reading:
        in_keys = ("hidden",)

        def __call__(self, value, td):
            return value + td["hidden"].sum(-1, keepdim=True)

    sweep = Sweep(model, every("concepts", Reading()))
    assert sweep.in_keys == ["x"]
    assert sweep.plan(td).name == "sequential"
    assert sweep(td)["sweep", "concepts"].shape == (3, 3, 3)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", ["mlp: pairs and singles", "residual: between blocks", "rows that see each other"])
def test_chunks(name, chunk_size):
    make, experiments = CASES[name]
    model, td = make(3)
    whole, pieces = Sweep(model, experiments), Sweep(model, experiments, chunk_size=chunk_size)
    torch.testing.assert_close(pieces(td.copy())["sweep", "y"], whole(td.copy())["sweep", "y"])
    if chunk_size == 3:
        assert pieces.plan(td).chunks == len(pieces.names(td))


@pytest.mark.parametrize("batch", [(), (2, 3), (1, 1, 2)])
def test_batch_dims(batch):
    model, _ = mlp(1)
    td = TensorDict(x=torch.randn(*batch, 4).double(), batch_size=batch)
    sweep = Sweep(model, every([Site("1"), Site("2")], Ablate()))
    out = sweep(td.copy())["sweep", "y"]
    edits = [{Site("1"): unit(i)} for i in range(5)] + [{Site("2"): unit(i)} for i in range(6)]
    torch.testing.assert_close(out, by_hand(model, td, edits, ["y"])[0])


def test_empty_batch():
    model, td = mlp(2)
    assert Sweep(model, every(Site("1"), Ablate()))(td[:0])["sweep", "y"].shape == (0, 5, 2)


def test_only_the_wanted_entries():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 3), ["x"], ["h"]),
        TensorDictModule(nn.Tanh(), ["h"], ["y"]),
    )
    sweep = Sweep(model, every("h", Ablate()), outputs="y", out_key=("many", "of"))
    assert sweep.out_keys == [("many", "of", "y")]
    td = sweep(TensorDict(x=torch.randn(2, 4), batch_size=[2]))
    assert td["many", "of", "y"].shape == (2, 3, 3)
    assert "h" not in td


def test_batch_norm_in_training_mode():
    model = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), ["x"], ["y"])
    sweep = Sweep(model, every(Site("0"), Ablate()))
    td = TensorDict(x=torch.randn(5, 4), batch_size=[5])
    with pytest.raises(BadValue, match="training mode"):
        sweep(td)
    model.eval()
    assert sweep(td)["sweep", "y"].shape == (5, 3, 3)


def test_inside_other_contexts():
    model, td = mlp(3)
    sweep = Sweep(model, every(Site("1"), Ablate()))
    before = sweep(td.copy())["sweep", "y"]
    with patch(model, {Site("0"): Scale(0.5)}):
        inside = sweep(td.copy())["sweep", "y"]
        (expected,) = by_hand(model, td, [{Site("1"): unit(i)} for i in range(5)], ["y"])
    torch.testing.assert_close(inside, expected)
    assert not torch.allclose(before, inside)
    torch.testing.assert_close(sweep(td.copy())["sweep", "y"], before)
    with patch(model, {Site("2"): Scale(0.5)}) as m:
        torch.testing.assert_close(Sweep(m, every(Site("1"), Ablate()))(td.copy())["sweep", "y"].shape, (3, 5, 2))


def test_hooks_of_others_still_fire():
    model, td = mlp(3)
    sweep = Sweep(model, every(Site("1"), Ablate()))
    seen = []
    handle = model.register_forward_hook(lambda *args: seen.append(1))
    sweep(td.copy())
    assert seen
    handle.remove()


def test_the_model_is_as_it_was():
    model, td = residual(2)
    state = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    given = td.clone()
    out = Sweep(model, every(Site("join.*"), Ablate()))(td)
    assert out is td
    assert (td.exclude("sweep") == given).all()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not out["sweep", "y"].requires_grad


def test_copies():
    model, td = residual(2)
    sweep = Sweep(model, every(Site("join.*"), Ablate()))
    expected = sweep(td.copy())["sweep", "y"]
    for other in (copy.deepcopy(sweep), pickle.loads(pickle.dumps(sweep))):
        torch.testing.assert_close(other(td.copy())["sweep", "y"], expected)


def test_changed_weights_and_shapes_after_the_first_call():
    model, td = mlp(3)
    sweep = Sweep(model, every(Site("1"), Ablate()))
    before = sweep(td.copy())["sweep", "y"]
    with torch.no_grad():
        model.module[0].weight.mul_(2.0)
    assert not torch.allclose(sweep(td.copy())["sweep", "y"], before)
    assert sweep(data(x=(7, 4)))["sweep", "y"].shape == (7, 5, 2)


def test_in_a_pipeline_and_with_tensors():
    model, td = mlp(3)
    sweep = Sweep(model, every(Site("1"), Ablate()))
    spread = TensorDictModule(lambda y: y.std(1), [("sweep", "y")], ["spread"])
    assert TensorDictSequential(sweep, spread)(td.copy())["spread"].shape == (3, 2)
    torch.testing.assert_close(sweep(td["x"]), sweep(td.copy())["sweep", "y"])


def test_errors():
    model, td = mlp(3)
    with pytest.raises(BadType, match="bare"):
        Sweep(model.module, every(Site("1"), Ablate()))
    with pytest.raises(BadType, match="description"):
        Sweep(model, {Site("1"): Ablate()})
    with pytest.raises(BadKey, match="no module at path"):
        Sweep(model, every(Site("nine"), Ablate()))
    with pytest.raises(BadKey, match="no entry"):
        Sweep(model, every("hiden", Ablate()))
    with pytest.raises(BadKey, match="writes no entry 'z'"):
        Sweep(model, every(Site("1"), Ablate()), outputs="z")
    with pytest.raises(BadValue, match="do not exist"):
        Sweep(model, every(Site("1"), Ablate(), [9]))(td)
    with pytest.raises(BadValue, match="chunk size"):
        Sweep(model, every(Site("1"), Ablate()), chunk_size=0)
    with pytest.raises(BadKey, match="donor"):
        Sweep(model, every(Site("1"), Replace("donor")))(td)
    with pytest.raises(BadValue, match="fit the site"):
        Sweep(model, each(Site("1"), Replace(torch.zeros(7))))(td)
    with pytest.raises(BadKey, match="'x'"):
        Sweep(model, every(Site("1"), Ablate()))(TensorDict(batch_size=[2]))
    with pytest.raises(ZeroDivisionError):
        Sweep(model, each(Site("1"), [lambda v, td: 1 / 0, Ablate()]))(td)


def test_captures_outside():
    model, td = mlp(3)
    with capture(model, "1") as m:
        assert Sweep(m, every(Site("2"), Ablate()), outputs="y")(td)["sweep", "y"].shape == (3, 6, 2)


def test_sites_are_results_too_and_end_the_forward():
    model, td = residual(2)
    ran = []
    handle = model.module.join[2].register_forward_hook(lambda *_: ran.append(1))
    sweep = Sweep(model, every(Site("join.0"), Ablate()), outputs=[Site("join.1"), Site("blocks.1", "input")])
    out = sweep(td.copy())
    handle.remove()
    assert not ran
    assert sweep.out_keys == [("sweep", "join.1"), ("sweep", "blocks.1:in")]
    for i in range(6):
        with patch(model, {Site("join.0"): unit(i)}) as m, capture(m, "join.1", "blocks.1:in") as seen:
            found = seen(td.copy())["activation"]
        for name in ("join.1", "blocks.1:in"):
            torch.testing.assert_close(out["sweep", name][:, i], found[name])


def test_a_site_that_is_changed_is_seen_as_changed():
    model, td = mlp(3)
    out = Sweep(model, every(Site("1"), Ablate()), outputs=[Site("1"), "y"])(td.copy())
    assert out["sweep", "1"].diagonal(dim1=1, dim2=2).eq(0).all()
    assert out["sweep", "y"].shape == (3, 5, 2)
    late = Sweep(model, every([Site("0"), Site("3")], Ablate()), outputs=Site("1"))(td.copy())  # 3 comes after 1
    assert late["sweep", "1"][:, 5:].diff(dim=1).eq(0).all()


def test_a_torchrl_policy():
    torchrl = pytest.importorskip("torchrl.modules")
    from torchrl.data import Categorical

    net = torchrl.MLP(in_features=4, out_features=2, num_cells=[8, 8])
    actor = torchrl.ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]),
        in_keys=["logits"],
        spec=Categorical(2),
        distribution_class=torch.distributions.Categorical,
        default_interaction_type=torchrl.tensordict_module.actors.InteractionType.DETERMINISTIC,
    )
    td = TensorDict(observation=torch.randn(3, 2, 4), batch_size=[3, 2])
    sweep = Sweep(actor, every(Site("0.1"), Ablate()), outputs=["logits", "action"])
    out = sweep(td.copy())
    expected = by_hand(actor, td, [{Site("0.1"): unit(i)} for i in range(8)], ["logits", "action"])
    assert out["sweep", "logits"].shape == (3, 2, 8, 2)
    torch.testing.assert_close([out["sweep", "logits"], out["sweep", "action"]], expected)
    assert sweep.plan(td).name != "sequential"
