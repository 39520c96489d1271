"""The pipeline: spliced into a model, which stays as it was."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictSequential,
    set_interaction_type,
)
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from tdconcepts.concepts.bottleneck import ConceptBottleneck
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Site, Target
from tdconcepts.interventions.influence import GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do, GroundTruth

ENTRIES = {("intervention", name) for name in ("score", "mask", "value", "before")}
NAMES = ["wing", "beak", "tail", "crest"]


def network():
    torch.manual_seed(0)
    return TensorDictSequential(
        Mod(nn.Linear(6, 4), ["x"], ["concepts_logits"]),
        Mod(nn.Sigmoid(), ["concepts_logits"], ["concepts"]),
        Mod(nn.Bilinear(4, 6, 3), ["concepts", "x"], ["logits"]),
    )


def data(*batch, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*batch, 6, generator=g, dtype=dtype)
    return TensorDict({"x": x, "labels": torch.randint(0, 2, (*batch, 4), generator=g), "other": x + 1}, batch)


@torch.no_grad()
def slow(model, td, k):
    """Uncertainty policy, ground truth, row by row and concept by concept."""
    concepts = model(td.copy())["concepts"].reshape(-1, 4).clone()
    labels = td["labels"].reshape(-1, 4)
    mask = torch.zeros(concepts.shape, dtype=torch.bool)
    for row, label, chosen in zip(concepts, labels, mask, strict=True):
        for i in sorted(range(4), key=lambda i: (abs(row[i].item() - 0.5), i))[:k]:
            row[i], chosen[i] = label[i].to(row.dtype), True
    shape = (*td.batch_size, 4)
    concepts = concepts.reshape(shape)
    return concepts, mask.reshape(shape), model[2].module(concepts, td["x"])


@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 2, 4])
def test_it_is_score_select_value_replace(batch, dtype, k):
    model = network().to(dtype)
    fixed = intervene(model, at="concepts", policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), k=k)
    td = data(*batch, dtype=dtype)
    given_entries = dict(td.items())
    before = model(td.copy())["concepts"]
    concepts, mask, logits = slow(model, td, k)
    assert fixed(td) is td
    assert torch.equal(td["concepts"], concepts)
    assert torch.equal(td["intervention", "mask"], mask)
    assert torch.equal(td["intervention", "before"], before)
    torch.testing.assert_close(td["logits"], logits)
    assert td["concepts"].dtype is dtype
    assert set(td.keys(True, True)) == set(given_entries) | set(fixed.out_keys)
    assert all(td[key] is entry for key, entry in given_entries.items())


def test_true_keys():
    fixed = intervene(network(), strategy=GroundTruth("labels"), k=1)
    assert fixed.in_keys == ["x", "labels"]
    assert set(fixed.out_keys) == {"concepts_logits", "concepts", "logits"} | ENTRIES
    pipeline = InterventionPipeline(UniformPolicy(), Do(0.0))
    assert pipeline.in_keys == ["concepts"]
    assert set(pipeline.out_keys) == {"concepts"} | ENTRIES
    assert list(pipeline.module) == ["value", "score", "select", "replace"]


@given(st.integers(1, 6), st.floats(0, 1), st.booleans())
def test_exactly_the_fraction_is_replaced_in_each_row(n, fraction, random):
    policy = RandomPolicy(torch.Generator().manual_seed(0)) if random else UniformPolicy()
    pipeline = InterventionPipeline(policy, Do(2.0), fraction=fraction)
    td = pipeline(TensorDict({"concepts": torch.rand(5, n)}, [5]))
    assert (td["concepts"] == 2).sum(-1).tolist() == [round(fraction * n)] * 5


def test_quantile_is_the_fraction():
    td = intervene(network(), strategy=Do(2.0), quantile=0.75)(data(5))
    assert td["intervention", "mask"].sum(-1).tolist() == [3] * 5


def test_all_is_the_default():
    assert intervene(network(), strategy=Do(2.0))(data(5))["intervention", "mask"].all()


def test_rows_are_independent():
    fixed = intervene(network(), policy=GradientPolicy(Target("logits", "argmax")), strategy=GroundTruth("labels"), k=2)
    whole, one = fixed(data(5)), fixed(data(5)[3])
    for key in fixed.out_keys:
        torch.testing.assert_close(whole[key][3], one[key])


def snapshot(model):
    return {
        "state": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()},
        "grads": [p.requires_grad for p in model.parameters()],
        "keys": (list(model.in_keys), list(model.out_keys)),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [set(vars(m)) for m in model.modules()],
    }


def test_the_model_is_untouched_and_shares_its_parameters():
    model = network()
    before = snapshot(model)
    fixed = intervene(model, policy=GradientPolicy(Target("logits", 0)), strategy=Do(0.0), k=1)
    fixed(data(3))
    after = snapshot(model)
    assert all(after[key] == before[key] for key in ("grads", "keys", "hooks", "attributes"))
    for name, (pointer, value) in before["state"].items():
        assert after["state"][name][0] == pointer
        assert torch.equal(after["state"][name][1], value)
    assert list(map(id, fixed.parameters())) == list(map(id, model.parameters()))
    assert [fixed[0], fixed[1], fixed[3]] == list(model.module)


def test_training_goes_through_what_is_left():
    """RandInt: the encoder learns from the concepts that were not corrected."""
    model = network()
    fixed = intervene(model, strategy=GroundTruth("labels"), among=[0, 1])
    fixed(data(5))["logits"].sum().backward()
    grad = model[0].module.weight.grad
    assert (grad[:2] == 0).all()
    assert (grad[2:] != 0).any()
    model.zero_grad()
    through = intervene(model, strategy=GroundTruth("labels"), among=[0, 1], straight_through=True)
    through(data(5))["logits"].sum().backward()
    assert (model[0].module.weight.grad[:2] != 0).any()


def test_a_nan_in_an_untouched_place_stays_out_of_result_and_gradient():
    """A blend by multiplication, ``c * keep + label * (1 - keep)``, would spread it: 0 * NaN is NaN."""
    model, td = network(), data(5)
    td["labels"] = td["labels"].float()
    td["labels"][:, 1] = math.nan
    fixed = intervene(model, strategy=GroundTruth("labels"), among=[0, 2])
    out = fixed(td)
    assert not out["concepts"].isnan().any()
    out["logits"].sum().backward()
    assert not any(p.grad.isnan().any() for p in model.parameters())
    value = intervene(model, strategy=lambda c, td: (c - c).log(), among=[0])(data(5))  # log 0 for all, written in one
    assert value["concepts"][:, 0].isinf().all()
    assert not value["concepts"][:, 1:].isinf().any()


def test_strategies_and_policies_of_ones_own():
    donor = Mod(nn.Identity(), ["donor"], [("intervention", "value")])
    scores = Mod(nn.Identity(), ["costs"], [("intervention", "score")])
    td = data(5)
    td["donor"], td["costs"] = torch.full((5, 4), 3.0), torch.tensor([0.0, 2.0, 1.0, 0.0]).expand(5, 4)
    fixed = intervene(network(), policy=scores, strategy=donor, k=2)
    assert fixed.in_keys == ["x", "donor", "costs"]
    assert (fixed(td)["concepts"] == 3).float().mean(0).tolist() == [0, 1, 1, 0]
    fixed = intervene(network(), policy=lambda c, td: td["costs"], strategy=lambda c, td: c * 0 + 3, k=2)
    assert (fixed(td)["concepts"] == 3).float().mean(0).tolist() == [0, 1, 1, 0]


def bottleneck(**keywords):
    torch.manual_seed(0)
    return ConceptBottleneck(nn.Linear(6, 4), nn.Linear(4, 3), ConceptSpec(NAMES), in_keys="x", **keywords)


def test_names_and_space_come_from_the_model():
    td = intervene(bottleneck(), strategy=Do(1.0), among=["tail", "wing"])(data(5))
    assert td["intervention", "mask"].float().mean(0).tolist() == [1, 0, 1, 0]
    logits = intervene(bottleneck(space="logits"), strategy=GroundTruth("labels"), k=4)(data(5))
    torch.testing.assert_close(logits["concepts"].sigmoid(), data(5)["labels"].float(), atol=2e-4, rtol=0)
    with pytest.raises(BadKey, match="did you mean 'tail'"):
        intervene(bottleneck(), strategy=Do(1.0), among=["tails"])
    with pytest.raises(BadValue, match="space='probs'"):
        intervene(bottleneck(), strategy=GroundTruth("labels", space="logits"))


@pytest.mark.parametrize("concepts", [NAMES, tuple(NAMES), ConceptSpec(NAMES)], ids=["list", "tuple", "spec"])
def test_names_can_be_given(concepts):
    td = intervene(network(), strategy=Do(1.0), among=["beak"], concepts=concepts)(data(5))
    assert td["intervention", "mask"].float().mean(0).tolist() == [0, 1, 0, 0]


def test_categorical_concepts_are_replaced_whole():
    spec = ConceptSpec(["wing", "colour"], [1, 3])
    td = data(5)
    td["states"] = torch.tensor([[1, 2]] * 5)
    fixed = intervene(network(), policy=RandomPolicy(), strategy=GroundTruth("states"), k=1, concepts=spec)(td)
    mask = fixed["intervention", "mask"]
    assert (mask.sum(-1) % 2 == 1).all()  # 1 or 3 columns
    assert (mask[:, 1] == mask[:, 2]).all()
    assert (mask[:, 1] == mask[:, 3]).all()
    assert fixed["concepts"][mask[:, 1]][:, 1:].tolist() == [[0, 0, 1]] * int(mask[:, 1].sum())


def test_the_stages_keep_their_names():
    fixed = intervene(bottleneck(), strategy=Do(1.0))
    assert list(fixed.module) == ["encoder", "activation", "intervention_2", "head"]
    assert set(bottleneck().state_dict()) == set(fixed.state_dict())


def test_interventions_nest_in_order():
    once = intervene(bottleneck(), strategy=Do(1.0), among=["wing", "beak"])
    twice = intervene(once, strategy=Do(0.0), among=["beak", "tail"], out_key="second")
    td = twice(data(5))
    assert td["concepts"][:, :3].tolist() == [[1.0, 0.0, 0.0]] * 5
    assert td["intervention", "mask"].float().mean(0).tolist() == [1, 1, 0, 0]
    assert td["second", "mask"].float().mean(0).tolist() == [0, 1, 1, 0]
    assert torch.equal(td["second", "before"][:, 1], torch.ones(5))
    again = intervene(once, strategy=Do(0.0), among=["beak", "tail"])(data(5))
    assert torch.equal(again["concepts"], td["concepts"])
    assert torch.equal(again["intervention", "mask"], td["second", "mask"])
    assert torch.equal(once(data(5))["concepts"][:, 1], torch.ones(5))


def test_an_entry_that_the_model_only_reads():
    fixed = intervene(network(), at="x", strategy=Do(0.0), among=[0, 1], out_key="masked")
    td = data(5)
    seen = td["x"].clone()
    seen[:, :2] = 0
    assert torch.equal(fixed(td)["logits"], network()(TensorDict({"x": seen}, [5]))["logits"])
    assert torch.equal(td["masked", "before"], data(5)["x"])


def test_nested_keys():
    model = TensorDictSequential(
        Mod(nn.Linear(6, 4), [("agents", "x")], [("agents", "c")]),
        Mod(nn.Linear(4, 2), [("agents", "c")], [("agents", "q")]),
    )
    fixed = intervene(
        model,
        ("agents", "c"),
        policy=GradientPolicy(Target(("agents", "q"), 0)),
        strategy=GroundTruth(("truth", "c")),
        k=1,
    )
    td = TensorDict({"agents": {"x": torch.randn(5, 6)}, "truth": {"c": torch.ones(5, 4)}}, [5])
    best = model[1].module.weight[0].abs().argmax()
    assert fixed(td)["intervention", "mask"].float().mean(0).argmax() == best
    assert (td["agents", "c"][:, best] == 1).all()


def test_dispatch_and_selected_keys():
    fixed = intervene(network(), policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), k=1)
    expected = fixed(data(5))
    fixed.select_out_keys("logits", ("intervention", "mask"))
    logits, mask = fixed(x=data(5)["x"], labels=data(5)["labels"])
    assert torch.equal(logits, expected["logits"])
    assert torch.equal(mask, expected["intervention", "mask"])


def test_a_model_with_selected_keys_can_be_intervened_on():
    model = network().select_out_keys("logits")
    fixed = intervene(model, strategy=Do(1.0), k=2)
    assert set(fixed.out_keys) == {"logits"} | ENTRIES
    td = fixed(data(5))
    assert set(td.keys()) == {"x", "labels", "other", "logits", "intervention"}
    assert torch.equal(td["logits"], intervene(network(), strategy=Do(1.0), k=2)(data(5))["logits"])
    assert model.out_keys == ["logits"]
    assert set(model(data(5)).keys()) == {"x", "labels", "other", "logits"}


def test_copies_pickles_and_state_dicts():
    """No closure over the original: a copy runs its own weights."""
    fixed = intervene(network(), policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), k=2)
    expected = fixed(data(5))["logits"]
    for other in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(other(data(5))["logits"], expected)
        with torch.no_grad():
            other[3].module.bias.add_(1)
        torch.testing.assert_close(other(data(5))["logits"], expected + 1)
    assert torch.equal(fixed(data(5))["logits"], expected)
    other = intervene(network(), policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), k=2)
    with torch.no_grad():
        other[0].module.weight.zero_()
    other.load_state_dict(fixed.state_dict())
    assert torch.equal(other(data(5))["logits"], expected)


@pytest.mark.parametrize("policy", [UniformPolicy(), UncertaintyPolicy(), RandomPolicy()])
def test_it_compiles_in_one_graph(policy):
    fixed = intervene(network(), policy=policy, strategy=GroundTruth("labels"), fraction=0.5)
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = fixed(data(5))
    torch.manual_seed(0)
    got = compiled(data(5))
    for key in ("concepts", "logits", ("intervention", "mask")):
        torch.testing.assert_close(got[key], expected[key])


def test_it_maps():
    model = bottleneck()
    fixed = intervene(model, policy=UncertaintyPolicy(), strategy=GroundTruth("labels"), fraction=0.5)
    td = data(5)
    expected = fixed(td.copy())["logits"]
    row = torch.vmap(lambda x, labels: fixed(TensorDict({"x": x, "labels": labels}))["logits"])
    torch.testing.assert_close(row(td["x"], td["labels"]), expected)
    ensemble = torch.stack([TensorDict.from_module(fixed).data] * 2).contiguous()

    def member(parameters):
        with parameters.to_module(fixed):
            return fixed(td.copy())["logits"]

    torch.testing.assert_close(torch.vmap(member)(ensemble), torch.stack([expected] * 2))


def test_bfloat16():
    model = network().to(torch.bfloat16)
    fixed = intervene(
        model, policy=GradientPolicy(Target("logits", 0)), strategy=GroundTruth("labels", space="logits"), k=2
    )
    td = fixed(data(5, dtype=torch.bfloat16))
    assert td["concepts"].dtype is torch.bfloat16
    assert td["intervention", "mask"].sum(-1).tolist() == [2] * 5
    assert td["concepts"].isfinite().all()


def actor():
    tail = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
    return ProbabilisticTensorDictSequential(network(), tail)


def test_a_policy_stays_a_policy():
    policy = actor()
    fixed = intervene(policy, strategy=Do(0.0), k=2)
    assert isinstance(fixed, ProbabilisticTensorDictSequential)
    logits = intervene(network(), strategy=Do(0.0), k=2)(data(5))["logits"]
    torch.testing.assert_close(fixed.get_dist(data(5)).logits, torch.distributions.Categorical(logits=logits).logits)
    with set_interaction_type("deterministic"):
        td = fixed(data(5))
    assert torch.equal(td["action"], logits.argmax(-1))
    torch.testing.assert_close(
        fixed.log_prob(td), torch.distributions.Categorical(logits=logits).log_prob(td["action"])
    )
    assert policy.get_dist(data(5)).logits.shape == (5, 3)
    observed = intervene(policy, at="x", strategy=Do(0.0))
    with set_interaction_type("deterministic"):
        assert observed(data(5))["action"].unique().numel() == 1
    assert observed.get_dist(data(5)).logits.unique(dim=0).shape == (1, 3)


def test_a_torchrl_actor_acts_in_an_environment():
    pytest.importorskip("torchrl")
    pytest.importorskip("gymnasium")
    from torchrl.envs import GymEnv
    from torchrl.modules import OneHotCategorical, ProbabilisticActor

    torch.manual_seed(0)
    net = TensorDictSequential(
        Mod(nn.Linear(4, 8), ["observation"], ["concept"]), Mod(nn.Linear(8, 2), ["concept"], ["logits"])
    )
    policy = ProbabilisticActor(net, in_keys=["logits"], distribution_class=OneHotCategorical)
    fixed = intervene(policy, at="concept", policy=GradientPolicy(Target("logits", "argmax")), strategy=Do(0.0), k=3)
    assert fixed.get_dist(TensorDict({"observation": torch.zeros(2, 4)}, [2])).logits.shape == (2, 2)
    env = GymEnv("CartPole-v1")
    env.set_seed(0)
    rollout = env.rollout(20, fixed)
    assert (rollout["concept"] == 0).sum(-1).tolist() == [3] * len(rollout)
    assert rollout["intervention", "mask"].shape == (len(rollout), 8)


@pytest.mark.parametrize("how", ["spliced", "sequential", "randint", "at a site"])
def test_an_actor_with_an_intervention_in_a_rollout_and_a_collector(how):
    pytest.importorskip("gymnasium")
    collectors = pytest.importorskip("torchrl.collectors")
    rl = pytest.importorskip("tdconcepts.rl")
    actor = rl.cartpole_policy()
    options = {
        "spliced": {"policy": UncertaintyPolicy(0.0), "k": 3},
        "sequential": {"policy": GradientPolicy(Target("logits", "argmax")), "k": 3, "sequential": True},
        "randint": {"probability": 0.5},
        "at a site": {"policy": UncertaintyPolicy(0.0), "k": 3},
    }
    at = Site("0.0") if how == "at a site" else "concept"
    fixed = intervene(actor, at, strategy=Do(0.0), **options[how])
    env = rl.cartpole_env(2, seed=0)
    rollout = env.rollout(6, fixed, break_when_any_done=False)
    sizes = {"frames_per_batch": 12, "total_frames": 12, "auto_register_policy_transforms": False}
    collector = collectors.Collector(env, fixed, **sizes)
    collected = next(iter(collector))
    collector.shutdown()
    for td in (rollout, collected):
        mask = td["intervention", "mask"]
        assert mask.shape[:2] == (2, 6)
        assert mask.any()
        assert how == "randint" or mask.sum(-1).eq(3).all()
        if how != "at a site":
            assert torch.equal(td["concept"], torch.where(mask, 0.0, td["intervention", "before"]))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: intervene(nn.Linear(2, 2), strategy=Do(0.0)), BadType, "bare Linear"),
        (lambda: intervene(network(), at="concept", strategy=Do(0.0)), BadKey, "did you mean 'concepts'"),
        (lambda: intervene(network(), at="labels", strategy=Do(0.0)), BadKey, "'labels'"),
        (lambda: intervene(network(), at=0, strategy=Do(0.0)), BadKey, "not a TensorDict key"),
        (lambda: intervene(network(), strategy=Do(0.0), fraction=1.5), BadValue, "1.5"),
        (lambda: intervene(network(), strategy=Do(0.0), quantile=-1), BadValue, "-1"),
        (lambda: intervene(network(), strategy=Do(0.0), fraction=0.5, quantile=0.5), BadValue, "twice"),
        (lambda: intervene(network(), strategy=Do(0.0), fraction=0.5, k=1), BadValue, "twice"),
        (lambda: intervene(network(), strategy=Do(0.0), among=["wing"]), BadKey, "ConceptSpec"),
        (lambda: intervene(network(), strategy=Do(0.0), concepts=4), BadType, "4"),
        (lambda: intervene(network(), strategy=Do), BadType, r"Do\(...\)"),
        (lambda: intervene(network(), policy=UniformPolicy, strategy=Do(0.0)), BadType, r"UniformPolicy\(...\)"),
        (lambda: intervene(network(), strategy=nn.Linear(4, 4)), BadType, "TensorDictModule"),
        (lambda: intervene(network(), strategy=0.0), BadType, "float"),
        (lambda: intervene(network(), policy=Do(0.0), strategy=Do(0.0)), BadKey, "'score'"),
        (lambda: intervene(network(), strategy=Mod(nn.Tanh(), ["x"], ["v"])), BadKey, "'value'"),
        (
            lambda: intervene(Mod(nn.Linear(6, 4), ["x"], ["c", "concepts"]), strategy=Do(0.0)),
            BadValue,
            "change nothing",
        ),
        (lambda: intervene(network(), at="logits", strategy=GroundTruth("labels", "onehots")), BadValue, "onehots"),
        (lambda: intervene(network(), at="concepts_logits", strategy=Do(0.0), out_key="x"), BadKey, "below"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_a_sequential_that_cannot_be_taken_apart_is_refused_and_not_changed_in_vain():
    inner = network()
    inner.partial_tolerant = True
    with pytest.raises(BadValue, match="change nothing"):
        intervene(TensorDictSequential(inner), strategy=Do(0.0))


def test_an_encoder_alone_may_be_changed():
    encoder = TensorDictSequential(Mod(nn.Linear(6, 4), ["x"], ["concepts"]))
    assert (intervene(encoder, strategy=Do(0.5), k=4)(data(5))["concepts"] == 0.5).all()


@pytest.mark.parametrize(
    ("td", "error", "text"),
    [
        (data(5).exclude("labels"), BadKey, "labels are missing"),
        (data(5).set("labels", torch.zeros(5, 3)), BadValue, r"\[5, 3\]"),
        (data(5).set("labels", torch.full((5, 4), 7)), BadValue, "7 to 7"),
    ],
)
def test_bad_calls_leave_the_callers_entries_alone(td, error, text):
    fixed = intervene(network(), strategy=GroundTruth("labels"), k=2)
    before = td.clone()
    with pytest.raises(error, match=text):
        fixed(td)
    assert all(torch.equal(td[key], value) for key, value in before.items())


def test_a_locked_tensordict_is_refused():
    td = network()(data(5)).lock_()
    with pytest.raises(BadValue, match=r"td.copy\(\)"):
        InterventionPipeline(UniformPolicy(), Do(0.0))(td)
    assert set(td.keys()) == {"x", "labels", "other", *network().out_keys}


def test_batch_dims_that_do_not_match():
    fixed = intervene(network(), strategy=GroundTruth("labels"), k=2)
    with pytest.raises(BadValue, match=r"\[3, 4\]"):
        fixed(x=torch.randn(5, 6), labels=torch.zeros(3, 4))


@pytest.mark.parametrize("at", ["concepts", Site("0.0")])
def test_as_a_context(at):
    model = TensorDictSequential(
        Mod(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), ["x"], ["concepts"]),
        Mod(nn.Linear(2, 2), ["concepts"], ["logits"]),
    )
    td = TensorDict(x=torch.randn(4, 3), batch_size=[4])
    fixed = intervene(model, at, strategy=Do(0.0), k=1)
    with fixed as inside:
        assert inside is fixed
        out = inside(td.copy())
    torch.testing.assert_close(out["logits"], fixed(td.copy())["logits"])
    assert not torch.equal(out["logits"], model(td.copy())["logits"])


@pytest.mark.parametrize("composite", [True, False])
def test_a_policy_returns_its_distribution_as_before(composite):
    model = ProbabilisticTensorDictSequential(
        Mod(nn.Linear(2, 3), ["x"], ["concepts"]),
        Mod(nn.Linear(3, 2), ["concepts"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
        return_composite=composite,
    )
    assert intervene(model, strategy=Do(1.0)).return_composite is composite


def test_what_it_reads_is_no_group_to_write():
    model = TensorDictSequential(Mod(nn.Linear(3, 2), ["x"], ["concepts"]), Mod(nn.Linear(2, 1), ["concepts"], ["y"]))
    with pytest.raises(BadKey, match=r"(?s)can't have one name.*labels"):
        intervene(model, strategy=GroundTruth("labels"), out_key="labels")
    with pytest.raises(BadKey, match=r"(?s)can't have one name.*labels"):
        intervene(model, at=Site("0"), strategy=GroundTruth("labels"), out_key="labels")
