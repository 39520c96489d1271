"""Spaces: what an entry of concepts holds, and how a label is written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.interventions.splice import Splice

__all__ = ["Space", "as_space", "check_range", "is_visible", "known_places", "spread", "to_logits", "written"]

Space: TypeAlias = Literal["probs", "logits", "onehot", "continuous"]

_SPACES = (None, "probs", "logits", "onehot", "continuous")
EPS = 1e-4
"""How far a probability is kept from 0 and 1 when it is written as a logit: 1 becomes logit(1 - 1e-4) = 9.21."""


def as_space(space: object) -> Space | None:
    """``space`` itself.

    Raises:
        BadValue: for one that is none.
    """
    if space not in _SPACES:
        raise BadValue("not a space", got=repr(space), needed='"probs", "logits", "onehot" or "continuous"')
    return space  # type: ignore[return-value]


def to_logits(probs: Tensor, cardinalities: Sequence[int] | None = None, eps: float = EPS) -> Tensor:
    """``probs [*B, C] -> logits [*B, C]`` that the sigmoid (binary) or softmax (categorical) takes back.

    ``logit(clamp(p, eps, 1 - eps))`` for a binary concept, ``log(max(p, eps))`` for the states of a categorical one.
    Computed in float32 at least: in bfloat16, ``1 - eps`` would be 1.

    Args:
        probs: ``[*B, C]``, in [0, 1].
        cardinalities: of the concepts, 1 for binary, n for n states. Default: all binary.
        eps: how far a probability is kept from 0 and 1.

    Examples:
        >>> to_logits(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-9.21...,  0.0000,  9.21...])
    """
    wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
    binary = wide.clamp(eps, 1 - eps).logit()
    if cardinalities is None or all(n == 1 for n in cardinalities):
        return binary.to(probs.dtype)
    is_binary = torch.tensor([n == 1 for n in cardinalities for _ in range(n)], device=probs.device)
    return torch.where(is_binary, binary, wide.clamp(min=eps).log()).to(probs.dtype)


def written(labels: Tensor, concepts: Tensor, splice: Splice, space: Space | None, what: str = "the labels") -> Tensor:
    """What stands for ``labels`` in an entry of this space, in the dtype of ``concepts [*B, C]``.

    A label is a probability for each column (0, 1, or soft in between), a state for each of K concepts (spread to
    one-hot columns), or the number itself for a continuous concept. Into ``"probs"`` it is written as it is, into
    ``"logits"`` as its logit, into ``"onehot"`` rounded to the most probable state, into ``"continuous"`` unchecked. A
    NaN, for "not known", stays NaN.

    Raises:
        BadValue: for another shape, for probabilities outside [0, 1], and for states that do not exist (these two are
            not checked under ``torch.compile`` and ``vmap``).

    Examples:
        >>> splice = Splice(cardinalities=(1, 2))
        >>> written(torch.tensor([1, 0]), torch.zeros(3), splice, "logits")
        tensor([ 9.21...,  0.0000, -9.21...])
        >>> written(torch.tensor([0.3, 0.4, 0.6]), torch.zeros(3), splice, "onehot")
        tensor([0., 0., 1.])
    """
    if not concepts.is_floating_point():  # which has no NaN, and is looked at where it is written
        concepts = concepts.new_zeros((), dtype=torch.float64).expand_as(concepts)
    columns = concepts.shape[-1]
    cardinalities = splice.cardinalities
    if space == "onehot" and cardinalities is None:
        cardinalities = (columns,)
    if cardinalities is not None and sum(cardinalities) == columns and len(cardinalities) < columns:
        labels = spread(labels, concepts, cardinalities, splice)
    if labels.shape != concepts.shape:
        fix = "labels.unsqueeze(-1)" if labels.shape == concepts.shape[:-1] and columns == 1 else None
        raise BadValue(
            "labels and concepts differ in shape", got=list(labels.shape), needed=list(concepts.shape), fix=fix
        )
    if space == "continuous":
        return labels.to(concepts)
    free = None if splice.continuous is None else torch.tensor(splice.continuous, device=labels.device)
    fixed = None if splice.continuous is None else [i for i, real in enumerate(splice.continuous) if not real]
    check_range(labels if fixed is None else labels[..., fixed], 0, 1, f"{what} are no probabilities")
    probs = labels.to(concepts)
    if space == "logits":
        result = to_logits(probs, cardinalities)
    elif space == "onehot" and labels.is_floating_point():
        result = _rounded(probs, cardinalities or ())
    else:
        return probs
    return result if free is None else torch.where(free, probs, result)


def spread(states: Tensor, concepts: Tensor, cardinalities: Sequence[int], splice: Splice | None = None) -> Tensor:
    """``states [*B, K]`` (``[*B]`` for one concept) to columns ``[*B, C]``; what has C columns already is left alone.

    A binary concept's state is its label, a continuous one's its number; a state that is NaN makes NaN columns.

    Raises:
        BadValue: for another shape, or a state that does not exist.

    Examples:
        >>> spread(torch.tensor([1, 2]), torch.zeros(4), (1, 3)).tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    if len(cardinalities) == 1 and states.shape == concepts.shape[:-1]:
        states = states.unsqueeze(-1)
    if states.shape == concepts.shape:
        return states
    if states.shape != (*concepts.shape[:-1], len(cardinalities)):
        needed = f"{[*concepts.shape[:-1], len(cardinalities)]} states or {list(concepts.shape)} columns"
        raise BadValue("labels and concepts differ in shape", got=list(states.shape), needed=needed)
    names = splice.names if splice is not None else None
    kinds = (splice.kinds if splice is not None else None) or ()
    parts = []
    for i, n in enumerate(cardinalities):
        state = states[..., i : i + 1]
        if not kinds or kinds[i] != "continuous":
            name = i if names is None else repr(names[i])
            check_range(state, 0, max(n - 1, 1), f"the states of concept {name} do not exist")
            if n > 1 and state.is_floating_point():
                check_range((state - state.round()).abs(), 0, 0, f"the states of concept {name} are no whole numbers")
        block = state.to(concepts) if n == 1 else (state == torch.arange(n, device=state.device)).to(concepts)
        parts.append(torch.where(state.isnan(), torch.nan, block) if state.is_floating_point() else block)
    return torch.cat(parts, dim=-1)


def check_range(labels: Tensor, low: int, high: int, what: str) -> bool:
    """Refuse numbers outside ``[low, high]`` (NaN passes), where the numbers can be looked at.

    Returns:
        whether none of them is NaN, as far as can be seen.

    Raises:
        BadValue: with the range that was found.
    """
    if low == 0 and high == 1 and _are_probabilities(labels):
        return True
    if labels.dtype is torch.bool or not labels.numel():
        return True
    if not is_visible(labels):
        return False
    labels = labels.detach() if labels.requires_grad else labels
    lowest, highest = labels.aminmax()
    least, most = lowest.item(), highest.item()
    complete = least == least
    if not complete:
        known = labels[~labels.isnan()]
        if not known.numel():
            return False
        least, most = float(known.min()), float(known.max())
    if least < low or most > high:
        raise BadValue(what, got=f"{least:g} to {most:g}", needed=f"{low} to {high}")
    return complete


_ONE: dict[torch.dtype, tuple[Any, int]] = {
    torch.float32: (np.uint32, 0x3F800000),
    torch.float64: (np.uint64, 0x3FF0000000000000),
}
"""A number without a sign of the same size, and what the bits of 1.0 are then."""


def _are_probabilities(labels: Tensor) -> bool:
    """Whether all are seen to be in [0, 1], none NaN, in less time than the smallest and the largest number take.

    The bits of numbers from 0 to 1 are in the order of the numbers, and those of all others, NaN too, are above.
    """
    kind = _ONE.get(labels.dtype)
    if kind is None or type(labels) is not Tensor or not (labels.is_cpu and labels.numel() and _is_at_hand()):
        return False
    labels = labels.resolve_neg().detach() if labels.requires_grad or labels.is_neg() else labels
    return int(np.maximum.reduce(labels.numpy().view(kind[0]), None)) <= kind[1]


def _is_at_hand() -> bool:
    """Whether numpy can read a tensor: nothing is traced, mapped or derived by ``torch.func``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None


def known_places(value: Tensor) -> Tensor | None:
    """Where there is a value, bool as ``value``; None where there is one everywhere, and that can be seen."""
    if not value.is_floating_point():
        return None
    if is_visible(value):
        total = float(value.detach().sum())  # NaN if there is one; of an infinity and its opposite too
        if total == total:
            return None
    return value == value  # False for NaN; of isnan the compiler makes a loop of single numbers


def is_visible(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: it is not traced, not mapped, and not of a ``torch.func`` derivative."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _rounded(probs: Tensor, cardinalities: Sequence[int]) -> Tensor:
    """The most probable state of each concept, one-hot; NaN stays."""
    parts = []
    for part, n in zip(probs.split(list(cardinalities), dim=-1), cardinalities, strict=True):
        hard = part >= 0.5 if n == 1 else part.argmax(-1, keepdim=True) == torch.arange(n, device=part.device)
        parts.append(torch.where(part.isnan(), torch.nan, hard.to(part)))
    return torch.cat(parts, dim=-1)
