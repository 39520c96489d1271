"""The selection of concepts: exactly k of them in each row, the highest scores first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.interventions.stages import Splice, read_block, write

__all__ = ["SelectStage", "top_mask"]

_NUMPY = (torch.float32, torch.float64, torch.int32, torch.int64)


class SelectStage(TensorDictModuleBase):
    """Chooses exactly k concepts in each row: those with the highest scores, ties by index, NaN last.

    =======  ============================================  ==================
    reads    ``("intervention", "score")``                 ``[*B, C]``
    writes   ``("intervention", "mask")``                  ``[*B, C]``, bool
    =======  ============================================  ==================

    ``k`` is given, or ``round(fraction * n)`` of the n candidates (Python's ``round``: halves go to the even number).
    The columns of a categorical concept are chosen together; its score is the largest of its columns.

    Args:
        splice: where the intervention sits.
        fraction: of the candidates, in [0, 1]. Default, without ``k``: 1, so that all candidates are chosen.
        k: number of concepts.
        among: the candidates, by name or by index. Default: all concepts.

    Raises:
        BadValue: for a fraction outside [0, 1], a negative k or one above the number of candidates, both at once, an
            empty or repeated ``among``, an index out of range.
        BadKey: for an unknown name, with the nearest ones.

    Examples:
        >>> select = SelectStage(Splice(), k=2)
        >>> select(torch.tensor([0.1, 0.7, 0.7, 0.7])).tolist()
        [False, True, True, False]
    """

    def __init__(
        self,
        splice: Splice,
        *,
        fraction: float | None = None,
        k: int | None = None,
        among: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__()
        if fraction is not None and k is not None:
            raise BadValue("how many is said twice", got=f"fraction={fraction!r} and k={k!r}", needed="one of them")
        self.fraction = 1.0 if fraction is None else _check_fraction(fraction)
        self.k = _check_k(k)
        chosen = None if among is None else _as_indices(among, splice)
        owner = splice.owner
        self._count = None if splice.cardinalities is None else len(splice.cardinalities)
        self._columns, self._last = splice.columns, -1 if chosen is None else max(chosen)
        self.register_buffer("_among", None if chosen is None else torch.tensor(chosen), persistent=False)
        self.register_buffer("_owner", None if owner is None else torch.tensor(owner), persistent=False)
        known = len(chosen) if chosen is not None else self._count
        if known is not None:
            self._number(known)
        self._keys = splice.key("score"), splice.key("mask")
        self.in_keys, self.out_keys = [self._keys[0]], [self._keys[1]]

    def mask(self, score: Tensor) -> Tensor:
        """``score [*B, C] -> mask [*B, C]``, True where the value is to be replaced."""
        columns = score.shape[-1]
        if self._columns not in (None, columns):
            raise BadValue("not a score for these concepts", got=list(score.shape), needed=f"[*B, {self._columns}]")
        owner = None if self._owner is None else self._owner.to(score.device)
        if owner is not None and self._count is not None:
            lowest = score.new_full((*score.shape[:-1], self._count), -torch.inf)
            score = lowest.scatter_reduce(-1, owner.expand(score.shape), score, "amax")
        if self._among is None:
            chosen = top_mask(score, self._number(score.shape[-1]))
        else:
            if self._last >= score.shape[-1]:
                got, needed = f"index {self._last}", f"below {score.shape[-1]}"
                raise BadValue("a candidate is out of range", got=got, needed=needed)
            among = self._among.to(score.device)
            part = top_mask(score.index_select(-1, among), self._number(len(among)))
            chosen = torch.zeros_like(score, dtype=torch.bool).index_copy(-1, among, part)
        return chosen if owner is None else chosen.index_select(-1, owner)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return write(tensordict, self._keys[1], self.mask(read_block(tensordict, self._keys[0])))

    def _number(self, candidates: int) -> int:
        if self.k is None:
            return round(self.fraction * candidates)
        if self.k > candidates:
            raise BadValue("k is above the number of candidates", got=f"k={self.k}", needed=f"0 to {candidates}")
        return self.k


def top_mask(score: Tensor, k: int) -> Tensor:
    """True at the k highest scores of each row, ties broken by index, NaN ranked last.

    Args:
        score: ``[*B, n]``.
        k: 0 to n.

    Examples:
        >>> top_mask(torch.tensor([[3.0, 1.0, 3.0, 3.0], [float("nan"), 0.0, 2.0, 1.0]]), 2).int().tolist()
        [[1, 0, 1, 0], [0, 0, 1, 1]]
    """
    n = score.shape[-1]
    if k in (0, n):
        return torch.full_like(score, k > 0, dtype=torch.bool)
    if score.is_floating_point():
        score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    elif score.dtype is torch.bool:
        score = score.to(torch.uint8)
    if _is_plain(score):  # numpy's vectorised partition takes a sixth of the time of kthvalue, which branches
        least = torch.from_numpy(np.partition(score.detach().numpy(), n - k, axis=-1)[..., n - k : n - k + 1])
        reached = score >= least
        if int(reached.sum()) == k * (reached.numel() // n):
            return reached
    else:
        least = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, tied = score > least, score == least
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _is_plain(score: Tensor) -> bool:
    """Whether the numbers are at hand: in main memory, in a type of numpy's, not traced and not mapped."""
    if torch.compiler.is_compiling() or type(score) is not Tensor or score.device.type != "cpu":
        return False
    return score.dtype in _NUMPY and not torch._C._functorch.is_batchedtensor(score)


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


def _as_indices(among: object, splice: Splice) -> list[int]:
    listed = list(among) if isinstance(among, (Sequence, range)) and not isinstance(among, str) else None
    if not listed or not all(isinstance(item, str) or type(item) is int for item in listed):
        raise BadValue(
            "not the candidates", got=repr(among), needed='names or indices, at least one: ["wing"] or [0, 3]'
        )
    unknown = [item for item in listed if isinstance(item, str) and item not in (splice.names or ())]
    if unknown and splice.names is None:
        raise BadKey(
            "the concepts have no names here", got=repr(unknown), fix="pass concepts=ConceptSpec(names), or indices"
        )
    if unknown:
        raise BadKey(f"no concept {unknown[0]!r}", got=repr(listed), needed=nearest(unknown[0], splice.names or ()))
    chosen = [splice.names.index(item) if isinstance(item, str) and splice.names else int(item) for item in listed]
    count = None if splice.cardinalities is None else len(splice.cardinalities)
    if min(chosen) < 0 or (count is not None and max(chosen) >= count):
        raise BadValue(
            "a candidate is out of range", got=repr(listed), needed=f"0 to {'C' if count is None else count} - 1"
        )
    if len(set(chosen)) < len(chosen):
        raise BadValue("a candidate is there twice", got=repr(listed), needed="each concept once")
    return sorted(chosen)  # ties go by the concept's index, whatever the order of the names
