"""Where an intervention sits, and what is known about the concepts there."""

import copy
import dataclasses
import pickle

import pytest

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType
from tdconcepts.interventions.splice import Splice


def test_a_splice_knows_its_columns():
    splice = Splice("c", names=("a", "b"), cardinalities=(2, 1))
    assert (splice.columns, splice.owner) == (3, (0, 0, 1))
    assert (Splice().columns, Splice().owner) == (None, None)
    assert Splice(cardinalities=(1, 1)).owner is None
    assert copy.deepcopy(splice) == splice
    with pytest.raises(BadKey, match="not a TensorDict key"):
        Splice(3)


def test_it_takes_what_a_spec_says():
    spec = ConceptSpec(
        ["wing", "colour", "age"], [1, 3, 1], kinds=["binary", "categorical", "continuous"], groups={"body": ["wing"]}
    )
    splice = Splice.described("c", spec, "logits")
    assert (splice.names, splice.cardinalities, splice.kinds) == (spec.names, spec.cardinalities, spec.kinds)
    assert splice.groups == (("body", ("wing",)),)
    assert splice.owner == (0, 1, 1, 1, 2)
    assert splice.continuous == (False, False, False, False, True)
    for other in (copy.deepcopy(splice), pickle.loads(pickle.dumps(splice)), dataclasses.replace(splice)):
        assert other == splice
        assert other.owner == splice.owner
    assert Splice.described("c", ["a", "b"]).cardinalities == (1, 1)
    assert Splice.described("c", None) == Splice("c")
    with pytest.raises(BadType, match="ConceptSpec"):
        Splice.described("c", 3)
