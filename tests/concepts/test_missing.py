"""Missing labels: column by column, against a loop over the concepts."""

import pytest
import torch

from tdconcepts.concepts.missing import missing
from tdconcepts.concepts.spec import ConceptSpec

SPECS = {
    "mixed": ConceptSpec(["a", "b", "c", "d"], [1, 3, 3, 2], ["binary", "categorical", "categorical", "continuous"]),
    "one": ConceptSpec(["a"], [9]),
    "binary": ConceptSpec(9),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_a_concept_is_missing_as_a_whole(spec, batch):
    torch.manual_seed(0)
    columns = torch.rand(*batch, 9).masked_fill(torch.rand(*batch, 9) < 0.3, torch.nan)
    expected = torch.zeros(*batch, 9, dtype=torch.bool)
    for name in spec.names:
        expected[..., spec.slice(name)] = columns[..., spec.slice(name)].isnan().any(-1, keepdim=True)
    assert torch.equal(missing(spec, columns), expected)
