"""Policies by influence: gradients that they take themselves, and the change that a correction is expected to make."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Site, Target
from tdconcepts.interventions.influence import ExpectedInfluencePolicy, GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.spaces import to_logits
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do


def score(policy, concepts, **entries):
    td = TensorDict({"concepts": concepts, **entries}, concepts.shape[:-1])
    assert policy(td) is td
    return td["intervention", "score"]


def replaced(policy, concepts, k, **entries):
    """The indices that a pipeline with this policy replaces in the only row."""
    td = TensorDict({"concepts": concepts, **entries})
    InterventionPipeline(policy, Do(7.0), k=k)(td)
    return td["intervention", "mask"].nonzero().flatten().tolist()


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


def by_hand(concepts, gradient, sizes, space):
    """sum_v p_v |g . (w_v - c)|, concept by concept and state by state."""
    scores, start = [], 0
    for n in sizes:
        c, g = concepts[start : start + n], gradient[start : start + n]
        if n == 1:
            p = c.sigmoid() if space == "logits" else c
            states = [(1 - p, torch.zeros(1)), (p, torch.ones(1))]
        else:
            p = c.softmax(-1) if space == "logits" else c
            states = [(p[v], torch.eye(n)[v]) for v in range(n)]
        total = 0.0
        for chance, label in states:
            written = to_logits(label, (n,)) if space == "logits" else label
            total += float(chance) * abs(float((g * (written.to(c) - c)).sum()))
        scores += [total] * n
        start += n
    return scores


@pytest.mark.parametrize("space", ["probs", "logits"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 3, 1), (2, 3)])
def test_expected_influence_is_the_gradient_times_the_change_that_is_expected(space, sizes):
    g = torch.Generator().manual_seed(0)
    splice = Splice(cardinalities=sizes, space=space)
    concepts = torch.rand(4, 5, generator=g, dtype=torch.float64)
    concepts = concepts * 4 - 2 if space == "logits" else concepts / concepts.sum(-1, keepdim=True)
    gradient = torch.randn(4, 5, generator=g, dtype=torch.float64)
    policy = ExpectedInfluencePolicy().bind(splice)
    expected = [by_hand(c, v, sizes, space) for c, v in zip(concepts, gradient, strict=True)]
    got = score(policy, concepts, gradient={"concepts": gradient})
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_certain_concepts_and_those_that_do_not_matter_come_last():
    gradient = torch.tensor([1.0, 9.0, 0.0, -2.0])
    concepts = torch.tensor([0.5, 1.0, 0.5, 0.5])
    assert replaced(ExpectedInfluencePolicy(), concepts, 2, gradient={"concepts": gradient}) == [0, 3]
    assert replaced(GradientPolicy(), concepts, 2, gradient={"concepts": gradient}) == [1, 3]


def test_the_expected_change_of_a_known_value_is_the_change_itself():
    net, x = model(), torch.randn(5, 6)
    policy = ExpectedInfluencePolicy(Target("logits", 1), change="value")
    fixed = intervene(net, policy=policy, strategy=Do([0.0, 1.0, 1.0, 0.0]), k=1)
    td = fixed(TensorDict({"x": x}, [5]))
    gradient = torch.einsum("cd,bd->bc", net[2].module.weight[1], x)
    moved = (gradient * (torch.tensor([0.0, 1.0, 1.0, 0.0]) - td["intervention", "before"])).abs()
    torch.testing.assert_close(td["intervention", "score"], moved)
    assert torch.equal(td["intervention", "mask"].float().argmax(-1), moved.argmax(-1))
    grouped = ExpectedInfluencePolicy(change="value").bind(Splice(cardinalities=(2, 1)))
    td = TensorDict({"concepts": torch.zeros(3), "gradient": {"concepts": torch.tensor([1.0, -1.0, 2.0])}})
    td["intervention", "value"] = torch.ones(3)
    assert grouped(td)["intervention", "score"].tolist() == [0, 0, 2]


@pytest.mark.parametrize("change", ["predicted", "value"])
def test_expected_influence_takes_its_own_gradients_and_compiles(change):
    fixed = intervene(
        model(), policy=ExpectedInfluencePolicy(Target("logits", 1), change=change), strategy=Do(0.0), k=1
    )
    x = torch.randn(5, 6)
    expected = fixed(TensorDict({"x": x}, [5]))
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")(TensorDict({"x": x}, [5]))
    for key in (("intervention", "score"), "logits"):
        torch.testing.assert_close(compiled[key], expected[key])


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: GradientPolicy("logits"), BadType, "Target"),
        (lambda: GradientPolicy(Target("logits", 0), key="g"), BadValue, "two sources"),
        (lambda: GradientPolicy(fallback="random"), BadValue, "random"),
        (lambda: ExpectedInfluencePolicy(change="real"), BadValue, "real"),
        (
            lambda: ExpectedInfluencePolicy().bind(Splice(cardinalities=(1,), kinds=("continuous",))),
            BadValue,
            'change="value"',
        ),
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
    with pytest.raises(BadKey, match="no gradients"):
        score(ExpectedInfluencePolicy(), torch.zeros(4))


def test_a_gradient_that_has_a_graph_makes_a_score_without_one():
    gradient = torch.tensor([-1.0, 2.0], requires_grad=True)
    score = GradientPolicy(key="g").bind(Splice())(TensorDict({"concepts": torch.zeros(2), "g": gradient}))
    assert not score["intervention", "score"].requires_grad
