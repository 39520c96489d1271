"""Rankings: exactly so many of each row, the highest scores first, ties by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["affordable_mask", "counted_mask", "prepare", "top_mask"]

_NUMPY = (torch.float32, torch.float64, torch.int32, torch.int64)
_FEW = 8
"""Up to so many columns a graph compares in pairs."""
_FEWEST = 4
"""Up to so many columns kthvalue takes no longer than numpy's partition."""


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
    if score.requires_grad:
        score = score.detach()
    if torch.compiler.is_compiling() and n <= _FEW:
        return _paired_mask(score, k)
    if torch.compiler.is_compiling() and _OPERATIONS and score.device.type == "cpu":
        return torch.ops.tdconcepts.top_mask(score, k)
    return _top_mask(score, k)


def prepare() -> None:
    """Make the ranking one operation for ``torch.compile`` on a CPU: a graph can't hold numpy's partition, an op can.

    Done when the first selection is built, not when this module is imported.
    """
    if _OPERATIONS or torch.compiler.is_compiling():
        return
    for name, function, dtype in (("top_mask", _top_mask, torch.bool), ("top_bytes", _top_bytes, torch.uint8)):
        _OPERATIONS.append(_operation(name, function, dtype))


_OPERATIONS: list[Any] = []


def _operation(name: str, function: Callable[[Tensor, int], Tensor], dtype: torch.dtype) -> Any:
    schema = "(Tensor score, int k) -> Tensor"
    operation = torch.library.custom_op(f"tdconcepts::{name}", function, mutates_args=(), schema=schema)
    operation.register_fake(lambda score, k: torch.empty_like(score, dtype=dtype))
    operation.register_vmap(lambda info, dims, score, k: (operation(score.movedim(dims[0], 0), k), 0))
    return operation


def _top_bytes(score: Tensor, k: int) -> Tensor:
    """The mask as bytes, which a compiled loop reads sixteen at a time, and bools one by one."""
    return _top_mask(score, k).view(torch.uint8)


def _paired_mask(score: Tensor, k: int) -> Tensor:
    """The same by comparing each pair of columns, which the compiler makes one loop of, with what is around it."""
    if score.is_floating_point():
        score = torch.where(score == score, score.clamp(torch.finfo(score.dtype).min), -torch.inf)
    own, other = score.unsqueeze(-1), score.unsqueeze(-2)
    earlier = torch.ones(score.shape[-1:] * 2, dtype=torch.bool, device=score.device).tril(-1)
    return torch.where(earlier, other >= own, other > own).sum(-1) < k


def _top_mask(score: Tensor, k: int) -> Tensor:
    n = score.shape[-1]
    if score.is_floating_point():
        score = score.nan_to_num(-torch.inf, torch.inf, torch.finfo(score.dtype).min)
    elif score.dtype is torch.bool:
        score = score.to(torch.uint8)
    if _is_plain(score):  # numpy's vectorised partition takes a sixth of the time of kthvalue, which branches
        if n > _FEWEST:
            least = torch.from_numpy(np.partition(score.numpy(), n - k, axis=-1)[..., n - k : n - k + 1])
        else:
            least = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
        reached = score >= least
        if np.count_nonzero(reached.numpy()) == k * (reached.numel() // n):
            return reached
    else:
        least = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, tied = score > least, score == least
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def counted_mask(score: Tensor, allowed: Tensor, counts: Tensor | int) -> Tensor:
    """True at the ``counts`` highest scores of each row among those allowed; all of these where they are fewer.

    Args:
        score: ``[*B, n]``.
        allowed: ``[*B, n]``, bool.
        counts: a number, or one for each row ``[*B]``.

    Examples:
        >>> score, allowed = torch.tensor([[3.0, 1.0, 2.0]] * 2), torch.tensor([[False, True, True], [True] * 3])
        >>> counted_mask(score, allowed, torch.tensor([1, 2])).int().tolist()
        [[0, 0, 1], [1, 0, 1]]
    """
    if isinstance(counts, int):
        ranked, k = _ranked(score, allowed), min(counts, score.shape[-1])
        in_graph = torch.compiler.is_compiling() and _OPERATIONS and score.device.type == "cpu"
        if in_graph and score.shape[-1] > _FEW and 0 < k < score.shape[-1]:
            return (torch.ops.tdconcepts.top_bytes(ranked, k).to(torch.int32) > 0) & allowed
        return top_mask(ranked, k) & allowed
    return (_order(score, allowed).argsort(-1) < counts.unsqueeze(-1)) & allowed


def affordable_mask(score: Tensor, allowed: Tensor, costs: Tensor, left: Tensor) -> Tensor:
    """Of each row, by falling score, every concept that can still be paid for: one that can't is passed over.

    Args:
        score: ``[*B, n]``.
        allowed: ``[*B, n]``, bool.
        costs: ``[n]``, not negative.
        left: the budget of each row, ``[*B]``.

    Examples:
        >>> score = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> costs = torch.tensor([2.0, 5.0, 1.0, 1.0])
        >>> affordable_mask(score, score > 0, costs, torch.tensor(3.0)).int().tolist()
        [1, 0, 1, 0]
    """
    order = _order(score, allowed)
    prices = costs.to(score.device, torch.float64)[order]
    open_, left = allowed.gather(-1, order), left.to(score.device, torch.float64)
    slack = 1e-9 * left.abs()  # 0.1 + 0.1 + 0.1 is affordable with 0.3
    taken = []
    for place in range(score.shape[-1]):
        takes = open_[..., place] & (prices[..., place] <= left + slack)
        left = left - torch.where(takes, prices[..., place], 0.0)
        taken.append(takes)
    if not taken:
        return allowed
    return torch.stack(taken, dim=-1).gather(-1, order.argsort(-1))


def _order(score: Tensor, allowed: Tensor) -> Tensor:
    """The indices by falling score, ties by index, NaN behind, what is not allowed at the very end."""
    return _ranked(score, allowed).argsort(dim=-1, descending=True, stable=True)


def _ranked(score: Tensor, allowed: Tensor) -> Tensor:
    """Finite scores, of which the lowest stands for NaN, and minus infinity for what is not allowed."""
    score = score.detach()
    if not score.is_floating_point():
        score = score.double()
    least, high, eps = torch.finfo(score.dtype).min, torch.finfo(score.dtype).max, torch.finfo(score.dtype).eps
    nan, low = least * (1 - eps), least * (1 - 2 * eps)
    if torch.compiler.is_compiling():  # which makes a loop of single numbers of nan_to_num
        finite = torch.where(score == score, score.clamp(low, high), nan)
    else:
        finite = score.nan_to_num(nan, high, low)
    return torch.where(allowed, finite, -torch.inf)


def _is_plain(score: Tensor) -> bool:
    """Whether the numbers are at hand: in main memory, in a type of numpy's, not traced and not mapped."""
    if type(score) is not Tensor or not score.is_cpu or torch.compiler.is_compiling():
        return False
    return score.dtype in _NUMPY and torch._C._functorch.maybe_current_level() is None
