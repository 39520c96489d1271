"""Edits that take effect in some rows only: by a condition, by the steps of an episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.edits import Edit
from tdconcepts.hooks.programs import EditLike, checked_edit
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Condition", "Steps", "When"]

Condition: TypeAlias = "NestedKey | Steps | Callable[[TensorDictBase], Tensor]"


@dataclasses.dataclass(frozen=True)
class Steps:
    r"""True at the steps :math:`\mathrm{start} \le t < \mathrm{stop}` of an episode, every ``every``-th of them.

    Args:
        start: the first step, 0 by default.
        stop: the step after the last; None for no end.
        every: the distance of the steps, 1 by default.
        key: the entry that counts them, ``[*B]`` or ``[*B, 1]``; ``"step_count"``, which ``StepCounter`` writes.

    Raises:
        BadValue: steps that are never reached. BadKey: at the call, without the entry.

    Examples:
        >>> from tensordict import TensorDict
        >>> Steps(2, 6, 2)(TensorDict(step_count=torch.arange(7), batch_size=[7])).long()
        tensor([0, 0, 1, 0, 1, 0, 0])
    """

    start: int = 0
    stop: int | None = None
    every: int = 1
    key: NestedKey = "step_count"

    def __post_init__(self) -> None:
        if self.start < 0 or self.every < 1 or (self.stop is not None and self.stop <= self.start):
            raise BadValue("steps that are never reached", got=repr(self), needed="0 <= start < stop, every >= 1")
        object.__setattr__(self, "key", as_key(self.key))

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entry that counts the steps."""
        return [self.key]

    def __call__(self, td: TensorDictBase) -> Tensor:
        count = td.get(self.key)
        if count is None:
            raise BadKey(
                f"no entry {key_text(self.key)} that counts the steps",
                got=f"entries {list(td.keys(True, True))}",
                fix="TransformedEnv(env, StepCounter())",
            )
        inside = (count >= self.start) & ((count - self.start) % self.every == 0)
        return inside if self.stop is None else inside & (count < self.stop)


@dataclasses.dataclass(frozen=True, eq=False)
class When(Edit):
    r"""An edit that takes effect where a condition holds.

    .. math:: x'_i = \mathrm{edit}(x)_i \text{ if } c_i, \text{ else } x_i

    Rows where it does not hold keep their value bit by bit (a NaN of the edit stays out of them).

    Args:
        edit: any edit.
        condition: what is True where it takes effect, ``[*B]`` or ``[*B, 1]``: the key of an entry, :class:`Steps`, or
            a callable of the TensorDict that the module reads (picklable, if it is to go to a worker).

    Raises:
        BadKey: at the call, without the entry. BadValue: for a condition that is not one a row.
        BadType: for what is no condition.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tdconcepts import Ablate
        >>> edit = When(Ablate(), lambda td: td["angle"] > 0)
        >>> edit(torch.ones(2, 3), TensorDict(angle=torch.tensor([0.1, -0.1]), batch_size=[2]))
        tensor([[0., 0., 0.],
                [1., 1., 1.]])
    """

    edit: EditLike
    condition: Condition

    def __post_init__(self) -> None:
        if not callable(self.edit):
            raise BadType("not an edit", got=repr(self.edit), needed="Ablate(), Replace(...), or a callable")
        if isinstance(self.condition, (str, tuple)):
            object.__setattr__(self, "condition", as_key(self.condition))
        elif not callable(self.condition):
            raise BadType(
                "not a condition", got=repr(self.condition), needed="a key, Steps(...), or a callable of the TensorDict"
            )

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the edit and the condition say that they read."""
        condition: Any = self.condition
        own = [condition] if isinstance(condition, (str, tuple)) else list(getattr(condition, "in_keys", ()))
        return list(dict.fromkeys([*map(as_key, getattr(self.edit, "in_keys", ())), *own]))

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        if td is None:
            raise BadKey("a condition reads entries", got="a call without a TensorDict", fix="call the module with one")
        where = self._holds(td)
        batch = td.batch_size
        if value.shape[: len(batch)] != batch:
            where = where.reshape(-1)  # the network has merged the batch dims
        if value.shape[: where.ndim] != where.shape:
            raise BadValue(
                "the condition does not fit the value",
                got=f"{list(where.shape)} for a value of shape {list(value.shape)}",
                needed="one for each row",
            )
        own: Any = value if isinstance(self.edit, Edit) else value.clone()  # which a callable may change in place
        new = self.edit(own, td)
        new = checked_edit(own if new is None else new, value, "an edit under a condition")
        return torch.where(where.reshape(*where.shape, *[1] * (value.ndim - where.ndim)).to(value.device), new, value)

    def _holds(self, td: TensorDictBase) -> Tensor:
        condition: Any = self.condition
        if isinstance(condition, (str, tuple)):
            where = td.get(condition)
            if where is None:
                raise BadKey(f"no entry {key_text(condition)} to decide by", got=f"entries {list(td.keys(True, True))}")
        else:
            where = condition(td)
        if isinstance(where, Tensor) and where.shape == (*td.batch_size, 1):
            where = where.squeeze(-1)
        if not isinstance(where, Tensor) or where.shape != td.batch_size:
            raise BadValue(
                "a condition is one for each row",
                got=f"shape {list(where.shape)}" if isinstance(where, Tensor) else repr(where),
                needed=f"shape {list(td.batch_size)}, or {[*td.batch_size, 1]}",
            )
        return where.bool()
