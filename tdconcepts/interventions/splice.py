"""Where an intervention sits in a model, and what is known about the concepts there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from tensordict.nn import TensorDictModuleBase

from tdconcepts.errors import BadType
from tdconcepts.hooks import Site
from tdconcepts.keys import INTERVENTION, NestedKey, as_key, join

__all__ = ["Splice"]


class _About(TypedDict, total=False):
    """What may be known about the concepts."""

    names: tuple[str, ...] | None
    cardinalities: tuple[int, ...] | None
    kinds: tuple[str, ...] | None
    groups: tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True, init=False)
class Splice:
    """Where an intervention sits in a pipeline: what a policy or a strategy is bound to.

    Args:
        at: the entry with the concepts, ``[*B, C]``.
        rest: the stages that run after the one that writes ``at``.
        space: what the entry holds, ``"probs"``, ``"logits"``, ``"onehot"`` or ``"continuous"``, where it is known.
        out_key: the first name of the entries that the intervention writes.
        before: the stages up to the one that writes ``at``.
        site: where the concepts are an activation inside a module; ``rest`` is then the whole model.
        about: where they are known, the ``names`` of the concepts; their ``cardinalities``, 1 for binary, n for n
            states; their ``kinds``, ``"binary"``, ``"categorical"`` or ``"continuous"``; and ``groups``, names for sets
            of concepts, ``(("head", ("beak", "eye")),)``.

    Examples:
        >>> splice = Splice("concepts", names=("wing", "colour"), cardinalities=(1, 3))
        >>> splice.key("score"), splice.columns, splice.owner
        (('intervention', 'score'), 4, (0, 1, 1, 1))
    """

    at: NestedKey
    rest: tuple[TensorDictModuleBase, ...]
    space: str | None
    out_key: NestedKey
    before: tuple[TensorDictModuleBase, ...]
    site: Site | None
    names: tuple[str, ...] | None
    cardinalities: tuple[int, ...] | None
    kinds: tuple[str, ...] | None
    groups: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(
        self,
        at: NestedKey = "concepts",
        rest: tuple[TensorDictModuleBase, ...] = (),
        *,
        space: str | None = None,
        out_key: NestedKey = INTERVENTION,
        before: tuple[TensorDictModuleBase, ...] = (),
        site: Site | None = None,
        **about: Unpack[_About],
    ) -> None:
        sizes, kinds = about.get("cardinalities"), about.get("kinds")
        owner = tuple(i for i, n in enumerate(sizes or ()) for _ in range(n))
        mixed = "continuous" in (kinds or ()) and len(kinds or ()) == len(sizes or ())
        fields = {
            "at": as_key(at),
            "rest": rest,
            "space": space,
            "out_key": out_key,
            "before": before,
            "site": site,
            "names": about.get("names"),
            "cardinalities": sizes,
            "kinds": kinds,
            "groups": about.get("groups") or (),
            "_owner": owner if len(owner) > len(sizes or ()) else None,  # asked at every call
            "_continuous": tuple((kinds or ())[i] == "continuous" for i in owner) if mixed else None,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def described(cls, at: NestedKey, concepts: Any, space: str | None = None, **more: Any) -> Splice:
        """The splice at ``at`` with what ``concepts`` says: a ConceptSpec, a list of names of binary concepts, or None.

        Raises:
            BadType: for a description that is none.
        """
        if isinstance(concepts, (list, tuple)):
            names: Any = tuple(concepts)
            cardinalities: Any = (1,) * len(names)
        else:
            names, cardinalities = getattr(concepts, "names", None), getattr(concepts, "cardinalities", None)
        if concepts is not None and not (isinstance(names, tuple) and isinstance(cardinalities, tuple)):
            needed = "a ConceptSpec or a list of names"
            raise BadType("not a description of concepts", got=repr(concepts), needed=needed)
        groups = getattr(concepts, "groups", ())
        groups = tuple((k, tuple(v)) for k, v in (groups.items() if isinstance(groups, Mapping) else groups))
        kinds = getattr(concepts, "kinds", None) or None
        return cls(at, names=names, cardinalities=cardinalities, space=space, kinds=kinds, groups=groups, **more)

    def key(self, name: str) -> tuple[str, ...]:
        """The entry of one stage: ``("intervention", name)``."""
        return join(self.out_key, name)

    @property
    def columns(self) -> int | None:
        """C, where the cardinalities are known."""
        return None if self.cardinalities is None else sum(self.cardinalities)

    @property
    def owner(self) -> tuple[int, ...] | None:
        """The concept of each column where a concept has several, else None: then column i is concept i."""
        return self._owner  # type: ignore[attr-defined]

    @property
    def continuous(self) -> tuple[bool, ...] | None:
        """For each column whether its concept is continuous, where one of them is, else None."""
        return self._continuous  # type: ignore[attr-defined]

    def bare(self) -> Splice:
        """The same without the stages: those belong to the pipeline."""
        return dataclasses.replace(self, rest=(), before=())
