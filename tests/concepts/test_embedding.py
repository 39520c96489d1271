"""ConceptEmbedding: the whole model by hand, and that corrections reach the task."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.concepts.embedding import ConceptEmbedding
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.interventions import Do, intervene


def embedding(head=2, spec=3, **options):
    torch.manual_seed(0)
    spec = spec if isinstance(spec, ConceptSpec) else ConceptSpec(spec)
    return ConceptEmbedding(nn.Linear(6, 5), head, spec, in_features=5, embedding_size=4, **options)


def test_the_model_by_hand():
    model, x = embedding().double(), torch.randn(7, 6, dtype=torch.float64)
    td = model(TensorDict({"observation": x}, [7]))
    layer, score = model["exogenous"].linear, model["score"].linear["binary"]
    for b in range(7):
        z = model["encoder"].module(x[b])
        e = F.leaky_relu(layer.weight @ z + layer.bias).reshape(3, 2, 4)
        mixed = []
        for k in range(3):
            logit = (score.weight[0] * e[k].reshape(8)).sum() + score.bias[0]
            torch.testing.assert_close(td["concepts_logits"][b, k], logit)
            mixed.append(logit.sigmoid() * e[k, 0] + (1 - logit.sigmoid()) * e[k, 1])
        torch.testing.assert_close(td["logits"][b], model["head"].head(torch.cat(mixed)))


def test_a_correction_reaches_the_task_through_the_embedding_of_its_state():
    model, td = embedding(), TensorDict({"observation": torch.randn(4, 6)}, [4])
    fixed = intervene(model, at="concepts", strategy=Do(1.0), among=[1])(td.copy())
    plain = model(td.copy())
    assert torch.equal(fixed["mixture"][:, 1], plain["exogenous"][:, 2])
    assert torch.equal(fixed["mixture"][:, [0, 2]], plain["mixture"][:, [0, 2]])
    assert not torch.allclose(fixed["logits"], plain["logits"])


@pytest.mark.parametrize("batch", [[], [4], [2, 3], [0]])
def test_any_batch_nested_keys_and_kinds(batch):
    spec = ConceptSpec(["a", "b", "c"], [1, 3, 1], ["binary", "categorical", "continuous"])
    model = embedding(head=nn.Linear(12, 2), spec=spec, in_keys=[("agents", "o")], key=("agents", "c"))
    td = model(TensorDict({"agents": {"o": torch.randn(*batch, 6)}}, batch))
    assert td["agents", "logits"].shape == (*batch, 2)
    assert td["agents", "c"].shape == (*batch, 5)
    assert set(td.keys()) == {"agents"}


def test_an_encoder_with_keys_copies():
    encoder = TensorDictModule(nn.Linear(6, 5), ["image"], ["latent"])
    model = ConceptEmbedding(encoder, 2, ["a"], in_features=5)
    assert model.in_keys == ["image"]
    x = torch.randn(3, 6)
    expected = model(image=x)[-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image=x)[-1], expected)
    torch.testing.assert_close(torch.vmap(lambda row: model(image=row)[-1])(x), expected)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: embedding(head="linear"), BadType, "head is no module"),
        (lambda: embedding(head=0), BadValue, "out_features"),
        (
            lambda: ConceptEmbedding(TensorDictModule(nn.Linear(6, 5), ["x"], ["z"]), 2, ["a"], in_features=5),
            BadKey,
            r"(?s)out_keys \['z'\].*'latent'.*way out: TensorDictModule\(net, \['x'\], \['latent'\]\)",
        ),
        (lambda: ConceptEmbedding(nn.Linear(6, 5), 2, ["a"], in_features=5, embedding_size=0), BadValue, "embedding"),
        (lambda: ConceptEmbedding(nn.Linear(6, 5), 2, ["a"], in_features=4)(torch.zeros(2, 6)), BadValue, "4"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()
