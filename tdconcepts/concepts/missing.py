"""Labels that are missing: a concept is known as a whole or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from tdconcepts.concepts.spec import ConceptSpec

__all__ = ["missing"]


def missing(concepts: ConceptSpec, columns: Tensor) -> Tensor:
    """Which columns belong to a concept that is NaN in one of its columns, ``[*B, C]``, bool.

    Args:
        concepts: which columns belong together.
        columns: ``[*B, C]``, NaN where nothing is known.

    Examples:
        >>> spec = ConceptSpec(["wing", "colour"], [1, 2])
        >>> missing(spec, torch.tensor([[torch.nan, 0, 1], [1, torch.nan, 0]])).tolist()
        [[True, False, False], [False, True, True]]
    """
    gone = columns.isnan()
    if concepts.size == len(concepts):
        return gone
    parts = []
    for run in concepts.runs:
        part = gone[..., run.start : run.stop]
        if run.cardinality > 1:
            each = part.unflatten(-1, (-1, run.cardinality))
            part = each.any(-1, keepdim=True).expand_as(each).flatten(-2)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
