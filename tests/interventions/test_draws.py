"""Strategies that draw: distributions and other rows."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal, OneHotCategorical

from tdconcepts.errors import BadType, BadValue
from tdconcepts.interventions.draws import FromDistribution, Resample, drawing_from
from tdconcepts.interventions.splice import Splice

GROUPED = Splice(names=("a", "b", "c"), cardinalities=(1, 3, 1))
MEANS = torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def value(strategy, concepts):
    td = TensorDict({"concepts": concepts}, concepts.shape[:-1])
    assert strategy(td) is td
    return td["intervention", "value"]


FORMS = {
    "one for the block": Normal(MEANS, 1.0),
    "one event": Independent(Normal(MEANS, 1.0), 1),
    "with correlations": MultivariateNormal(MEANS, torch.eye(5)),
    "one for each": [Normal(m, 1.0) for m in MEANS],
    "some wider": [Normal(0.0, 1.0), Independent(Normal(MEANS[1:4], 1.0), 1), Normal(40.0, 1.0)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reparameterised", [False, True])
def test_each_column_has_its_own_distribution(form, reparameterised):
    """5 means, 2000 rows: 4 standard errors are .09."""
    strategy = FromDistribution(FORMS[form], generator=seeded(), reparameterised=reparameterised)
    for batch in ([2000], [40, 50]):
        drawn = value(strategy, torch.zeros(*batch, 5)).reshape(-1, 5)
        assert (drawn.mean(0) - MEANS).abs().max() < 0.09
        assert (drawn.std(0) - 1).abs().max() < 0.09
    assert value(strategy, torch.zeros(5)).shape == (5,)
    assert value(strategy, torch.zeros(0, 5, dtype=torch.float64)).dtype is torch.float64


def test_as_many_rows_as_columns_is_no_special_case():
    """torch_concepts' draws of a distribution [F] were [F, F, F] for a batch of F rows."""
    assert value(FromDistribution(Normal(MEANS, 1.0)), torch.zeros(5, 5)).shape == (5, 5)


def test_states_become_columns():
    strategies = [
        FromDistribution([Bernoulli(1.0), Categorical(torch.tensor([0.0, 0.0, 1.0])), Normal(5.0, 1e-6)]),
        FromDistribution([Bernoulli(1.0), OneHotCategorical(torch.tensor([0.0, 0.0, 1.0])), Normal(5.0, 1e-6)]),
    ]
    for strategy in strategies:
        drawn = value(strategy.bind(GROUPED), torch.zeros(2, 5))
        torch.testing.assert_close(drawn, torch.tensor([[1.0, 0.0, 0.0, 1.0, 5.0]] * 2), atol=1e-4, rtol=0)


def test_a_draw_is_a_label_where_a_space_is_given():
    probs = FromDistribution(Bernoulli(torch.tensor([0.0, 1.0])), space="logits")
    assert value(probs, torch.zeros(3, 2)).sigmoid().tolist() == [pytest.approx([0, 1], abs=2e-4)] * 3


def test_reparameterised_draws_have_a_gradient_and_others_none():
    mean = torch.tensor([1.0, 2.0], requires_grad=True)
    for reparameterised in (True, False):
        drawn = value(FromDistribution(Normal(mean, 1.0), reparameterised=reparameterised), torch.zeros(3, 2))
        assert drawn.requires_grad is reparameterised
    value(FromDistribution(Normal(mean, 1.0), reparameterised=True), torch.zeros(3, 2)).sum().backward()
    assert mean.grad.tolist() == [3, 3]


@pytest.mark.parametrize(
    "make", [lambda g: FromDistribution(Normal(0.0, 1.0), generator=g), lambda g: Resample(generator=g)]
)
def test_a_generator_makes_draws_repeatable_and_spares_the_global_one(make):
    concepts, state = torch.rand(6, 3), torch.get_rng_state()
    first, second = (value(make(seeded(4)), concepts) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    strategy = make(seeded(4))
    assert not torch.equal(value(strategy, concepts), value(strategy, concepts))
    with drawing_from(None):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("per_concept", [False, True])
@pytest.mark.parametrize("batch", [[6], [2, 3]])
def test_every_value_is_another_rows(per_concept, batch):
    concepts = torch.arange(30.0).reshape(*batch, 5)
    flat = concepts.reshape(6, 5)
    seen = set()
    for seed in range(40):
        drawn = value(Resample(per_concept=per_concept, generator=seeded(seed)).bind(GROUPED), concepts).reshape(6, 5)
        source = drawn // 5  # the row that a number is from
        assert torch.equal(drawn % 5, flat % 5)
        assert (source != torch.arange(6.0).unsqueeze(-1)).all()
        assert torch.equal(source[:, 1], source[:, 2])
        assert torch.equal(source[:, 1], source[:, 3])  # a categorical concept comes whole
        assert per_concept or torch.equal(source[:, 0], source[:, 4])
        seen.update(source[0].tolist())
    assert seen == {1, 2, 3, 4, 5}
    one = value(Resample(per_concept=True, generator=seeded()).bind(GROUPED), concepts).reshape(6, 5) // 5
    assert not torch.equal(one[:, 0], one[:, 4])


def test_rows_of_a_pool():
    pool = torch.arange(6.0).reshape(3, 2)
    strategy = Resample(pool, generator=seeded())
    pool.zero_()  # a copy was taken
    for batch in ([], [1], [4], [2, 3], [0]):
        drawn = value(strategy, torch.zeros(*batch, 2, dtype=torch.float64))
        assert drawn.dtype is torch.float64
        assert (drawn[..., 1] - drawn[..., 0] == 1).all()
    many = value(strategy, torch.zeros(300, 2))
    assert set(many[:, 0].tolist()) == {0, 2, 4}
    assert not strategy.state_dict()


def test_copies_and_pickles():
    for strategy in (FromDistribution([Normal(0.0, 1.0)] * 3), Resample(), Resample(torch.rand(4, 3))):
        concepts = torch.rand(5, 3)
        torch.manual_seed(0)
        expected = value(strategy, concepts)
        for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
            torch.manual_seed(0)
            assert torch.equal(value(other, concepts), expected)


@pytest.mark.parametrize("strategy", [FromDistribution(Normal(0.0, 1.0)), Resample()])
def test_they_compile_and_map(strategy):
    concepts = torch.rand(4, 3, 2)
    torch._dynamo.reset()
    compiled = torch.compile(strategy, fullgraph=True, backend="eager")
    assert compiled(TensorDict({"concepts": concepts}, [4, 3]))["intervention", "value"].shape == (4, 3, 2)
    mapped = torch.vmap(lambda c: value(strategy, c), randomness="different")(concepts)
    assert mapped.shape == (4, 3, 2)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: FromDistribution(3.0), BadType, "3.0"),
        (lambda: FromDistribution([]), BadType, r"\[\]"),
        (lambda: FromDistribution([Normal(0.0, 1.0), 2.0]), BadType, "2.0"),
        (lambda: FromDistribution(Bernoulli(0.5), reparameterised=True), BadValue, "Bernoulli"),
        (lambda: FromDistribution(Normal(0.0, 1.0), generator=3), BadType, "manual_seed"),
        (lambda: FromDistribution(Normal(0.0, 1.0), space="real"), BadValue, "'real'"),
        (lambda: Resample(3), BadType, "int"),
        (lambda: Resample(torch.zeros(3)), BadValue, r"\[3\]"),
        (lambda: Resample(torch.zeros(0, 3)), BadValue, "rows"),
        (lambda: Resample(generator=0), BadType, "manual_seed"),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (FromDistribution(Normal(torch.zeros(3), 1.0)), r"\[2, 3\]"),
        (FromDistribution([Normal(0.0, 1.0)] * 3), r"\[2, 3\]"),
        (FromDistribution(Normal(5.0, 1e-3), space="probs"), "no probabilities"),
        (Resample(torch.zeros(4, 3)), r"\[4, 3\]"),
    ],
)
def test_what_does_not_fit(strategy, text):
    with pytest.raises(BadValue, match=text):
        value(strategy, torch.zeros(2, 2))


def test_one_row_has_no_other():
    for batch in ([], [1], [1, 1]):
        with pytest.raises(BadValue, match="pool"):
            value(Resample(), torch.zeros(*batch, 2))


@pytest.mark.parametrize(
    ("options", "randomness", "text"),
    [
        ({}, "error", 'randomness="same".* or "different"'),
        ({"reparameterised": True}, "different", "reparameterised under vmap"),
        ({"generator": torch.Generator().manual_seed(0)}, "different", "from a generator under vmap"),
    ],
)
def test_draws_that_vmap_can_not_make_are_refused_in_words(options, randomness, text):
    strategy = FromDistribution(Normal(torch.zeros((), requires_grad=True), 1.0), **options)
    with pytest.raises(BadValue, match="(?s)vmap can't make these draws.*" + text):
        torch.vmap(lambda c: value(strategy, c), randomness=randomness)(torch.rand(3, 2))
    assert torch.vmap(lambda c: value(strategy, c), randomness="same")(torch.rand(3, 2)).shape == (3, 2)


def test_a_single_categorical_is_one_hot_for_each_concept_of_its_states():
    states = Categorical(torch.tensor([0.2, 0.3, 0.5]))
    for columns in (3, 6):
        drawn = FromDistribution(states)(concepts=torch.zeros(40, columns)).unflatten(-1, (-1, 3))
        assert (drawn.sum(-1) == 1).all()
        assert drawn.sum(0).gt(0).all()
    binary = FromDistribution(Categorical(torch.tensor([0.5, 0.5])))(concepts=torch.zeros(40, 4))
    assert set(binary.flatten().tolist()) == {0.0, 1.0}
    two = FromDistribution(Categorical(torch.tensor([0.5, 0.5]))).bind(Splice(cardinalities=(2, 2)))
    assert (two(concepts=torch.zeros(40, 4)).unflatten(-1, (2, 2)).sum(-1) == 1).all()
    for concepts, splice in ((torch.zeros(2, 4), Splice()), (torch.zeros(2, 4), Splice(cardinalities=(1, 3)))):
        with pytest.raises(BadValue, match=r"(?s)does not fit the concepts.*a Categorical of 3 states"):
            FromDistribution(states).bind(splice)(concepts=concepts)
