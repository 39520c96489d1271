"""Between a ConceptSpec and torchrl's specs: a block as a Composite with one entry for each concept, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tdconcepts.concepts import ConceptSpec
from tdconcepts.errors import BadType, import_extra

__all__ = ["concept_spec", "concepts_composite"]


def concepts_composite(concepts: ConceptSpec, shape: Iterable[int] = ()) -> Any:
    """A torchrl ``Composite`` with an entry for each concept, as ``concepts.split`` writes them.

    A binary concept is a ``Binary`` of one number, a categorical one a ``OneHot``, a continuous one an ``Unbounded``.

    Args:
        concepts: what to convert; its groups are not kept.
        shape: the batch, such as an environment's ``batch_size``.

    Raises:
        BadType: for anything else. MissingExtra: without torchrl.

    Examples:
        >>> from tdconcepts import rl
        >>> rl.concepts_composite(ConceptSpec(["wing", "colour"], [1, 3]), [2])["colour"].shape
        torch.Size([2, 3])
    """
    data = import_extra("torchrl.data", "rl")
    if not isinstance(concepts, ConceptSpec):
        raise BadType("not concepts", got=type(concepts).__name__, needed="a ConceptSpec")
    batch, leaves = tuple(shape), {}
    for name, kind, n in zip(concepts.names, concepts.kinds, concepts.cardinalities, strict=True):
        if kind == "binary":
            leaves[name] = data.Binary(1, shape=(*batch, 1), dtype=data.Unbounded().dtype)
        elif kind == "categorical":
            leaves[name] = data.OneHot(n, shape=(*batch, n), dtype=data.Unbounded().dtype)
        else:
            leaves[name] = data.Unbounded(shape=(*batch, n))
    return data.Composite(leaves, shape=batch)


def concept_spec(composite: Any) -> ConceptSpec:
    """The concepts that the entries of a torchrl ``Composite`` describe, in its order.

    A ``Binary`` of one number is a binary concept, a ``OneHot`` or a ``Categorical`` of n a categorical one, any other
    leaf of floats a continuous one. A nested ``Composite`` is a group, whose concepts are named ``"group.name"``.

    Args:
        composite: the spec to convert.

    Raises:
        BadType: for anything else, and a leaf that is none of these.
        MissingExtra: without torchrl.

    Examples:
        >>> from torchrl.data import Categorical, Composite, Unbounded
        >>> found = concept_spec(Composite(gear=Categorical(4), speed=Unbounded(1)))
        >>> found.names, found.cardinalities, found.kinds
        (('gear', 'speed'), (4, 1), ('categorical', 'continuous'))
    """
    data = import_extra("torchrl.data", "rl")
    if not isinstance(composite, data.Composite):
        raise BadType("not a spec of several entries", got=type(composite).__name__, needed="a torchrl Composite")
    found: list[tuple[str, int, str]] = []
    groups: dict[str, list[str]] = {}
    for name, leaf in composite.items():
        if isinstance(leaf, data.Composite):
            inner = concept_spec(leaf)
            names = [f"{name}.{one}" for one in inner.names]
            found += zip(names, inner.cardinalities, inner.kinds, strict=True)
            groups[name] = names
        else:
            found.append((name, *_leaf(name, leaf, len(composite.shape), data)))
    if not found:
        raise BadType("a spec without entries", got=repr(composite), needed="one entry or more")
    listed, cardinalities, kinds = zip(*found, strict=True)
    return ConceptSpec(listed, cardinalities, kinds, groups)


def _leaf(name: str, leaf: Any, batch_dims: int, data: Any) -> tuple[int, str]:
    columns = math.prod(leaf.shape[batch_dims:])
    if isinstance(leaf, data.Binary):
        if columns == 1:
            return 1, "binary"
    elif isinstance(leaf, data.OneHot):
        if columns == leaf.space.n > 1:
            return columns, "categorical"
    elif isinstance(leaf, data.Categorical):
        if columns == 1 and leaf.space.n > 1:
            return int(leaf.space.n), "categorical"
    elif leaf.dtype.is_floating_point and columns:
        return columns, "continuous"
    needed = "a Binary of one number, a OneHot or a Categorical of one, or floats"
    raise BadType(f"the entry {name!r} is no concept", got=repr(leaf), needed=needed)
