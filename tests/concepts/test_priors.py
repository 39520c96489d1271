"""ConceptPrior: the same logits for each row."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts.graphs import ConceptGraph
from tdconcepts.concepts.predictors import LinearPredictor
from tdconcepts.concepts.priors import ConceptPrior
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadValue

SPEC = ConceptSpec(["a", "b", "c"], [1, 3, 1], ["binary", "categorical", "continuous"])
PROBS = torch.tensor([0.25, 0.5, 0.3, 0.2, -1.5])


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
@pytest.mark.parametrize("learned", [True, False])
def test_every_row_has_the_probabilities_that_were_given(batch, learned):
    prior = ConceptPrior(SPEC, PROBS, learned)
    td = prior(TensorDict({}, batch))
    torch.testing.assert_close(SPEC.probs(td["concepts_logits"]), PROBS.expand(*batch, 5))
    assert len(list(prior.parameters())) == learned
    assert "logits" in prior.state_dict()


def test_rows_can_be_changed_apart_and_gradients_add_up():
    prior = ConceptPrior(SPEC)
    out = prior(TensorDict({}, [3]))["concepts_logits"]
    out.detach()[0] = 7
    assert prior.logits.abs().max() == 0
    out.sum().backward()
    assert prior.logits.grad.tolist() == [3.0] * 5


def test_the_root_of_a_graph():
    graph = ConceptGraph({"y": LinearPredictor(5, 1, {"concepts_logits": "y"}), "concepts_logits": ConceptPrior(SPEC)})
    assert list(graph.module) == ["concepts_logits", "y"]
    assert graph(TensorDict({}, [2]))["y"].shape == (2, 1)


def test_bad_input():
    for probs, text in ((torch.zeros(4), r"\[5\]"), (PROBS * 10, r"outside \[0, 1\]"), (PROBS * torch.nan, "known")):
        with pytest.raises(BadValue, match=text):
            ConceptPrior(SPEC, probs)
    with pytest.raises(BadValue, match="locked"):
        ConceptPrior(SPEC)(TensorDict({}).lock_())
