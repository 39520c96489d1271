"""Interventions as programs: at entries and sites, alone and in sums."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Ablate, Capture, Patch, Site, Target, anchor
from tdconcepts.interventions.influence import GradientPolicy
from tdconcepts.interventions.policies import UncertaintyPolicy
from tdconcepts.interventions.program import Intervention
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do, GroundTruth

ENTRIES = [("intervention", name) for name in ("value", "score", "mask", "before")]


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Sigmoid())
    return TensorDictSequential(Mod(body, ["x"], ["concepts"]), Mod(nn.Linear(4, 3), ["concepts"], ["logits"]))


def data(*batch):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (*batch, 4), generator=g)
    return TensorDict({"x": torch.randn(*batch, 6, generator=g), "labels": labels}, batch)


POLICIES = [UncertaintyPolicy(), GradientPolicy(Target("logits", 1))]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
def test_at_an_entry_and_at_the_site_that_writes_it_it_is_the_spliced_pipeline(policy, batch):
    model = network()
    spliced = intervene(model, policy=policy, strategy=GroundTruth("labels"), k=2)(data(*batch))
    for at in ("concepts", Site("0.3")):
        program = Intervention(GroundTruth("labels"), policy, at, k=2)
        hooked = program.on(model)
        found = hooked(data(*batch))
        for key in [*ENTRIES, "logits", "concepts"]:
            torch.testing.assert_close(found[key], spliced[key])
        assert set(hooked.out_keys) == {"concepts", "logits", *ENTRIES}
        assert set(hooked.in_keys) == {"x", "labels"}
    assert not any(m._forward_hooks for m in model.modules())


def test_intervene_takes_a_site():
    model = network()
    td = intervene(model, Site("0.0"), strategy=Do(0.0), k=3)(data(5))
    z = model[0].module[0](data(5)["x"])
    z[:, :3] = 0
    expected = model[1].module(model[0].module[1:](z))
    torch.testing.assert_close(td["logits"], expected)
    assert td["intervention", "mask"].shape == (5, 8)


def test_the_gradient_at_a_site():
    model = network()
    td = intervene(model, Site("0.1"), policy=GradientPolicy(Target("logits", 2)), strategy=Do(0.0), k=2)(data(5))
    z = model[0].module[:2](data(5)["x"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[1].module(model[0].module[2:](z))[:, 2].sum(), z)
    torch.testing.assert_close(td["intervention", "score"], gradient.abs())
    mask = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, gradient.abs().topk(2, -1).indices, True)
    assert torch.equal(td["intervention", "mask"], mask)


def test_sums_act_in_order_and_take_captures_and_patches():
    model = network()
    first = Intervention(Do(1.0), at="concepts", among=[0, 1], out_key="first")
    second = Intervention(Do(0.0), at="concepts", among=[1, 2], out_key="second")
    program = first + second + Capture("0.1") + Patch({Site("0.1"): Ablate(units=[0])})
    with program.on(model) as fixed:
        td = fixed(data(5))
    assert td["concepts"][:, :3].tolist() == [[1.0, 0.0, 0.0]] * 5
    assert torch.equal(td["second", "before"][:, 0], torch.ones(5))
    assert td["activation", "0.1"].shape == (5, 8)
    other = ((second + first).on(model))(data(5))
    assert other["concepts"][:, :3].tolist() == [[1.0, 1.0, 0.0]] * 5
    assert len(((first + second) + (second + first)).parts) == 4
    captured = (Capture("0.3") + Intervention(Do(1.0), at=Site("0.3"))).on(model)(data(5))
    assert (captured["activation", "0.3"] != 1).all()  # it came before
    captured = (Intervention(Do(1.0), at=Site("0.3")) + Capture("0.3")).on(model)(data(5))
    assert (captured["activation", "0.3"] == 1).all()


def test_an_entry_that_the_model_only_reads():
    model = network()
    program = Intervention(Do(0.0), GradientPolicy(Target("logits", 0)), "x", k=4)
    td = data(5)
    given = td["x"]
    out = program.on(model)(td)
    spliced = intervene(model, "x", policy=GradientPolicy(Target("logits", 0)), strategy=Do(0.0), k=4)(data(5))
    torch.testing.assert_close(out["logits"], spliced["logits"])
    assert torch.equal(out["intervention", "mask"], spliced["intervention", "mask"])
    assert out["x"] is given  # a hooked model leaves the caller's entries alone


def test_names_of_the_concepts_at_a_site():
    program = Intervention(Do(1.0), at=Site("0.3"), among=["c", "a"], concepts=["a", "b", "c", "d"])
    assert (program.on(network())(data(5))["concepts"] == 1).tolist() == [[True, False, True, False]] * 5


def test_rows_of_more_dims():
    torch.manual_seed(0)
    model = TensorDictSequential(Mod(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), ["x"], ["y"]))
    td = TensorDict({"x": torch.randn(5, 7, 6)}, [5])
    out = intervene(model, Site("0.0"), policy=UncertaintyPolicy(0.0), strategy=Do(9.0), k=1)(td)
    assert out["intervention", "mask"].sum(-1).eq(1).all()
    assert out["intervention", "mask"].shape == (5, 7, 4)


def test_inside_the_context_direct_calls_obey_and_afterwards_nothing_is_left():
    model = network()
    plain = model(data(5))["logits"]
    with Intervention(Do(0.0), at=Site("0.3")).on(model):
        assert torch.equal(model(data(5))["concepts"], torch.zeros(5, 4))
        assert torch.equal(model(x=data(5)["x"])[0], torch.zeros(5, 4))
        assert torch.equal(copy.deepcopy(model)(data(5))["logits"], plain)
    assert torch.equal(model(data(5))["logits"], plain)


def test_descriptions_print_pickle_and_hold_no_model():
    program = Intervention(Do(0.0), at=Site("0.3"), k=2)
    assert "at=Site('0.3'), k=2" in repr(program)
    assert repr(program + Capture("0.1")).endswith("Capture('0.1')")
    model = network()
    for other in (
        copy.deepcopy(program),
        pickle.loads(pickle.dumps(program)),
        pickle.loads(pickle.dumps(program.on(model))).program,
    ):
        assert torch.equal(other.on(model)(data(5))["logits"], program.on(model)(data(5))["logits"])


def test_it_compiles():
    torch._dynamo.reset()
    model = network()
    with (
        anchor(model, "0.3"),
        Intervention(GroundTruth("labels"), UncertaintyPolicy(), Site("0.3"), k=2).on(model) as m,
    ):
        expected = m(data(5))
        compiled = torch.compile(m, fullgraph=True, backend="eager")(data(5))
    for key in (*ENTRIES, "logits"):
        torch.testing.assert_close(compiled[key], expected[key])


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Intervention(Do(0.0), at=Site("0.9")).on(network()), BadKey, "0.9"),
        (lambda: Intervention(Do(0.0), at=Site("0.*")).on(network()), BadValue, "several places"),
        (lambda: Intervention(Do(0.0), at="concept").on(network()), BadKey, "did you mean 'concepts'"),
        (lambda: Intervention(Do(0.0)).on(nn.Linear(2, 2)), BadType, "bare Linear"),
        (lambda: Intervention(Do(0.0)) + 3, BadType, "3"),
        (lambda: Intervention(Do(0.0), out_key="x").on(network()), BadKey, "below"),
        (lambda: Intervention(Do(0.0), concepts=3).on(network()), BadType, "ConceptSpec"),
        (lambda: (Intervention(Do(0.0)) + Intervention(Do(1.0))).on(network()), BadKey, "two entries"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_bad_calls():
    model = network()
    hooked = Intervention(GroundTruth("labels"), at=Site("0.3")).on(model)
    td = data(5).exclude("labels")
    with pytest.raises(BadKey, match="'labels'"):
        Intervention(GroundTruth("labels"), at=Site("1")).on(model)(td)
    assert set(td.keys(True, True)) == {"x"}  # it is seen before the model runs
    with hooked, pytest.raises(BadKey, match="TensorDict"):
        model[0].module(data(5)["x"])
