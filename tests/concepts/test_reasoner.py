"""ConceptMemoryReasoner: its parts in a row, and that it learns a rule that can be read."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts.losses import ConceptLoss, TotalLoss
from tdconcepts.concepts.reasoner import ConceptMemoryReasoner
from tdconcepts.concepts.toys import toy_data
from tdconcepts.errors import BadKey, BadType
from tdconcepts.interventions import Do, intervene


def reasoner(tasks=1, concepts=2, **options):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 16), nn.ReLU())
    return ConceptMemoryReasoner(body, tasks, concepts, in_features=16, memory_size=4, **options)


def test_its_output_is_the_chosen_rules_truth_and_a_correction_changes_it():
    model = reasoner()
    td = TensorDict({"observation": torch.rand(5, 2)}, [5])
    out = model(td.copy())
    torch.testing.assert_close(out["probs"], (out["selection"] * out["rules"]).sum(-1))
    torch.testing.assert_close(out["selection"].sum(-1), torch.ones(5, 1))
    fixed = intervene(model, at="concepts", strategy=Do(1.0))(td.copy())
    assert not torch.allclose(fixed["probs"], out["probs"])
    assert model.likelihood().rules is model["rules"]


@pytest.mark.parametrize("batch", [[], [2, 3], [0]])
def test_any_batch_and_nested_keys(batch):
    model = reasoner(2, 3, in_keys=[("a", "o")], key=("a", "c"))
    td = model(TensorDict({"a": {"o": torch.rand(*batch, 2)}}, batch))
    assert td["a", "probs"].shape == (*batch, 2)
    assert model.likelihood(("a", "y"), ("a", "t")).in_keys == [("a", "selection"), ("a", "y"), ("a", "t")]


def test_it_learns_xor_by_rules_that_can_be_read():
    data = toy_data("xor", 600, torch.Generator().manual_seed(0))
    model = reasoner(concepts=data.concepts)
    training = TensorDictSequential(
        model, ConceptLoss(data.concepts), model.likelihood(), TotalLoss({"concepts": 1.0, "rules": 0.5})
    )
    optimizer = torch.optim.Adam(training.parameters(), lr=2e-2)
    for _ in range(250):
        optimizer.zero_grad()
        training(data.td.copy())["loss", "total"].mean().backward()
        optimizer.step()
    out = model(data.td.copy())
    right = ((out["probs"].squeeze(-1) > 0.5) == data.td["task"].bool()).float().mean()
    assert right > 0.95
    used = {model["rules"].text()[0][m] for m in out["selection"].squeeze(1)[data.td["task"].bool()].argmax(-1)}
    assert used == {"x1 > 0.5 & ~x2 > 0.5", "~x1 > 0.5 & x2 > 0.5"}


def test_bad_input():
    with pytest.raises(BadType, match="encoder is no module"):
        ConceptMemoryReasoner("mlp", 1, 2, in_features=3)
    with pytest.raises(BadKey, match=r"TensorDictModule\(net, \['x'\], \['latent'\]\)"):
        ConceptMemoryReasoner(TensorDictModule(nn.Linear(4, 3), ["x"], ["z"]), 1, 2, in_features=3)
