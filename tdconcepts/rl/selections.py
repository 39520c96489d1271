"""How a target reads one number for each row of what an agent wrote: by the logged action, and by the agent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks.targets import is_one_hot
from tdconcepts.keys import NestedKey, key_text

__all__ = ["Advantage", "Agents", "Chosen", "Contrast", "Likelihood", "Probability", "of_agent", "one_hot"]

Agents: TypeAlias = int | Sequence[int] | None  # one, several targets, or the only (for probabilities: the joint) one


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The element of each row that ``action`` holds."""

    action: NestedKey

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.action]

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        return _taken(value, td, self.action)


@dataclasses.dataclass(frozen=True)
class Alone:
    """The one number of each row."""

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        return value.squeeze(-1) if value.ndim > td.batch_dims and value.shape[-1] == 1 else value


@dataclasses.dataclass(frozen=True)
class Contrast(Chosen):
    """The chosen element minus another one."""

    other: int | NestedKey

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.action] + ([] if isinstance(self.other, int) or self.other == "second" else [self.other])

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        chosen, count = _taken(value, td, self.action), value.shape[-1]
        if isinstance(self.other, int):
            if not -count <= self.other < count:
                raise BadValue("no such action", got=self.other, needed=f"an index in [0, {count})")
            return chosen - value[..., self.other]
        if self.other != "second":
            return chosen - _taken(value, td, self.other)
        if count < 2:
            raise BadValue("a contrast needs another action", got=f"rows of {count}", needed="two actions or more")
        mine = one_hot(value, td, self.action)
        return chosen - value.masked_fill(mine, -torch.inf).amax(-1)


@dataclasses.dataclass(frozen=True)
class Advantage(Chosen):
    """The chosen element minus the state's value."""

    baseline: NestedKey

    @property
    def goals(self) -> list[NestedKey]:
        return [] if self.baseline in ("mean", "max") else [self.baseline]

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        chosen = _taken(value, td, self.action)
        if self.baseline in ("mean", "max"):
            return chosen - (value.mean(-1) if self.baseline == "mean" else value.amax(-1))
        state = td.get(self.baseline)
        if state.shape == value.shape and value.shape[-1] > 1:
            return chosen - (state.softmax(-1) * value).sum(-1)
        if state.shape == (*chosen.shape, 1):
            return chosen - state.squeeze(-1)
        if state.shape != chosen.shape:
            raise BadValue(
                f"the baseline {key_text(self.baseline)} does not fit",
                got=f"shape {list(state.shape)}, of values {list(value.shape)}",
                needed=f"state values {[*chosen.shape, 1]}, or logits {list(value.shape)}",
            )
        return chosen - state


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """The log-probability of the logged action, or the entropy where there is none."""

    head: ProbabilisticTensorDictModule
    goals: tuple[NestedKey, ...]  # the parameters that the policy writes; masks and the like come with the TensorDict
    action: NestedKey | None

    @property
    def in_keys(self) -> list[NestedKey]:
        given = [key for key in self.head.in_keys if key not in self.goals]
        return given if self.action is None else [self.action, *given]

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        distribution = self.head.get_dist(td)
        if self.action is not None:
            action = td.get(self.action)
            if action is None:
                raise BadKey(f"no entry {key_text(self.action)} to take the probability of")
            return distribution.log_prob(action)
        try:
            return distribution.entropy()
        except NotImplementedError as error:
            raise BadType(
                "an entropy without a closed form",
                got=type(distribution).__name__,
                needed="a distribution with entropy()",
                fix="explain the log-probability, or the scale: Target('scale', 0)",
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Probability:
    """What log-probabilities, of one agent or joint, stand for."""

    inner: Any

    @property
    def in_keys(self) -> list[NestedKey]:
        return list(self.inner.in_keys)

    @property
    def goals(self) -> list[NestedKey]:
        return list(self.inner.goals)

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        return self.inner(value, td).exp()


@dataclasses.dataclass(frozen=True)
class OfAgent:
    """One agent's number of what ``inner`` gives, or their sum."""

    inner: Any
    agent: int | None

    @property
    def in_keys(self) -> list[NestedKey]:
        return list(getattr(self.inner, "in_keys", []))

    @property
    def goals(self) -> list[NestedKey]:
        return list(getattr(self.inner, "goals", []))

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        found, batch = self.inner(value, td), td.batch_size
        if found.shape == (*batch, 1) and self.agent is None:
            return found.squeeze(-1)
        if found.ndim == len(batch) and self.agent is None:
            return found
        if self.agent is None:
            if isinstance(self.inner, Likelihood):  # independent parts: the joint probability
                return found.flatten(len(batch)).sum(-1)
            needed = f"agent=, 0 to {found.shape[-1] - 1}, or a list"
            raise BadValue("several numbers a row", got=f"shape {list(found.shape)}", needed=needed)
        agents = found.shape[len(batch) :]
        if not agents or not -agents[0] <= self.agent < agents[0]:
            raise BadValue("no such agent", got=f"agent={self.agent}", needed=f"one of rows of shape {list(agents)}")
        mine = found.select(len(batch), self.agent)
        return mine.flatten(len(batch)).sum(-1) if len(agents) > 1 else mine


def of_agent(select: Any, agent: Agents) -> Any:
    """``select`` for one agent, for several (a list of selections), or for the only one.

    Raises:
        BadType: what is no agent.
    """
    agents = [agent] if agent is None or isinstance(agent, int) else list(agent)
    if not agents or not all(one is None or (type(one) is int) for one in agents):
        raise BadType("not an agent", got=repr(agent), needed="an int, or a list or range of them")
    found = [OfAgent(select, one) for one in agents]
    return found[0] if agent is None or isinstance(agent, int) else found


def one_hot(value: Tensor, td: TensorDictBase, action: NestedKey) -> Tensor:
    """Where in ``value`` ``[..., A]`` the logged action is, as a mask."""
    given = td.get(action)
    if given is None:
        raise BadKey(f"no entry {key_text(action)} to choose by", got=f"entries {list(td.keys(True, True))}")
    whole = not (given.is_floating_point() or given.dtype == torch.bool)
    lead, count = value.shape[:-1], value.shape[-1]
    if whole and given.shape in (lead, (*lead, 1)):
        index = given.reshape(*lead, 1).long()
        if _traced() or not index.numel() or bool(((index >= 0) & (index < count)).all()):
            return index == torch.arange(count, device=value.device)
    elif given.shape == value.shape and (_traced() or is_one_hot(given)):
        return given.bool()
    raise BadValue(
        f"the entry {key_text(action)} does not index the actions",
        got=f"{str(given.dtype).removeprefix('torch.')} of shape {list(given.shape)}",
        needed=f"integers of shape {list(lead)} in [0, {count}), or one-hot rows of shape {list(value.shape)}",
    )


def _taken(value: Tensor, td: TensorDictBase, action: NestedKey) -> Tensor:
    """The element of ``value`` ``[..., A]`` that the logged action holds."""
    return torch.where(one_hot(value, td, action), value, 0).sum(-1)


def _traced() -> bool:
    """Inside ``torch.compile`` or a function transform, where a value can't be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
