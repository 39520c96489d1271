"""Targets at a time step, for policies with a memory: which earlier observations does this action depend on?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["at_time"]


def at_time(target: Target, time: int | str | tuple[str, ...] | Sequence[int]) -> Target:
    r"""The target at one time step of a sequence: with it :math:`\partial y_t / \partial o_{t'}` for all t' at once.

    Where a policy has a memory (``LSTMModule`` and ``GRUModule`` in recurrent mode, a ``DecisionTransformer``), the
    rows ``[N, T]`` of a batch of sequences depend on each other along T, and a plain target would give
    :math:`\sum_t \partial y_t / \partial o_{t'}`. This one counts at step t only.

    Args:
        target: what is explained, at each step.
        time: a step, counted from the end where negative; an entry that holds the step of each sequence, integers
            ``[N, T]`` (one value for each sequence, repeated) or ``[N, T, 1]``; an entry of truth values, a mask: then
            the last step that counts; or several steps as a list or range, which are several targets.

    Raises:
        BadType: a target that is several, or what is no time. BadValue: when it is read, a TensorDict without a time
            dim besides the batch, or a step out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient
        >>> memory = TensorDictModule(lambda x: x.cumsum(-2), ["observation"], ["value"])
        >>> td = TensorDict(observation=torch.ones(1, 3, 1), batch_size=[1, 3])
        >>> Gradient(memory, at_time(Target("value"), 1))(td)["attribution", "observation"].squeeze(-1)
        tensor([[1., 1., 0.]])
        >>> Gradient(memory, Target("value"))(td)["attribution", "observation"].squeeze(-1)
        tensor([[3., 2., 1.]])
    """
    if isinstance(target.select, (list, range)):
        raise BadType("several targets at a time step", got=repr(target), needed="one target", fix="a target for each")
    single = isinstance(time, (int, str, tuple))
    times = [time] if isinstance(time, (int, str, tuple)) else list(time)
    found = [AtTime(target, one if isinstance(one, int) else as_key(one)) for one in times]
    if not found or (not single and not all(isinstance(one, int) for one in times)):
        raise BadType("not a time", got=repr(time), needed="an int, a list or range of ints, or an entry")
    return Target(target.of, found[0] if single else found)


@dataclasses.dataclass(frozen=True)
class AtTime:
    """What ``target`` reads, at one step of each sequence, and zero at the others."""

    target: Target
    time: Any

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*self.target.in_keys, *([] if isinstance(self.time, int) else [self.time])]

    @property
    def goals(self) -> list[NestedKey]:
        return self.target.goals

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        if td.batch_dims < 2:
            raise BadValue(
                "a time step needs a time dim besides the batch",
                got=f"batch_size {list(td.batch_size)}",
                needed="[N, T]: sequences, then time",
                fix="td.unsqueeze(0) for one sequence",
            )
        found, _ = self.target.read(value, td, td.batch_dims)
        return torch.where(self._here(td, found.device), found, 0)

    def _here(self, td: TensorDictBase, device: torch.device) -> Tensor:
        length = td.batch_size[-1]
        steps = torch.arange(length, device=device)
        if isinstance(self.time, int):
            if length and not -length <= self.time < length:
                raise BadValue("no such step", got=f"time={self.time}", needed=f"a step of sequences of {length}")
            return steps == self.time % max(1, length)
        held = td.get(self.time)
        if held is None:
            raise BadKey(f"no entry {key_text(self.time)} with the time", got=f"entries {list(td.keys(True, True))}")
        if held.shape not in (td.batch_size, (*td.batch_size, 1)) or held.is_floating_point():
            got = f"{str(held.dtype).removeprefix('torch.')} of shape {list(held.shape)}"
            needed = f"integers or truth values of shape {list(td.batch_size)}"
            raise BadValue(f"the entry {key_text(self.time)} holds no time", got=got, needed=needed)
        held = held.reshape(td.batch_size)
        if held.dtype == torch.bool:
            return held & (held.flip(-1).cumsum(-1).flip(-1) == 1)
        return steps == held
