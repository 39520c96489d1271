"""ConceptBottleneck: encoder -> concepts -> task, as a TensorDictSequential with names."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts.activation import ConceptActivation
from tdconcepts.concepts.bottleneck import ConceptBottleneck
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.stages import cut, stages

SPEC = ConceptSpec(["wing", "beak", "tail"])


def bottleneck(**keywords):
    return ConceptBottleneck(nn.Linear(6, 3), nn.Linear(3, 4), concepts=SPEC, **keywords)


@pytest.mark.parametrize("batch", [[], [5], [2, 3], [0], [2, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_head_of_sigmoid_of_encoder(batch, dtype):
    model = bottleneck().to(dtype)
    x = torch.randn(*batch, 6, dtype=dtype)
    td = TensorDict({"observation": x}, batch)
    assert model(td) is td
    encoder, head = model["encoder"].module, model["head"].module
    concepts = encoder(x).sigmoid()
    assert torch.equal(td["concepts_logits"], encoder(x))
    assert torch.equal(td["concepts"], concepts)
    assert torch.equal(td["logits"], head(concepts))
    assert set(td.keys()) == {"observation", *model.out_keys}
    assert td["logits"].dtype is dtype


def test_in_space_logits_the_head_is_given_logits():
    model = bottleneck(space="logits")
    assert list(model.module) == ["encoder", "head"]
    x = torch.randn(2, 6)
    td = model(TensorDict({"observation": x}, [2]))
    assert torch.equal(td["concepts"], model["encoder"].module(x))
    assert (td["concepts"] < 0).any()
    assert model.out_keys == ["concepts", "logits"]


def test_modules_with_keys_of_their_own_are_taken_as_they_are():
    encoder = TensorDictModule(nn.Linear(6, 3), ["image"], ["concepts"])
    head = TensorDictModule(nn.Bilinear(3, 6, 2), ["concepts", "image"], ["y"])
    model = ConceptBottleneck(encoder, head, SPEC)
    assert model["encoder"] is encoder
    assert list(model.module) == [
        "encoder",
        "head",
    ]
    assert (model.in_keys, model.out_keys) == (["image"], ["concepts", "y"])
    encoder = TensorDictModule(nn.Linear(6, 3), ["image"], ["concepts_logits"])
    assert list(ConceptBottleneck(encoder, head, SPEC).module) == ["encoder", "activation", "head"]


def test_nested_keys_and_names_instead_of_a_spec():
    model = ConceptBottleneck(
        nn.Linear(6, 2),
        nn.Linear(2, 4),
        ["a", "b"],
        in_keys=[("agents", "o")],
        key=("agents", "c"),
        out_keys=("agents", "q"),
    )
    assert model.concepts == ConceptSpec(["a", "b"])
    assert model.out_keys == [("agents", "c_logits"), ("agents", "c"), ("agents", "q")]
    td = model(TensorDict({"agents": {"o": torch.randn(2, 6)}}, [2]))
    assert td["agents", "q"].shape == (2, 4)


def test_categorical_concepts_get_a_softmax_each():
    model = ConceptBottleneck(nn.Linear(6, 4), nn.Linear(4, 2), ConceptSpec(["wing", "colour"], [1, 3]))
    concepts = model(TensorDict({"observation": torch.randn(5, 6)}, [5]))["concepts"]
    torch.testing.assert_close(concepts[:, 1:].sum(-1), torch.ones(5))


def test_it_is_a_sequential_that_can_be_cut_dispatched_and_selected():
    model = bottleneck()
    assert isinstance(model, TensorDictSequential)
    assert len(stages(model)) == 3
    before, after = cut(model, "concepts")
    assert [list(s.out_keys) for s in before + after] == [["concepts_logits"], ["concepts"], ["logits"]]
    assert [t.shape[-1] for t in model(observation=torch.randn(2, 6))] == [3, 3, 4]
    part = model.select_subsequence(out_keys=["concepts"])
    assert type(part) is TensorDictSequential
    assert part.out_keys == ["concepts_logits", "concepts"]
    assert bottleneck().select_out_keys("logits")(observation=torch.randn(2, 6)).shape == (2, 4)


def test_copies_pickles_and_state_dicts():
    model, x = bottleneck(), torch.randn(2, 6)
    expected = model(observation=x)[-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(observation=x)[-1], expected)
        assert other.concepts == SPEC
    other = bottleneck()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(observation=x)[-1], expected)


def test_it_compiles_in_one_graph():
    model, x = bottleneck(), torch.randn(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TensorDict({"observation": x}, [2]))["logits"], model(observation=x)[-1])


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: ConceptBottleneck(torch.tanh, nn.Linear(3, 4), SPEC), BadType, "encoder is no module"),
        (lambda: ConceptBottleneck(nn.Linear(6, 3), lambda c: c, SPEC), BadType, "head is no module"),
        (lambda: ConceptBottleneck(nn.Linear(6, 3), nn.Linear(3, 4), 3.5), BadType, "3.5"),
        (lambda: bottleneck(space="onehot"), BadValue, "onehot"),
        (lambda: bottleneck(key=""), BadKey, "not a key"),
        (
            lambda: ConceptBottleneck(TensorDictModule(nn.Linear(6, 3), ["x"], ["h"]), nn.Linear(3, 4), SPEC),
            BadKey,
            r"(?s)'concepts' or 'concepts_logits'.*way out: TensorDictModule\(net, \['x'\], \['concepts_logits'\]\)",
        ),
        (
            lambda: ConceptBottleneck(nn.Linear(6, 3), TensorDictModule(nn.Linear(6, 3), ["x"], ["y"]), SPEC),
            BadKey,
            r"(?s)in_keys \['x'\].*way out: TensorDictModule\(net, \['concepts'\], \['y'\]\)",
        ),
        (
            lambda: ConceptBottleneck(
                TensorDictModule(nn.Linear(6, 3), ["x"], ["concepts"]), nn.Linear(3, 4), SPEC, in_keys=["y"]
            ),
            BadValue,
            r"\['y'\]",
        ),
    ],
)
def test_bad_builds(build, error, text):
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize(
    ("td", "error", "text"),
    [
        (TensorDict({"logit": torch.zeros(3)}), BadKey, "did you mean 'logit'"),
        (TensorDict({"logits": torch.zeros(4)}), BadValue, r"\[\*B, 3\]"),
        (TensorDict({"logits": torch.zeros(3)}).lock_(), BadValue, "locked"),
    ],
)
def test_bad_calls_of_the_activation_leave_the_tensordict_alone(td, error, text):
    keys = list(td.keys())
    with pytest.raises(error, match=text):
        ConceptActivation(SPEC, "logits", "concepts")(td)
    assert list(td.keys()) == keys
