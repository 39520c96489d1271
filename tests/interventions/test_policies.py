"""Policies: high score = replaced first."""

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions.influence import GradientPolicy
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import LearnedPolicy, OrderPolicy, RandomPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.splicing import intervene
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


def entropy(ps):
    """In units of the largest possible one."""
    ps = ps if len(ps) > 1 else [ps[0], 1 - ps[0]]
    return -sum(p * math.log(p) for p in ps if p) / math.log(len(ps))


@pytest.mark.parametrize("space", ["probs", "logits"])
def test_the_entropy_compares_concepts_of_any_number_of_states(space):
    probs = torch.tensor([[0.9, 0.2, 0.3, 0.5, 0.5], [0.3, 1.0, 0.0, 0.0, 0.99]], dtype=torch.float64)
    rows = [[entropy([r[0]]), *[entropy(r[1:4])] * 3, entropy([r[4]])] for r in probs.tolist()]
    splice = Splice(cardinalities=(1, 3, 1), space=space)
    logits = probs.log() - (1 - probs).log() if space == "logits" else probs
    if space == "logits":
        logits[:, 1:4] = probs[:, 1:4].log()
    expected = torch.tensor(rows, dtype=torch.float64)
    for batch in ([2], [2, 1]):
        got = score(UncertaintyPolicy().bind(splice), logits.reshape(*batch, 5)).reshape(2, 5)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    ties = torch.tensor([0.5, 1 / 3, 1 / 3, 1 / 3, 0.5])
    torch.testing.assert_close(score(UncertaintyPolicy().bind(GROUPED), ties), torch.ones(5))


def test_the_entropy_of_binary_concepts_on_request():
    concepts = torch.tensor([0.5, 0.9, 0.2])
    expected = torch.tensor([entropy([p]) for p in concepts.tolist()])
    torch.testing.assert_close(score(UncertaintyPolicy(measure="entropy"), concepts), expected)
    mixed = Splice(cardinalities=(1, 1), kinds=("binary", "continuous"))
    assert score(UncertaintyPolicy(measure="entropy").bind(mixed), torch.tensor([0.5, 7.0])).tolist() == [1, -math.inf]


def test_the_distance_of_categorical_concepts_is_refused():
    for policy in (UncertaintyPolicy(0.5), UncertaintyPolicy(measure="distance")):
        with pytest.raises(BadValue, match="entropy"):
            policy.bind(GROUPED)


def test_an_order_by_names_and_indices():
    named = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))
    for order in (["c", "a"], [2, 0], ["c", 0]):
        got = score(OrderPolicy(order).bind(named), torch.rand(2, 5))
        assert got.tolist() == [[1, 0, 0, 0, 2]] * 2
    assert [replaced(OrderPolicy([3, 1]), torch.rand(4), k) for k in (1, 2, 3)] == [[3], [1, 3], [0, 1, 3]]


def test_a_bad_order():
    named = Splice(names=("wing", "beak"), cardinalities=(1, 1))
    for order, error, text in (
        ("wing", BadValue, "'wing'"),
        ([], BadValue, r"\[\]"),
        ([0, 0], BadValue, "twice"),
        ([True], BadValue, "True"),
    ):
        with pytest.raises(error, match=text):
            OrderPolicy(order)
    with pytest.raises(BadKey, match="did you mean 'wing'"):
        OrderPolicy(["wings"]).bind(named)
    with pytest.raises(BadKey, match="ConceptSpec"):
        OrderPolicy(["wing"]).bind(Splice())
    with pytest.raises(BadValue, match="0 to 1"):
        score(OrderPolicy([2]), torch.zeros(2))


class Scorer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(width, out)

    def forward(self, *given):
        return self.net(torch.cat(given, -1))


def test_a_learned_policy_reads_what_its_scorer_does():
    policy = LearnedPolicy(Scorer(5 + 2, 5), ["x"])
    concepts, x = torch.rand(3, 5), torch.rand(3, 2)
    torch.testing.assert_close(score(policy, concepts, x=x), policy.scorer(concepts, x))
    assert policy.in_keys == ["concepts", "x"]
    whole = LearnedPolicy(Scorer(5, 3)).bind(GROUPED)  # a score for each concept
    assert torch.equal(score(whole, concepts), whole.scorer(concepts)[:, [0, 1, 1, 1, 2]])


def teachable(temperature):
    """Only the third concept's correction lowers the loss; the policy has to find out."""
    torch.manual_seed(0)
    model = TensorDictSequential(
        Mod(nn.Identity(), ["x"], ["concepts"]), Mod(lambda c: c[..., 2:3], ["concepts"], ["y"])
    )
    return intervene(model, policy=LearnedPolicy(Scorer(4, 4), temperature=temperature), strategy=Do(0.0), k=1)


def test_a_learned_policy_learns_from_a_loss_behind_the_intervention():
    fixed = teachable(1.0)
    optimiser = torch.optim.Adam(fixed.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        fixed(TensorDict({"x": torch.rand(16, 4) + 0.5}, [16]))["y"].mean().backward()
        optimiser.step()
    td = fixed(TensorDict({"x": torch.rand(50, 4) + 0.5}, [50]))
    assert td["intervention", "mask"].float().mean(0).tolist() == [0, 0, 1, 0]
    assert not td["y"].any()


def test_without_a_temperature_only_a_loss_on_the_score_teaches():
    fixed = teachable(None)
    td = fixed(TensorDict({"x": torch.rand(16, 4)}, [16]))
    assert not td["y"].requires_grad
    assert td["intervention", "score"].requires_grad


def test_the_gradient_of_a_score_is_that_of_a_choice_by_softmax():
    """d/ds sum_j softmax(s / T)_j (value - c)_j g_j, by hand; the value itself is that of the hard choice."""
    fixed = teachable(0.5)
    td = fixed(TensorDict({"x": torch.rand(3, 4, dtype=torch.float64)}, [3]).to(torch.float32))
    s, c = td["intervention", "score"], td["intervention", "before"]
    s.retain_grad()
    td["y"].sum().backward()
    w = (s.detach() / 0.5).softmax(-1)
    change = torch.zeros(3, 4)
    change[:, 2] = -c[:, 2]
    expected = w * (change - (w * change).sum(-1, keepdim=True)) / 0.5
    torch.testing.assert_close(s.grad, expected)
    assert torch.equal(td["concepts"], torch.where(td["intervention", "mask"], 0.0, c))


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


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: RandomPolicy(7), BadType, "manual_seed"),
        (lambda: UncertaintyPolicy("half"), BadType, "half"),
        (lambda: UncertaintyPolicy(True), BadType, "True"),
        (lambda: UncertaintyPolicy(measure="variance"), BadValue, "variance"),
        (lambda: UncertaintyPolicy(0.5, measure="entropy"), BadValue, "center"),
        (lambda: LearnedPolicy(nn.Linear), BadType, "scorer"),
        (lambda: LearnedPolicy(3), BadType, "3"),
        (lambda: LearnedPolicy(nn.Linear(2, 2), temperature=0.0), BadValue, "temperature"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_bad_calls():
    with pytest.raises(BadKey, match="'concept'"):
        UniformPolicy()(TensorDict({"concept": torch.zeros(4)}))
    with pytest.raises(BadKey, match="'x'"):
        score(LearnedPolicy(Scorer(5, 5), ["x"]), torch.zeros(3, 4))
    with pytest.raises(BadValue, match=r"\[3, 2\]"):
        score(LearnedPolicy(nn.Linear(4, 2)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_an_order_of_many_concepts_is_exact(dtype):
    order = list(reversed(range(3000)))
    score = OrderPolicy(order)(concepts=torch.zeros(3000).to(dtype))
    assert score.argsort(descending=True).tolist() == order


def test_the_uncertainty_of_bools():
    assert UncertaintyPolicy()(concepts=torch.tensor([True, False])).tolist() == [-0.5, -0.5]
