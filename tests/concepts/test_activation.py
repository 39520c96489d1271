"""ConceptActivation: probabilities and decisions."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts.activation import ConceptActivation, harden
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadValue

SPEC = ConceptSpec(
    ["wing", "colour", "age", "shape"], [1, 3, 1, 3], ["binary", "categorical", "continuous", "categorical"]
)


def slow_hard(probs):
    row = [float(probs[0] > 0.5)]
    for start in (1, 5):
        states = probs[start : start + 3].tolist()
        row += [float(i == states.index(max(states))) for i in range(3)]
        row += [probs[4].item()] * (start == 1)
    return row


def test_hard_is_the_side_of_one_half_and_the_most_probable_state():
    probs = SPEC.probs(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(harden(SPEC, probs), torch.tensor([slow_hard(row) for row in probs]))


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_hard_and_straight_through(batch):
    logits = torch.randn(*batch, 8, requires_grad=True)
    td = TensorDict({"concepts_logits": logits}, batch)
    hard = ConceptActivation(SPEC, hard=True)(td.copy())["concepts"]
    through = ConceptActivation(SPEC, hard="straight_through")(td.copy())["concepts"]
    soft = ConceptActivation(SPEC)(td.copy())["concepts"]
    torch.testing.assert_close(hard, through)
    pull = torch.randn(*batch, 8)
    expected = torch.autograd.grad((soft * pull).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((through * pull).sum(), logits)[0], expected)
    binary = hard[..., 0]
    assert not binary.requires_grad or torch.autograd.grad(binary.sum(), logits)[0].abs().sum() == 0


def test_another_kind_of_activation():
    with pytest.raises(BadValue, match="soft"):
        ConceptActivation(SPEC, hard="soft")


def test_what_is_undecided_is_false_and_the_first_of_equal_states():
    probs = torch.tensor([0.5, 0.5001, 0.4, 0.4, 0.2])
    assert harden(ConceptSpec(["a", "b", "c"], [1, 1, 3]), probs).tolist() == [0, 1, 1, 0, 0]
