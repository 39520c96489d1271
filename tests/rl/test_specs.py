"""Concept specs and torchrl's Composite, there and back."""

import pytest
import torch
from tensordict import TensorDict

from tdconcepts.concepts import ConceptSpec
from tdconcepts.errors import BadType
from tdconcepts.rl.specs import concept_spec, concepts_composite

data = pytest.importorskip("torchrl.data")

SPEC = ConceptSpec(["a", "b", "c", "d"], [1, 3, 2, 1], ["binary", "categorical", "continuous", "continuous"])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_there_and_back(shape):
    composite = concepts_composite(SPEC, shape)
    assert concept_spec(composite) == SPEC
    assert composite.shape == shape


def test_what_a_spec_draws_can_be_packed_and_what_is_split_belongs_to_it():
    composite = concepts_composite(SPEC, (5,))
    td = SPEC.pack(TensorDict({"concepts": composite.rand()}, [5]))
    assert td["concepts"].shape == (5, 7)
    assert composite.is_in(SPEC.split(td)["concepts"])
    torch.testing.assert_close(td["concepts"][:, 1:4].sum(-1), torch.ones(5))


def test_indices_and_groups():
    composite = data.Composite(
        gear=data.Categorical(4), car=data.Composite(speed=data.Bounded(0, 1, (1,)), on=data.Binary(1))
    )
    spec = concept_spec(composite)
    assert dict(zip(spec.names, spec.kinds, strict=True)) == {
        "gear": "categorical",
        "car.speed": "continuous",
        "car.on": "binary",
    }
    assert spec.columns(["car"]) == [4, 5]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: data.Unbounded(3), "a torchrl Composite"),
        (lambda: data.Composite(), "without entries"),
        (lambda: data.Composite(a=data.Binary(3)), "'a' is no concept"),
        (lambda: data.Composite(a=data.Unbounded(2, dtype=torch.int64)), "'a' is no concept"),
        (lambda: data.Composite(a=data.Categorical(4, shape=(3,))), "'a' is no concept"),
    ],
)
def test_what_is_no_concept(build, text):
    with pytest.raises(BadType, match=text):
        concept_spec(build())
    with pytest.raises(BadType, match="needed:  a ConceptSpec"):
        concepts_composite(build)
