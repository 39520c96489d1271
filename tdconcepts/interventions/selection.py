"""The selection of concepts: how many of them in each row, of which, the highest scores first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.interventions.draws import check_generator
from tdconcepts.interventions.ranking import affordable_mask, counted_mask, prepare, top_mask
from tdconcepts.interventions.spaces import known_places
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import read_block, write
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["SelectStage", "Selection", "top_mask"]


class Selection(TypedDict, total=False):
    """How many concepts are replaced, and which may be.

    At most one of ``fraction``, ``k``, ``budget`` and ``probability``; default: all candidates.

    Args:
        fraction: the share of the candidates to replace in each row, in [0, 1]: ``round(fraction * n)`` of n (Python's
            ``round``: halves go to the even number).
        k: their number instead.
        budget: what may be spent in each row: by falling score, every concept that can still be paid for.
        cost: for a budget, what each concept costs: a list in their order, or by name. Default: 1 each.
        probability: each candidate is replaced with this probability, whatever its score: a number, or a list with one
            for each concept (RandInt). Drawn anew for every row and at every call.
        generator: where these draws come from. Default: the global one.
        among: the candidates, by the names of concepts and groups, or by index. Default: all.
        candidates: an entry, bool ``[*B, K]`` or ``[*B, C]``, that says for each row which may be replaced. A fraction
            is then one of the row's own candidates.
        by: ``"concept"`` (default), or ``"group"``: the concepts of a group are scored, paid for and replaced together.
        only_training: whether nothing is replaced in evaluation mode.

    Examples:
        >>> select: Selection = {"k": 2, "among": [0, 3]}
        >>> SelectStage(Splice(), **select)(torch.tensor([0.1, 0.9, 0.7, 0.8])).tolist()
        [True, False, False, True]
    """

    fraction: float | None
    k: int | None
    budget: float | None
    cost: Sequence[float] | Mapping[str, float] | None
    probability: float | Sequence[float] | None
    generator: torch.Generator | None
    among: Sequence[str | int] | None
    candidates: NestedKey | None
    by: Literal["concept", "group"]
    only_training: bool


class SelectStage(TensorDictModuleBase):
    """Chooses exactly so many concepts in each row: those with the highest scores, ties by index, NaN last.

    ==========  ==========================================================  ==========================
    reads       ``("intervention", "score")``                               ``[*B, C]``
    reads       ``candidates``, if given                                    ``[*B, K]`` or ``[*B, C]``
    reads       with ``missing``: ``("intervention", "value")``             ``[*B, C]``
    writes      ``("intervention", "mask")``                                ``[*B, C]``, bool
    ==========  ==========================================================  ==========================

    The columns of a categorical concept are chosen together; its score is the largest of its columns. So are those of a
    group with ``by="group"``.

    Args:
        splice: where the intervention sits.
        missing: whether a NaN value, for "not known", rules a concept out in that row; the next in line is taken.
        select: see :class:`Selection`.

    Raises:
        BadValue: for a fraction or probability outside [0, 1], a negative k or one above the number of candidates, two
            of these at once, an empty or repeated ``among``, an index out of range.
        BadKey: for an unknown name, with the nearest ones, and a ``candidates`` entry that is missing.

    Examples:
        >>> select = SelectStage(Splice(), k=2)
        >>> select(torch.tensor([0.1, 0.7, 0.7, 0.7])).tolist()
        [False, True, True, False]
        >>> SelectStage(Splice(), budget=2, cost=[1, 5, 1, 1])(torch.tensor([0.1, 0.9, 0.7, 0.8])).tolist()
        [False, False, True, True]
    """

    def __init__(self, splice: Splice, *, missing: bool = False, **select: Unpack[Selection]) -> None:
        super().__init__()
        prepare()
        unknown = sorted(set(select) - set(Selection.__annotations__))
        if unknown:
            fix = nearest(unknown[0], Selection.__annotations__)
            raise BadType(f"no option {unknown[0]!r}", got=unknown, needed=fix)
        said = {name: select.get(name) for name in ("fraction", "k", "budget", "probability")}
        said = {name: value for name, value in said.items() if value is not None}
        if len(said) > 1:
            got = " and ".join(f"{name}={value!r}" for name, value in said.items())
            raise BadValue("how many is said twice", got=got, needed="one of them")
        self.fraction = 1.0 if said.get("fraction") is None else _check_fraction(said["fraction"])
        self.k = _check_k(said.get("k"))
        names, owner, self._count = _units(splice, select.get("by") or "concept")
        groups = {} if select.get("by") == "group" else dict(splice.groups)
        among = select.get("among")
        chosen = None if among is None else _as_indices(among, names, groups, self._count)
        self._columns, self._last = splice.columns, -1 if chosen is None else max(chosen)
        self.register_buffer("_among", None if chosen is None else torch.tensor(chosen), persistent=False)
        self.register_buffer("_owner", None if owner is None else torch.tensor(owner), persistent=False)
        known = len(chosen) if chosen is not None else self._count
        if known is not None:
            self._number(known)
        self.budget = _check_budget(said.get("budget"))
        costs = _as_costs(select.get("cost"), names, self._count, self.budget)
        self._costs, self._chance = costs, _as_chance(said.get("probability"), self._count)  # no buffers: .half()
        self.generator = check_generator(select.get("generator"))
        if self.generator is not None and self._chance is None:
            needed = "probability=; a RandomPolicy has a generator of its own"
            raise BadValue("nothing is drawn here", got="generator=", needed=needed)
        self.only_training = bool(select.get("only_training"))
        candidates = select.get("candidates")
        self.candidates = None if candidates is None else as_key(candidates)
        self.missing = missing
        self.is_exact = self._costs is None and self._chance is None and self.candidates is None
        self._is_plain = self.is_exact and owner is None and chosen is None and not self.only_training
        self._keys = splice.key("score"), splice.key("mask"), splice.key("value")
        reads: list[NestedKey | None] = [self._keys[0], self.candidates, self._keys[2] if missing else None]
        self.in_keys, self.out_keys = [key for key in reads if key is not None], [self._keys[1]]

    @property
    def is_off(self) -> bool:
        """Whether nothing is replaced at all, for want of training mode."""
        return self.only_training and not self.training

    def is_everything(self, columns: int) -> bool:
        """Whether all of so many columns are replaced in every row, whatever their scores."""
        return self._is_plain and self._columns in (None, columns) and self._number(columns) == columns

    @property
    def is_random(self) -> bool:
        """Whether concepts are drawn, whatever their score."""
        return self._chance is not None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        prepare()  # in the process that it comes to

    def mask(self, score: Tensor, candidates: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """``score [*B, C] -> mask [*B, C]``, True where the value is to be replaced.

        Args:
            score: high = first.
            candidates: which may be replaced, bool ``[*B, C]`` or ``[*B, K]``.
            known: where there is a value, bool ``[*B, C]``; a concept needs one in all of its columns.
        """
        if self._is_plain and candidates is None and known is None and self._columns in (None, score.shape[-1]):
            return top_mask(score, self._number(score.shape[-1]))
        if self.is_off:
            return torch.zeros_like(score, dtype=torch.bool)
        units = self.units(score)
        if not self.is_exact or candidates is not None or known is not None:
            allowed, counts = self.allowed(units, candidates, known)
            if self._chance is not None:
                return self.columns(self._drawn(units) & allowed)
            if self._costs is not None:
                left = torch.full(units.shape[:-1], self.budget or 0.0, dtype=torch.float64, device=units.device)
                return self.columns(affordable_mask(units, allowed, self.costs(units), left))
            if isinstance(counts, int) and counts == (units.shape[-1] if self._among is None else len(self._among)):
                return self.columns(allowed)  # all that may be: no ranking
            return self.columns(counted_mask(units, allowed, counts))
        if self._among is None:
            return self.columns(top_mask(units, self._number(units.shape[-1])))
        among = self._among.to(score.device)
        part = top_mask(units.index_select(-1, among), self._number(len(among)))
        return self.columns(torch.zeros_like(units, dtype=torch.bool).index_copy(-1, among, part))

    def units(self, score: Tensor) -> Tensor:
        """``[*B, C]`` to one score for each concept (or group) ``[*B, K]``: the largest of its columns."""
        if self._columns not in (None, score.shape[-1]):
            got, needed = f"a score {list(score.shape)}", f"[*B, {self._columns}], as concepts= says"
            fix = "ConceptSpec(names, cardinalities=...), or a score for each column"
            raise BadValue("the score is not one of these concepts", got=got, needed=needed, fix=fix)
        if self._last >= score.shape[-1]:
            got, needed = f"index {self._last}", f"below {score.shape[-1]}"
            raise BadValue("a candidate is out of range", got=got, needed=needed)
        if self._owner is None or self._count is None:
            return score
        score = score if score.is_floating_point() else score.double()
        lowest = score.new_full((*score.shape[:-1], self._count), -torch.inf)
        return lowest.scatter_reduce(-1, self._owner.to(score.device).expand(score.shape), score, "amax")

    def columns(self, chosen: Tensor) -> Tensor:
        """``[*B, K]`` to ``[*B, C]``."""
        return chosen if self._owner is None else chosen.index_select(-1, self._owner.to(chosen.device))

    def allowed(self, units: Tensor, candidates: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Which of the units ``[*B, K]`` may be replaced, and how many in each row (a number, or ``[*B]``)."""
        n = units.shape[-1]
        allowed = torch.ones_like(units, dtype=torch.bool)
        if self._among is not None:
            row = torch.zeros(n, dtype=torch.bool, device=units.device).index_fill(
                0, self._among.to(units.device), True
            )
            allowed = allowed & row
        counts: Tensor | int = self._number(n if self._among is None else len(self._among))
        if candidates is not None:
            allowed = allowed & self._all_of(candidates, units, "the candidates")
            if self.k is None:
                counts = (allowed.sum(-1).double() * self.fraction).round().long()  # halves go to the even number
        if known is not None:
            allowed = allowed & self._all_of(known, units, "what is known")
        return allowed, counts

    def costs(self, units: Tensor) -> Tensor:
        """What each of the units ``[*B, K]`` costs, ``[K]``."""
        assert self._costs is not None
        if self._costs.shape[0] not in (1, units.shape[-1]):
            got = f"{self._costs.shape[0]} costs"
            raise BadValue("costs and concepts differ in number", got=got, needed=f"{units.shape[-1]}")
        return self._costs.to(units.device).expand(units.shape[-1])

    def read(self, tensordict: TensorDictBase) -> Tensor | None:
        """The entry that says for each row which concepts are candidates."""
        if self.candidates is None:
            return None
        block = read_block(tensordict, self.candidates)
        if block.dtype is not torch.bool:
            got, needed = f"{key_text(self.candidates)} of {block.dtype}", "True where a concept may be replaced"
            raise BadType("candidates are bool", got=got, needed=needed)
        return block

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        score = read_block(tensordict, self._keys[0])
        known = known_places(read_block(tensordict, self._keys[2])) if self.missing else None
        return write(tensordict, self._keys[1], self.mask(score, self.read(tensordict), known))

    def _all_of(self, block: Tensor, units: Tensor, what: str) -> Tensor:
        """A bool block for the units ``[*B, K]``, from one of them or of their columns."""
        if block.shape == units.shape:
            return block
        if self._owner is None or block.shape != (*units.shape[:-1], len(self._owner)):
            width = "K" if self._owner is None else f"{units.shape[-1]} or {len(self._owner)}"
            needed = f"{list(units.shape[:-1])} and {width} more"
            raise BadValue(f"{what} differ in shape from the concepts", got=list(block.shape), needed=needed)
        most = torch.ones_like(units, dtype=torch.uint8)
        owner = self._owner.to(block.device).expand(block.shape)
        return most.scatter_reduce(-1, owner, block.to(torch.uint8), "amin").bool()

    def _drawn(self, units: Tensor) -> Tensor:
        source = units.device if self.generator is None else self.generator.device
        draws = torch.rand(units.shape, generator=self.generator, device=source).to(units.device)
        chance = self._chance
        if chance is None or (chance.ndim and chance.shape[0] != units.shape[-1]):
            got = f"{0 if chance is None else len(chance)} probabilities"
            raise BadValue("probabilities and concepts differ in number", got=got, needed=units.shape[-1])
        return draws < chance.to(draws)

    def _number(self, candidates: int) -> int:
        if self.k is None:
            return round(self.fraction * candidates)
        if self.k > candidates:
            raise BadValue("k is above the number of candidates", got=f"k={self.k}", needed=f"0 to {candidates}")
        return self.k


def _units(splice: Splice, by: object) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None, int | None]:
    """What is chosen whole: names, the unit of each column (None where unit i is column i), and their number."""
    count = None if splice.cardinalities is None else len(splice.cardinalities)
    if by == "concept":
        return splice.names, splice.owner, count
    if by != "group":
        raise BadValue("not what concepts are chosen by", got=repr(by), needed='"concept" or "group"')
    if not splice.groups or splice.names is None or splice.cardinalities is None:
        raise BadValue("the concepts have no groups here", got='by="group"', needed="a ConceptSpec(..., groups=...)")
    of: dict[str, str] = {}
    for group, members in splice.groups:
        twice = [name for name in members if name in of]
        if twice:
            got = f"{twice[0]!r} in {of[twice[0]]!r} and {group!r}"
            raise BadValue("a concept is in two groups", got=got, needed='one, to be chosen by="group"')
        of.update(dict.fromkeys(members, group))
    names = list(dict.fromkeys(of.get(name, name) for name in splice.names))
    pairs = zip(splice.names, splice.cardinalities, strict=True)
    owner = tuple(names.index(of.get(name, name)) for name, n in pairs for _ in range(n))
    return tuple(names), owner, len(names)


def _check_fraction(fraction: object) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise BadValue(
            "fraction is out of range", got=repr(fraction), needed="a number in [0, 1]", fix="k= is a number"
        )
    return float(fraction)


def _check_k(k: object) -> int | None:
    if k is not None and (type(k) is not int or k < 0):
        raise BadValue(
            "k is no number of concepts", got=repr(k), needed="an int of 0 or more", fix="fraction= is a share"
        )
    return k


def _check_budget(budget: object) -> float | None:
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0):
        raise BadValue("not a budget", got=repr(budget), needed="a number of 0 or more, in units of the costs")
    return None if budget is None else float(budget)


def _as_costs(cost: Any, names: Sequence[str] | None, count: int | None, budget: float | None) -> Tensor | None:
    if budget is None:
        if cost is not None:
            raise BadValue("a cost without a budget", got=f"cost={cost!r}", needed="budget=")
        return None
    if isinstance(cost, Mapping):
        unknown = [name for name in cost if name not in (names or ())]
        absent = [name for name in names or () if name not in cost]
        if unknown or absent:
            needed = nearest(unknown[0], names or ()) if unknown else f"a cost for {absent[0]!r} as well"
            raise BadKey("costs are by the names of the concepts", got=list(cost), needed=needed)
        cost = [cost[name] for name in names or ()]
    numbers: list[Any] = [1.0] if cost is None else list(cost) if isinstance(cost, (Sequence, Tensor)) else [None]
    if not all(isinstance(n, (int, float, Tensor)) and float(n) >= 0 for n in numbers) or not numbers:
        raise BadValue("not the costs of concepts", got=repr(cost), needed="a number of 0 or more for each")
    if cost is not None and count not in (None, len(numbers)):
        raise BadValue("costs and concepts differ in number", got=f"{len(numbers)} costs", needed=f"{count}")
    return torch.tensor([float(n) for n in numbers], dtype=torch.float64)


def _as_chance(probability: Any, count: int | None) -> Tensor | None:
    if probability is None:
        return None
    one = not isinstance(probability, (Sequence, Tensor)) or (isinstance(probability, Tensor) and not probability.ndim)
    each = [probability] if one else list(probability)
    is_number = [isinstance(p, (int, float, Tensor)) and not isinstance(p, bool) for p in each]
    if not each or not all(is_number) or not all(0 <= float(p) <= 1 for p in each):
        raise BadValue("not a probability", got=repr(probability), needed="a number in [0, 1], or one for each concept")
    if not one and count not in (None, len(each)):
        got = f"{len(each)} probabilities"
        raise BadValue("probabilities and concepts differ in number", got=got, needed=f"{count}")
    return torch.tensor([float(p) for p in each]).squeeze(0) if one else torch.tensor([float(p) for p in each])


def _as_indices(
    among: object, names: Sequence[str] | None, groups: Mapping[str, Sequence[str]], count: int | None
) -> list[int]:
    listed = list(among) if isinstance(among, (Sequence, range)) and not isinstance(among, str) else None
    if not listed or not all(isinstance(item, str) or type(item) is int for item in listed):
        raise BadValue(
            "not the candidates", got=repr(among), needed='names or indices, at least one: ["wing"] or [0, 3]'
        )
    known = tuple(names or ())
    listed = [one for item in listed for one in (groups.get(item, (item,)) if isinstance(item, str) else (item,))]
    unknown = [item for item in listed if isinstance(item, str) and item not in known]
    if unknown and names is None:
        raise BadKey(
            "the concepts have no names here", got=repr(unknown), fix="pass concepts=ConceptSpec(names), or indices"
        )
    if unknown:
        raise BadKey(f"no concept {unknown[0]!r}", got=repr(listed), needed=nearest(unknown[0], [*known, *groups]))
    chosen = [known.index(item) if isinstance(item, str) else int(item) for item in listed]
    if min(chosen) < 0 or (count is not None and max(chosen) >= count):
        raise BadValue(
            "a candidate is out of range", got=repr(listed), needed=f"0 to {'C' if count is None else count} - 1"
        )
    if len(set(chosen)) < len(chosen):
        raise BadValue("a candidate is there twice", got=repr(listed), needed="each concept once")
    return sorted(chosen)  # ties go by the concept's index, whatever the order of the names
