"""Edits: what a patch does to the value at a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Ablate", "Add", "Edit", "Replace", "Scale"]


class Edit:
    """What the ready-made edits share: they compare by value, and name the entries that they read.

    Any callable ``(value, td) -> value`` is an edit as well; give it an attribute ``in_keys`` if it reads entries.

    Examples:
        >>> @dataclasses.dataclass(frozen=True, eq=False)
        ... class Clip(Edit):  # one of your own; fields that are keys are read
        ...     most: float
        ...     def __call__(self, value, td):
        ...         return value.clamp(-self.most, self.most)
        >>> Clip(1.0)(torch.tensor([-3.0, 0.5]), None), Clip(1.0) == Clip(1.0)
        (tensor([-1.0000,  0.5000]), True)
    """

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that this edit reads."""
        return [v for v in vars(self).values() if isinstance(v, (str, tuple))]

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(mine, vars(other)[name]) for name, mine in vars(self).items())

    def __hash__(self) -> int:
        return hash(type(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put another value in place of the activation.

    Args:
        value: a number, a tensor of the site's shape or of one row's shape (with or without gradient, a parameter
            too), or the key of an entry, so that each row can have its own. It takes the site's dtype and device.

    Raises:
        BadValue: at the call, for another shape. BadKey: for a missing entry.

    Examples:
        >>> Replace(0.0)(torch.ones(2), None)
        tensor([0., 0.])
    """

    value: float | Tensor | NestedKey

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        return _operand(self.value, value, td, "Replace").expand(value.shape).clone()  # it may be changed in place


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a vector: ``value + scale * vector`` (steering).

    Args:
        vector: a number, a tensor of the site's shape or of one row's shape, or the key of an entry.
        scale: its factor, 1 by default.

    Raises:
        BadValue: at the call, for another shape. BadKey: for a missing entry.

    Examples:
        >>> Add(torch.tensor([1.0, -1.0]), scale=2.0)(torch.zeros(2), None)
        tensor([ 2., -2.])
    """

    vector: float | Tensor | NestedKey
    scale: float = 1.0

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        return value + self.scale * _operand(self.vector, value, td, "Add")


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply: ``factor * value``.

    Args:
        factor: a number, a tensor of the site's shape or of one row's shape, or the key of an entry.

    Raises:
        BadValue: at the call, for another shape. BadKey: for a missing entry.

    Examples:
        >>> Scale(0.5)(torch.ones(2), None)
        tensor([0.5000, 0.5000])
    """

    factor: float | Tensor | NestedKey

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        return value * _operand(self.factor, value, td, "Scale")


@dataclasses.dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Take units out: put zero, their mean, or an entry in their place.

    Args:
        units: positions along ``dim``; default: all of them.
        to: ``"zero"``; ``"mean"``, the mean over all other dims of the batch at hand, so that rows depend on each
            other; or the key of an entry that holds the values (a mean over a data set, another row's activation).
        dim: the dim of the units, -1 by default (features, tokens' channels); -3 for the channels of images.

    Raises:
        BadValue: at the call, for units that do not exist. BadKey: for a missing entry.

    Examples:
        >>> Ablate(units=[0, 2])(torch.ones(1, 3), None)
        tensor([[0., 1., 0.]])
    """

    units: Sequence[int] | None = None
    to: Literal["zero", "mean"] | NestedKey = "zero"
    dim: int = -1

    def __post_init__(self) -> None:
        if self.units is not None:
            units = [self.units] if isinstance(self.units, int) else list(self.units)
            if not all(type(unit) is int for unit in units):
                raise BadType("units are ints", got=repr(self.units), needed="a list of positions")
            object.__setattr__(self, "units", units)
        if self.to not in ("zero", "mean"):
            object.__setattr__(self, "to", as_key(self.to))

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entry that holds the values, if there is one."""
        return [] if self.to in ("zero", "mean") else [self.to]

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        lead = 0 if td is None else td.batch_dims if value.shape[: td.batch_dims] == td.batch_size else 1
        inside = -value.ndim <= self.dim < value.ndim and self.dim % value.ndim >= lead
        everything = self.units is None and self.to != "mean" and self.dim == -1  # also of a row that is one number
        if not inside and not everything:
            raise BadValue(
                "Ablate has no such dim here",
                got=f"dim={self.dim} of shape {list(value.shape)}, of which the first {lead} are the batch",
                needed="a dim of the row",
            )
        if self.to == "zero":
            new = torch.zeros_like(value)
        elif self.to == "mean":
            dim = self.dim % value.ndim
            others = [d for d in range(value.ndim) if d != dim]
            new = (value.mean(others, keepdim=True) if others else value).expand(value.shape)
        else:
            new = _operand(self.to, value, td, "Ablate").expand(value.shape)
        if self.units is None:
            return new.clone()  # the model may change it in place
        count = value.shape[self.dim]
        if any(not -count <= unit < count for unit in self.units):
            raise BadValue(
                "Ablate names units that do not exist", got=f"units={self.units}", needed=f"within [0, {count})"
            )
        chosen = torch.zeros(count, dtype=torch.bool, device=value.device)
        chosen[torch.tensor(self.units, dtype=torch.long, device=value.device)] = True
        return torch.where(chosen.view(-1, *[1] * (value.ndim - 1 - self.dim % value.ndim)), new, value)


def _operand(given: float | Tensor | NestedKey, value: Tensor, td: TensorDictBase | None, what: str) -> Tensor:
    """A number, a tensor or an entry, fit to ``value``: its dtype and device, and a shape that broadcasts.

    A tensor has the site's shape, or the shape of its last dims. An entry has the batch in front: one value for each
    row, which is one number, or has the shape of the row's last dims.
    """
    name, lead = what, 0
    if isinstance(given, (str, tuple)):
        key = as_key(given)
        name = f"{what}({key_text(key)})"
        if td is None:
            raise BadKey(
                f"{name} reads an entry", got="a call without a TensorDict", fix="call the module with a TensorDict"
            )
        given, lead = td.get(key), td.batch_dims
        if given is None:
            raise BadKey(
                f"no entry {key_text(key)} for {what}",
                got=f"entries {list(td.keys(True, True))}",
                fix="inside a patch explain and capture the module that the context gives back: it reads the entry",
            )
        if lead > 1 and value.shape[:lead] != td.batch_size and isinstance(given, Tensor):
            given, lead = given.flatten(0, lead - 1), 1  # the network has merged the batch dims
    if not isinstance(given, Tensor):
        fraction = isinstance(given, float) and not given.is_integer()
        if fraction and not (value.is_floating_point() or value.is_complex()):
            raise BadType(f"{name} gives a fraction to whole numbers", got=f"{given}, {value.dtype}", needed="an int")
        return torch.as_tensor(given, dtype=value.dtype, device=value.device)
    rest = given.shape[lead:]
    fits = len(rest) <= value.ndim - lead and rest == value.shape[value.ndim - len(rest) :]
    if not fits or given.shape[:lead] != value.shape[:lead]:
        raise BadValue(
            f"{name} does not fit the site",
            got=f"shape {list(given.shape)}",
            needed=f"the site's shape {list(value.shape)}, the shape of one row, or a number",
            fix="expand it to the batch, or index the site",
        )
    if lead:
        given = given.reshape(*given.shape[:lead], *[1] * (value.ndim - lead - len(rest)), *rest)
    return given.to(device=value.device, dtype=value.dtype)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
