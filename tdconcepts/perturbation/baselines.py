"""What is put in the place of a feature that is taken away: a number, a tensor, an entry, a blur, a mean, rows."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import BASELINE, NestedKey, as_key, join, key_text

__all__ = ["Baseline", "Baselines", "Blur", "Mean", "background", "check_baselines", "group_of", "start"]

Baseline: TypeAlias = float | Tensor | NestedKey | Callable[[Tensor, int], Tensor] | None
Baselines: TypeAlias = Baseline | TensorDictBase | Mapping[NestedKey, Baseline]


@dataclasses.dataclass(frozen=True)
class Blur:
    """The row itself, blurred by a Gaussian over its last dims; its border is repeated.

    Args:
        sigma: the standard deviation in elements.
        dims: how many of the last dims, 2 for images and 1 for series.

    Raises:
        BadValue: a sigma that is not positive, or no number of dims; at the call, a row with fewer dims.

    Examples:
        >>> Blur(2.0)(torch.ones(3, 1, 5, 5), 1).sub(1).abs().max() < 1e-6
        tensor(True)
    """

    sigma: float = 3.0
    dims: int = 2

    def __post_init__(self) -> None:
        dims = type(self.dims) is int and self.dims >= 1
        if not (isinstance(self.sigma, (int, float)) and 0 < self.sigma < math.inf and dims):
            raise BadValue("not a blur", got=repr(self), needed="a finite sigma > 0 and one dim or more")

    def __call__(self, value: Tensor, lead: int) -> Tensor:
        if value.ndim - lead < self.dims:
            got = f"rows of shape {list(value.shape[lead:])}"
            raise BadValue(f"{self} needs {self.dims} dims in a row", got=got, fix="dims=1 for series")
        if not value.is_floating_point():
            return _rounded(self(value.double(), lead), value)
        for dim in range(value.ndim - self.dims, value.ndim):
            at = torch.arange(value.shape[dim], device=value.device)
            weights = torch.zeros(len(at), len(at), dtype=torch.float64, device=value.device)
            reach = math.ceil(4 * self.sigma)
            for shift in range(-reach, reach + 1):  # a border that is repeated: far positions are the last element
                column = (at + shift).clamp(0, len(at) - 1).unsqueeze(-1)
                weights.scatter_add_(
                    1, column, torch.full_like(column, math.exp(-0.5 * (shift / self.sigma) ** 2), dtype=torch.float64)
                )
            weights = (weights / weights.sum(-1, keepdim=True)).to(value.dtype)
            value = torch.tensordot(value, weights, ([dim], [1])).movedim(-1, dim)
        return value


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of the row over some of its dims.

    Args:
        dims: a dim of a *row*, without the batch dims, or several; default: all of them.

    Raises:
        BadValue: what is no dim; at the call, a dim that the row does not have.

    Examples:
        >>> Mean()(torch.tensor([[1.0, 3.0]]), 1)
        tensor([[2., 2.]])
    """

    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        dims = self.dims if self.dims is None or isinstance(self.dims, (tuple, list)) else (self.dims,)
        if dims is not None and not all(type(dim) is int for dim in dims):
            raise BadValue("not dims", got=f"dims={self.dims!r}", needed="ints, or None for all dims of a row")
        object.__setattr__(self, "dims", None if dims is None else tuple(dims))

    def __call__(self, value: Tensor, lead: int) -> Tensor:
        count = value.ndim - lead
        dims = range(count) if self.dims is None else self.dims
        if not count:
            return value
        if any(not -count <= dim < count for dim in dims):
            raise BadValue(
                "a row has no such dim", got=repr(self), needed=f"dims of rows of shape {list(value.shape[lead:])}"
            )
        if not value.is_floating_point():
            return _rounded(self(value.double(), lead), value)
        return value.mean([lead + dim % count for dim in dims], keepdim=True).expand(value.shape)


def _rounded(found: Tensor, value: Tensor) -> Tensor:
    return found.round().to(value.dtype)  # of images of whole numbers


def accepts(one: object, count: int) -> bool:
    """Whether ``one`` can be called with ``count`` arguments, as far as it tells."""
    if not callable(one):
        return False
    try:
        inspect.signature(one).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def check_baselines(baselines: Baselines, names: list[NestedKey]) -> None:
    """Raise for a baseline that is none, or that belongs to nothing that is explained."""
    if isinstance(baselines, TensorDictBase):
        if baselines.batch_dims != 1 or not baselines.numel():
            got, needed = f"batch size {list(baselines.batch_size)}", "a TensorDict of rows, batch size [M]"
            raise BadValue("not rows of a baseline", got=got, needed=needed)
        for name in names:
            if baselines.get(name) is None:
                have = list(baselines.keys(True, True))
                raise BadKey(f"no entry {key_text(name)} in the rows of the baseline", got=f"entries {have}")
        return
    if isinstance(baselines, Mapping):
        for name, one in baselines.items():
            if name not in names:
                got, needed = repr(name), nearest(name, names)
                raise BadKey(f"a baseline for {name!r}, which is not explained", got=got, needed=needed)
            _check(one)
        return
    _check(baselines)


def group_of(baselines: Baselines, name: NestedKey) -> tuple[NestedKey | None, bool]:
    """The entry that holds the baseline of ``name``, if one may, and whether it has to be there."""
    one = _of(baselines, name)
    if one is None:
        return as_key(join(BASELINE, name)), False
    return (as_key(join(one, name)), True) if isinstance(one, (str, tuple)) else (None, False)


def start(baselines: Baselines, name: NestedKey, end: Tensor, td: TensorDictBase) -> Tensor:
    """The baseline of one entry or site, in the shape of its value ``end``.

    Raises:
        BadKey: an entry that is not there. BadValue: another shape, NaN, or a fraction for an integer entry.
        BadType: a callable that makes no tensor.
    """
    one, lead = _of(baselines, name), td.batch_dims
    if one is None or isinstance(one, (str, tuple)):
        group, needed = (BASELINE, False) if one is None else (one, True)
        held = td.get(group)
        given = held.get(name) if isinstance(held, TensorDictBase) else None
        if given is None and needed:
            raise BadKey(f"no baseline for {key_text(name)}", got=f"no entry {key_text(join(group, name))}")
        if given is None:
            return torch.zeros_like(end)
        return _expanded(given.reshape(*given.shape, *[1] * (end.ndim - given.ndim)), end, name)
    if callable(one) and not isinstance(one, Tensor):
        made = one(end, lead)
        if not isinstance(made, Tensor):
            got = f"{made!r} from {one!r}"
            raise BadType(f"not a baseline of {key_text(name)}", got=got, needed="a tensor in the shape of the value")
        return _expanded(made, end, name)
    return _expanded(torch.as_tensor(one), end, name)


def background(baselines: Baselines, name: NestedKey, end: Tensor, lead: int) -> Tensor | None:
    """The rows ``[M, *row]`` that stand in for an entry one after the other, where the baseline is a TensorDict."""
    if not isinstance(baselines, TensorDictBase):
        return None
    rows = baselines.get(name)
    row = end.shape[lead:]
    if rows.shape[1:] != row:
        needed = f"[{len(rows)}, *{list(row)}]"
        raise BadValue(f"the rows for {key_text(name)} have another shape", got=f"{list(rows.shape)}", needed=needed)
    return _cast(rows, end, name)


def _of(baselines: Any, name: NestedKey) -> Any:
    if isinstance(baselines, Mapping) and not isinstance(baselines, TensorDictBase):
        return baselines.get(name)
    return baselines


def _expanded(given: Tensor, end: Tensor, name: NestedKey) -> Tensor:
    try:
        return _cast(given, end, name).expand(end.shape)
    except RuntimeError:
        needed = f"a shape that broadcasts to {list(end.shape)}"
        raise BadValue(
            f"the baseline of {key_text(name)} has another shape", got=f"{list(given.shape)}", needed=needed
        ) from None


def _cast(given: Tensor, end: Tensor, name: NestedKey) -> Tensor:
    """``given`` as ``end``; on a GPU, and while compiling, it is not looked at."""
    looked = given.is_cpu and given.is_floating_point() and not torch.compiler.is_compiling()
    if looked and torch._C._functorch.maybe_current_level() is None:
        if bool(given.isnan().any()):
            raise BadValue(f"the baseline of {key_text(name)} is not a number", got="NaN", needed="numbers")
        if not (end.is_floating_point() or end.is_complex()) and bool((given != given.round()).any()):
            got, needed = "fractions", f"whole numbers, as the entry's {end.dtype}"
            raise BadValue(f"the baseline of {key_text(name)} would be rounded", got=got, needed=needed)
    return given.to(device=end.device, dtype=end.dtype)


def _check(one: object) -> None:
    if one is None or isinstance(one, Tensor) or accepts(one, 2):
        return
    if isinstance(one, (str, tuple)):
        as_key(one)
        return
    if not (isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one)):
        raise BadType(
            "not a baseline",
            got=repr(one),
            needed="a finite number, a tensor in the shape of a row, a key, a callable (value, batch_dims), or None",
            fix="Blur(), Mean(), or a TensorDict of rows to average over",
        )
