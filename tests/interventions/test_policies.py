"""Policies: high score = replaced first."""

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.targets import Target
from tdconcepts.interventions.pipeline import InterventionPipeline, intervene
from tdconcepts.interventions.policies import GradientPolicy, RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.stages import Splice
from tdconcepts.interventions.strategies import Do

GROUPED = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))


def score(policy, concepts, **entries):
    td = TensorDict({"concepts": concepts, **entries}, concepts.shape[:-1])
    assert policy(td) is td
    return td["intervention", "score"]


def replaced(policy, concepts, k, **entries):
    """The indices that a pipeline with this policy replaces in the only row."""
    td = TensorDict({"concepts": concepts, **entries})
    InterventionPipeline(policy, Do(7.0), k=k)(td)
    return td["intervention", "mask"].nonzero().flatten().tolist()


@pytest.mark.parametrize("policy", [UniformPolicy(), RandomPolicy(), UncertaintyPolicy()])
@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_batch_and_dtype(policy, batch, dtype):
    concepts = torch.rand(*batch, 5, dtype=dtype)
    before = concepts.clone()
    assert score(policy, concepts).shape == (*batch, 5)
    assert torch.equal(concepts, before)


@pytest.mark.parametrize("policy", [UniformPolicy(), RandomPolicy(), UncertaintyPolicy(0.25), GradientPolicy()])
def test_policies_have_no_state_and_can_be_copied(policy):
    assert not policy.state_dict()
    concepts = torch.rand(3, 5)
    entries = {"gradient": {"concepts": torch.randn(3, 5)}}
    torch.manual_seed(1)
    expected = score(policy, concepts, **entries)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        torch.manual_seed(1)
        assert torch.equal(score(other, concepts, **entries), expected)


def test_uniform_replaces_by_index_and_exactly_k():
    """All scores tie, and still k are replaced, not all."""
    assert [replaced(UniformPolicy(), torch.rand(4), k) for k in range(5)] == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_uncertainty_replaces_the_least_certain():
    concepts = torch.tensor([0.99, 0.45, 0.02, 0.6])
    assert score(UncertaintyPolicy(), concepts).tolist() == pytest.approx([-0.49, -0.05, -0.48, -0.1])
    assert replaced(UncertaintyPolicy(), concepts, 2) == [1, 3]
    assert replaced(UncertaintyPolicy(center=1.0), concepts, 1) == [0]


def test_uncertainty_in_space_logits_has_its_center_at_zero():
    concepts = torch.tensor([0.5, -0.1, 3.0])
    assert replaced(UncertaintyPolicy(), concepts, 1) == [0]
    bound = UncertaintyPolicy().bind(Splice(space="logits"))
    assert replaced(bound, concepts, 1) == [0]  # the pipeline binds it again, to an entry of unknown space
    assert score(bound, concepts).tolist() == pytest.approx([-0.5, -0.1, -3.0])
    assert replaced(UncertaintyPolicy(0.0), concepts, 1) == [1]
    assert score(UncertaintyPolicy(0.5).bind(Splice(space="logits")), concepts).tolist() == pytest.approx(
        [0.0, -0.6, -2.5]
    )


def test_a_nan_prediction_is_replaced_last():
    assert replaced(UncertaintyPolicy(), torch.tensor([math.nan, 0.99, 0.98]), 2) == [1, 2]


def test_uncertainty_of_categorical_concepts_is_refused():
    with pytest.raises(BadValue, match="entropy"):
        UncertaintyPolicy().bind(GROUPED)


def test_random_is_reproducible_by_its_generator_and_leaves_the_global_one_alone():
    state, concepts = torch.get_rng_state(), torch.zeros(3, 4)
    first, second = (score(RandomPolicy(torch.Generator().manual_seed(5)), concepts) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, score(RandomPolicy(torch.Generator().manual_seed(6)), concepts))
    policy = RandomPolicy(torch.Generator().manual_seed(5))
    assert not torch.equal(score(policy, concepts), score(policy, concepts))


def test_random_draws_where_its_generator_is():
    assert score(RandomPolicy(torch.Generator()), torch.zeros(3, 4, device="meta")).device.type == "meta"


def test_random_chooses_each_concept_as_often():
    """4000 rows, k=1 of 4: 3 standard errors are .021."""
    td = TensorDict({"concepts": torch.zeros(4000, 4)}, [4000])
    InterventionPipeline(RandomPolicy(torch.Generator().manual_seed(0)), Do(1.0), k=1)(td)
    assert (td["concepts"].mean(0) - 0.25).abs().max() < 0.021


def test_random_draws_once_for_each_categorical_concept():
    """One draw for each column would favour concepts with many states: the largest of three draws wins more often."""
    policy = RandomPolicy(torch.Generator().manual_seed(0)).bind(GROUPED)
    drawn = score(policy, torch.zeros(4000, 5))
    assert torch.equal(drawn[:, 1], drawn[:, 2])
    assert torch.equal(drawn[:, 1], drawn[:, 3])
    td = TensorDict({"concepts": torch.zeros(4000, 5)}, [4000])
    InterventionPipeline(RandomPolicy(torch.Generator().manual_seed(0)), Do(1.0), GROUPED, k=1)(td)
    assert (td["concepts"].mean(0) - 1 / 3).abs().max() < 0.023


def model(sample=False):
    """concepts -> logits, bilinear in the concepts and a second input, so that each row has gradients of its own."""
    torch.manual_seed(0)
    parts = [
        Mod(nn.Linear(6, 4), ["x"], ["concepts_logits"]),
        Mod(nn.Sigmoid(), ["concepts_logits"], ["concepts"]),
        Mod(nn.Bilinear(4, 6, 3), ["concepts", "x"], ["logits"]),
    ]
    if not sample:
        return TensorDictSequential(*parts)
    tail = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
    return ProbabilisticTensorDictSequential(*parts, tail)


@pytest.mark.parametrize("batch", [[], [5], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_influence_on_the_target_at_the_predictions(batch, dtype):
    """Bilinear: d logits[i] / d concepts = W[i] x, by hand."""
    net = model().to(dtype)
    fixed = intervene(net, policy=GradientPolicy(Target("logits", 2)), strategy=Do(0.0), k=1)
    x = torch.randn(*batch, 6, dtype=dtype)
    td = fixed(TensorDict({"x": x}, batch))
    expected = torch.einsum("cd,...d->...c", net[2].module.weight[2], x).abs()
    torch.testing.assert_close(td["intervention", "score"], expected)
    assert not td["intervention", "score"].requires_grad
    if x.numel():
        chosen = td["intervention", "mask"].float().argmax(-1)
        assert torch.equal(chosen, expected.argmax(-1))  # the most influential is replaced


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_works_in_any_gradient_mode(mode):
    net, x = model(), torch.randn(5, 6)
    fixed = intervene(net, policy=GradientPolicy(Target("logits", "argmax")), strategy=Do(0.0), k=1)
    best = net(x=x)[-1].argmax(-1)
    expected = torch.einsum("bcd,bd->bc", net[2].module.weight[best], x).abs()
    with mode():
        td = fixed(TensorDict({"x": x}, [5]))
    torch.testing.assert_close(td["intervention", "score"], expected)
    assert all(p.grad is None for p in net.parameters())


def test_gradient_of_the_logged_action():
    net, x, action = model(), torch.randn(5, 6), torch.tensor([0, 1, 2, 1, 0])
    fixed = intervene(net, policy=GradientPolicy(Target("logits", by="action")), strategy=Do(0.0), k=1)
    assert "action" in fixed.in_keys
    td = fixed(TensorDict({"x": x, "action": action}, [5]))
    torch.testing.assert_close(
        td["intervention", "score"], torch.einsum("bcd,bd->bc", net[2].module.weight[action], x).abs()
    )


def test_gradient_of_tensors_without_a_batch_size():
    """Dispatch can't know how many dims are the batch: the concepts tell it."""
    net, x, action = model(), torch.randn(5, 6), torch.tensor([0, 1, 2, 1, 0])
    for target, entries in ((Target("logits", "argmax"), {}), (Target("logits", by="action"), {"action": action})):
        fixed = intervene(net, policy=GradientPolicy(target), strategy=Do(0.0), k=1)
        expected = fixed(TensorDict({"x": x, **entries}, [5]))
        answers = dict(zip(fixed.out_keys, fixed(x=x, **entries), strict=True))
        torch.testing.assert_close(answers["intervention", "score"], expected["intervention", "score"])


def test_gradient_samples_no_action():
    fixed = intervene(model(sample=True), policy=GradientPolicy(Target("logits", 0)), strategy=Do(0.0), k=0)
    x = torch.randn(5, 6)
    torch.manual_seed(3)
    action = fixed(TensorDict({"x": x}, [5]))["action"]
    torch.manual_seed(3)
    assert torch.equal(action, model_action(x))


def model_action(x):
    state = torch.get_rng_state()
    net = model(sample=True)
    torch.set_rng_state(state)
    return net(TensorDict({"x": x}, [len(x)]))["action"]


def test_gradient_is_not_changed_by_frozen_parameters_and_owns_none():
    net, x = model(), torch.randn(5, 6)
    fixed = intervene(net, policy=GradientPolicy(Target("logits", 1)), strategy=Do(0.0), k=1)
    assert len(fixed.state_dict()) == len(net.state_dict())
    free = fixed(TensorDict({"x": x}, [5]))["intervention", "score"]
    net.requires_grad_(False)
    assert torch.equal(fixed(TensorDict({"x": x}, [5]))["intervention", "score"], free)


def test_copies_of_a_gradient_policy_follow_the_copied_weights():
    """A copy does not go on running the original's head."""
    fixed = intervene(model(), policy=GradientPolicy(Target("logits", 1)), strategy=Do(0.0), k=1)
    x = torch.randn(5, 6)
    expected = fixed(TensorDict({"x": x}, [5]))["intervention", "score"].clone()
    for other in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        torch.testing.assert_close(other(TensorDict({"x": x}, [5]))["intervention", "score"], 2 * expected)
    assert torch.equal(fixed(TensorDict({"x": x}, [5]))["intervention", "score"], expected)


def test_gradients_from_a_key():
    gradients = torch.tensor([0.1, 5.0, -10.0, 0.5])  # the largest, whatever their sign: 2 and 1
    entries = {"gradient": {"concepts": gradients}}
    assert score(GradientPolicy(), torch.zeros(4), **entries).tolist() == gradients.abs().tolist()
    assert replaced(GradientPolicy(), torch.zeros(4), 2, **entries) == [1, 2]
    assert replaced(GradientPolicy(key="g"), torch.zeros(4), 1, g=gradients) == [2]
    assert GradientPolicy().bind(Splice(("agents", "c"))).in_keys == [("agents", "c"), ("gradient", "agents", "c")]


def test_without_gradients_it_raises_or_says_so():
    with pytest.raises(BadKey, match=r"fallback=\"uniform\""):
        score(GradientPolicy(), torch.zeros(4))
    assert replaced(GradientPolicy(fallback="uniform"), torch.rand(4), 2) == [0, 1]
    assert replaced(
        GradientPolicy(fallback="uniform"), torch.rand(2), 1, gradient={"concepts": torch.tensor([0.0, 1.0])}
    ) == [1]


def test_gradient_compiles_in_one_graph():
    fixed = intervene(model(), policy=GradientPolicy(Target("logits", 1)), strategy=Do(0.0), k=1)
    x = torch.randn(5, 6)
    expected = fixed(TensorDict({"x": x}, [5]))
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")(TensorDict({"x": x}, [5]))
    torch.testing.assert_close(compiled["intervention", "score"], expected["intervention", "score"])
    torch.testing.assert_close(compiled["logits"], expected["logits"])


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: RandomPolicy(7), BadType, "manual_seed"),
        (lambda: UncertaintyPolicy("half"), BadType, "half"),
        (lambda: UncertaintyPolicy(True), BadType, "True"),
        (lambda: GradientPolicy("logits"), BadType, "Target"),
        (lambda: GradientPolicy(Target("logits", 0), key="g"), BadValue, "two sources"),
        (lambda: GradientPolicy(fallback="random"), BadValue, "random"),
        (lambda: intervene(model(), policy=GradientPolicy(Target("lgits", 0)), strategy=Do(0.0)), BadKey, "'logits'"),
        (
            lambda: intervene(model(), policy=GradientPolicy(Target(Site("2"), 0)), strategy=Do(0.0)),
            BadValue,
            "an entry",
        ),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_bad_calls():
    with pytest.raises(BadValue, match="intervene"):
        score(GradientPolicy(Target("logits", 0)), torch.zeros(4))
    with pytest.raises(BadValue, match=r"\[4\]: one target"):
        score(GradientPolicy(key="g"), torch.zeros(4), g=torch.zeros(2, 4))
    fixed = intervene(model(), policy=GradientPolicy(Target("logits", [0, 1])), strategy=Do(0.0), k=1)
    with pytest.raises(BadValue, match="one target for each row"):
        fixed(TensorDict({"x": torch.randn(5, 6)}, [5]))
    with pytest.raises(BadKey, match="'concept'"):
        UniformPolicy()(TensorDict({"concept": torch.zeros(4)}))
