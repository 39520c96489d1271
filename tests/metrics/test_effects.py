"""Effects of concepts, completeness, leakage, and counts of concepts; each by hand."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.concepts import ConceptBottleneck, ConceptSpec, Dag, GraphBottleneck, LinearPredictor
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions import GroundTruth, intervene
from tdconcepts.metrics.effects import (
    causal_concept_effect,
    completeness_score,
    contributing_concepts,
    effective_concepts,
    leakage_score,
)

SPEC = ConceptSpec(["a", "b", "c"], [1, 3, 1])


def bottleneck(head=None):
    torch.manual_seed(0)
    return ConceptBottleneck(nn.Linear(4, 5), head or nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), SPEC)


def test_an_effect_by_hand():
    model, td = bottleneck(), TensorDict({"observation": torch.randn(6, 4)}, [6])
    concepts, head = model(td.copy())["concepts"], model["head"].module
    means = []
    for value in (0.25, 1.0):
        changed = concepts.clone()
        changed[:, 4] = value
        means.append(head(changed).mean(0))
    torch.testing.assert_close(causal_concept_effect(model, td, {"c": (0.25, 1.0)}), means[1] - means[0])
    assert set(td.keys()) == {"observation"}
    stacked = TensorDict({"observation": td["observation"].reshape(2, 3, 4)}, [2, 3])
    torch.testing.assert_close(causal_concept_effect(model, stacked, "c"), causal_concept_effect(model, td, "c"))


def test_in_space_logits_the_effect_is_that_of_labels():
    spec = ConceptSpec(["a", "x"], kinds=["binary", "continuous"])
    torch.manual_seed(0)
    model = ConceptBottleneck(nn.Linear(4, 2), LinearPredictor(2, 1), spec, space="logits")
    td, weight = TensorDict({"observation": torch.randn(6, 4)}, [6]), model["head"].linear.weight.detach()[:, 0]
    told = [
        intervene(model, strategy=GroundTruth("labels"), among=["a"])(
            td.copy().set("labels", torch.full((6, 2), value))
        )["logits"].mean(0)
        for value in (0.0, 1.0)
    ]
    effect = causal_concept_effect(model, td, "a")
    torch.testing.assert_close(effect, (told[1] - told[0]).detach())
    torch.testing.assert_close(effect, 2 * 9.21024 * weight, rtol=1e-4, atol=0)
    some = causal_concept_effect(model, td, {"a": (0.5, 0.8)})
    torch.testing.assert_close(some, torch.tensor(0.8).logit() * weight)
    moved = causal_concept_effect(model, td, {"x": (-2.0, 3.0)})
    torch.testing.assert_close(moved, 5 * model["head"].linear.weight.detach()[:, 1])
    with pytest.raises(BadValue, match="not a probability"):
        causal_concept_effect(model, td, {"a": (-4.0, 4.0)})


def test_leakage_leaves_out_rows_without_a_task():
    torch.manual_seed(0)
    probs, task = torch.rand(60, 5), torch.randint(0, 2, (60,)).double()
    probs[:, 0] = 0.6 + 0.3 * task
    task[torch.rand(60) < 0.5] = torch.nan
    known = ~task.isnan()
    found, expected = (
        leakage_score(SPEC, *some, generator=torch.Generator().manual_seed(0))
        for some in ((probs, task), (probs[known], task[known]))
    )
    assert found == expected
    with pytest.raises(BadValue, match="0 classes"):
        leakage_score(SPEC, probs, task * torch.nan)


def test_in_a_graph_the_effect_goes_through_what_depends_on_the_concept():
    torch.manual_seed(0)
    model = GraphBottleneck(nn.Linear(4, 8), Dag("xyz", [("x", "y"), ("y", "z")]), in_features=8)
    td = TensorDict({"observation": torch.randn(7, 4)}, [7])
    effect = causal_concept_effect(model, td, "x", out="concepts")
    assert effect[0] == 1
    w, b = model["propagation"].equations.weight, model["propagation"].equations.bias
    y = [(b[1] + w[1, 0] * x).sigmoid() for x in (0.0, 1.0)]
    z = [(b[2] + w[2, 1] * one).sigmoid() for one in y]
    torch.testing.assert_close(effect[1:], torch.stack([y[1] - y[0], z[1] - z[0]]).detach())
    assert causal_concept_effect(model, td, "z", out="concepts").tolist() == [0, 0, 1]


def test_completeness_is_nothing_at_chance():
    """Without the baseline of the paper, as in torch_concepts, a model at chance gets 0.5."""
    assert completeness_score(0.5, 1.0, 0.5) == 0
    assert completeness_score(0.8, 0.8, 0.1) == 1
    with pytest.raises(BadValue, match="above chance"):
        completeness_score(0.5, 0.5, 0.5)


def test_leakage_is_what_probabilities_tell_beside_decisions():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (800, 3), generator=g)
    task = labels[:, 0] + 2 * labels[:, 1]
    clean = 0.1 + 0.8 * labels + 0.05 * torch.rand(800, 3, generator=g)
    spec = ConceptSpec(3)
    assert abs(leakage_score(spec, clean, task, generator=g)) < 0.02
    other = torch.randint(0, 2, (800,), generator=g)
    leaky = clean + 0.04 * (2 * other.unsqueeze(-1) - 1)
    assert leakage_score(spec, leaky, other, ridge=0.01, generator=g) > 0.3


def test_effective_concepts_one_by_one():
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.7] = 0
    for t in range(4):
        used = sum(bool((weight[t, SPEC.slice(n)].abs() > 0.9).any()) for n in SPEC.names)
        assert effective_concepts(weight, SPEC, 0.9)[t] == used
    assert effective_concepts(weight).tolist() == (weight != 0).sum(1).tolist()


def test_contributing_concepts_one_by_one():
    torch.manual_seed(0)
    weight, probs = torch.randn(3, 5), torch.rand(2, 4, 5)
    found = contributing_concepts(weight, probs, SPEC, 0.8)
    assert found.shape == (2, 4, 3)
    for i in range(2):
        for j in range(4):
            for t in range(3):
                sizes = [(weight[t] * probs[i, j])[SPEC.slice(n)].abs().sum().item() for n in SPEC.names]
                sizes.sort(reverse=True)
                count = next(k for k in range(1, 4) if sum(sizes[:k]) >= 0.8 * sum(sizes))
                assert found[i, j, t] == count
    assert contributing_concepts(weight, torch.zeros(5)).tolist() == [0, 0, 0]
    assert contributing_concepts(weight, probs[:0]).shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, td: causal_concept_effect(m, td, "cc"), BadKey, "did you mean 'c'|one of"),
        (lambda m, td: causal_concept_effect(m, td, "b"), BadValue, "several columns"),
        (lambda m, td: causal_concept_effect(m, td, "c", out="logit"), BadKey, "no such entry"),
        (lambda m, td: causal_concept_effect(m, td[:0], "c"), BadValue, "no rows"),
        (lambda m, td: causal_concept_effect(m, td, {}), BadValue, "one concept"),
        (
            lambda m, td: causal_concept_effect(TensorDictModule(nn.Identity(), ["observation"], ["y"]), td, "c"),
            BadType,
            "know its concepts",
        ),
        (lambda m, td: leakage_score(SPEC, torch.rand(4, 5), torch.zeros(3)), BadValue, r"\[N, C\]"),
        (lambda m, td: leakage_score(SPEC, torch.rand(4, 5), torch.zeros(4)), BadValue, "1 classes"),
        (lambda m, td: leakage_score(SPEC, torch.rand(4, 5), torch.zeros(4), held_out=1.0), BadValue, "1.0"),
        (lambda m, td: effective_concepts(torch.zeros(5)), BadValue, r"\[T, C\]"),
        (lambda m, td: effective_concepts(torch.zeros(2, 4), SPEC), BadValue, r"\[T, 5\]"),
        (lambda m, td: effective_concepts(torch.zeros(2, 5), threshold=-1.0), BadValue, "-1.0"),
        (lambda m, td: contributing_concepts(torch.zeros(2, 5), torch.zeros(4)), BadValue, r"\[\*B, 5\]"),
        (lambda m, td: contributing_concepts(torch.zeros(2, 5), torch.zeros(5), coverage=0.0), BadValue, "0.0"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(bottleneck(LinearPredictor(5, 2)), TensorDict({"observation": torch.randn(6, 4)}, [6]))


def test_what_is_no_input_of_a_score():
    probs, task = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(BadType, match="not accuracies"):
        completeness_score("0.9", 1.0, 0.5)
    assert completeness_score(torch.tensor(0.75), 1.0, 0.5) == 0.5
    with pytest.raises(BadType, match=r"(?s)not concepts and a task.*Tensor, Tensor, ConceptSpec"):
        leakage_score(probs, task, ConceptSpec(2))
    with pytest.raises(BadType, match=r"(?s)not the weights of a linear head.*way out: layer.weight"):
        effective_concepts(nn.Linear(2, 1))
    with pytest.raises(BadType, match="not the weights of a linear head"):
        contributing_concepts([[1.0, 0.0]], probs)


def test_an_effect_leaves_the_batch_norm_alone():
    model = ConceptBottleneck(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), LinearPredictor(2, 1), ["a", "b"])
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    data = TensorDict({"observation": torch.randn(5, 2)}, [5])
    with pytest.raises(BadValue, match=r"(?s)BatchNorm1d in training mode.*model.eval\(\)"):
        causal_concept_effect(model, data, "a")
    causal_concept_effect(model.eval(), data, "a")
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())


def test_the_options_of_leakage_are_followed_and_the_global_generator_is_left_alone():
    probs = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    task, spec, state = (probs[:, 0] > 0.75).long(), ConceptSpec(2), torch.get_rng_state()

    def score(**options):
        return leakage_score(spec, probs, task, generator=torch.Generator().manual_seed(1), **options)

    assert score() == score() > 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert score(held_out=0.1) * 40 == pytest.approx(round(score(held_out=0.1) * 40))  # of forty rows
    assert score(held_out=0.9) * 360 == pytest.approx(round(score(held_out=0.9) * 360))
    assert round(score(held_out=0.9) * 40) != pytest.approx(score(held_out=0.9) * 40)
    assert score(ridge=1e9) == 0


def test_an_effect_has_no_graph_and_a_share_that_is_met_but_for_rounding_is_met():
    model = ConceptBottleneck(nn.Linear(4, 2), nn.Linear(2, 3), ["a", "b"])
    td = TensorDict({"observation": torch.randn(5, 4)}, [5])
    assert not causal_concept_effect(model, td, "a").requires_grad
    weight = torch.full((1, 12), 0.1, dtype=torch.float64)
    assert contributing_concepts(weight, torch.ones(12).double(), coverage=7 / 12).tolist() == [7]
