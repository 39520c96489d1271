"""Scores and mixtures of concept embeddings, one concept at a time."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts.mixing import ConceptMixing, ConceptScore, vectors
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadType, BadValue

KINDS = ["binary", "binary", "categorical", "categorical", "continuous", "continuous", "binary"]
SPEC = ConceptSpec(list("abcdefg"), [1, 1, 3, 3, 1, 2, 1], KINDS)
V, E = 3 * 2 + 6 + 3, 4


def slow(spec, probs, exogenous, score=None):
    """The mixture and the logits of one row: a list of embeddings taken from the front, concept by concept."""
    rest, mixture, logits = list(exogenous), [], []
    for name, kind, n in zip(spec.names, spec.kinds, spec.cardinalities, strict=True):
        p = probs[spec.slice(name)]
        some = [rest.pop(0) for _ in range(2 if kind == "binary" else n)]
        if kind == "binary":
            mixture.append(p[0] * some[0] + (1 - p[0]) * some[1])
        else:
            mixture.append(sum(p[j] * some[j] for j in range(n)))
        if score is not None:
            layer = score.linear[kind]
            pieces = [torch.cat(some)] if kind == "binary" else some
            logits += [(layer.weight[0] * piece).sum() + layer.bias[0] for piece in pieces]
    assert not rest
    return torch.stack(mixture), torch.stack(logits) if score is not None else None


def test_the_formula():
    torch.manual_seed(0)
    probs, exogenous = torch.rand(6, SPEC.size).double(), torch.randn(6, V, E).double()
    score = ConceptScore(SPEC, E).double()
    assert vectors(SPEC) == V
    mixed, logits = ConceptMixing(SPEC)(probs, exogenous), score(exogenous)
    for row in range(6):
        expected = slow(SPEC, probs[row], exogenous[row], score)
        torch.testing.assert_close(mixed[row], expected[0])
        torch.testing.assert_close(logits[row], expected[1])


def test_a_hard_concept_picks_its_embedding():
    exogenous = torch.randn(V, E)
    probs = SPEC.targets(torch.tensor([1.0, 0, 0, 2, 0, 0, 1, 1, 1, 1, 0, 1])[: SPEC.size].clamp(max=1))
    mixed = ConceptMixing(SPEC)(probs, exogenous)
    assert torch.equal(mixed[0], exogenous[0])
    assert torch.equal(mixed[1], exogenous[3])


def test_all_concepts_of_a_kind_share_one_score_and_permuting_concepts_permutes_logits():
    spec, exogenous = ConceptSpec(3), torch.randn(5, 6, E)
    score = ConceptScore(spec, E)
    order = [2, 0, 1]
    turned = exogenous.unflatten(1, (3, 2))[:, order].flatten(1, 2)
    torch.testing.assert_close(score(turned), score(exogenous)[:, order])


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_batch_and_dtype(batch, dtype):
    td = TensorDict({"concepts": torch.rand(*batch, SPEC.size), "exogenous": torch.randn(*batch, V, E)}, batch)
    td = ConceptMixing(SPEC)(td.to(dtype))
    assert td["mixture"].shape == (*batch, 7, E)
    assert td["mixture"].dtype is dtype
    assert ConceptScore(SPEC, E).to(dtype)(td)["concepts_logits"].shape == (*batch, SPEC.size)


def test_gradients_reach_probabilities_and_embeddings():
    probs, exogenous = torch.rand(3, SPEC.size, dtype=torch.double), torch.randn(3, V, E, dtype=torch.double)
    stage = ConceptMixing(SPEC)
    torch.autograd.gradcheck(stage, (probs.requires_grad_(), exogenous.requires_grad_()))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: ConceptScore(SPEC, 0), BadValue, "exogenous_size"),
        (lambda: ConceptScore(SPEC, E)(torch.zeros(2, V - 1, E)), BadValue, r"\[\*B, 15, 4\]"),
        (lambda: ConceptMixing(SPEC)(torch.zeros(2, 5), torch.zeros(2, V, E)), BadValue, r"\[\*B, 12\]"),
        (lambda: ConceptMixing(SPEC)(torch.zeros(2, 12), torch.zeros(2, V + 1, E)), BadValue, r"\[\*B, 15"),
        (lambda: ConceptMixing(SPEC)(torch.zeros(12).int(), torch.zeros(V, E)), BadType, "int32"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_probabilities_of_another_dtype_mix_embeddings_as_they_are():
    spec = ConceptSpec(["a", "b"])
    mixed = ConceptMixing(spec)(torch.tensor([[1.0, 0.0]]).double(), torch.arange(8.0).reshape(1, 4, 2))
    assert mixed.dtype is torch.float32
    assert mixed.tolist() == [[[0, 1], [6, 7]]]
