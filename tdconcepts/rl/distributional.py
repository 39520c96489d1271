"""Targets of distributional agents: the mean and a quantile of the return of the logged action."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Target, check_module
from tdconcepts.keys import NestedKey, as_key
from tdconcepts.rl.selections import Agents, of_agent, one_hot

__all__ = ["distribution_mean", "distribution_quantile"]


def distribution_mean(
    policy: TensorDictModuleBase,
    of: NestedKey = "action_value",
    action: NestedKey = "action",
    *,
    support: Tensor | None = None,
    agent: Agents = None,
) -> Target:
    r"""The mean return of the logged action: :math:`Q(s, a) = \sum_i z_i\, p_i(s, a)`.

    torchrl's ``DistributionalQValueActor`` writes log-probabilities of atoms, and no value of the chosen action.

    Args:
        policy: a distributional policy (``DistributionalQValueActor``).
        of: the entry with the log-probabilities (or scores) of the atoms, ``[*B, Z, A]``.
        action: the logged action, indices ``[*B]`` or one-hot rows ``[*B, A]``.
        support: the returns :math:`z` that the atoms stand for, ``[Z]``, ascending; default: the policy's own.
        agent: which agent; a list or range is several targets. Default: there is only one.

    Raises:
        BadType: a policy without a ``support``. BadValue: one that does not ascend; when it is read, another number of
            atoms, or an action that does not index the values.

    Source: Bellemare et al. 2017, "A distributional perspective on reinforcement learning", section 4.1.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Identity(), ["scores"], ["action_value"])
        >>> even = TensorDict(action_value=torch.zeros(1, 3, 2), action=torch.tensor([1]), batch_size=[1])
        >>> target = distribution_mean(net, support=torch.tensor([0.0, 1.0, 5.0]))
        >>> target.read(even["action_value"], even, 1)[0].round()
        tensor([2.])
    """
    return Target(of, of_agent(Mean(as_key(action), _support(policy, support)), agent))


def distribution_quantile(
    policy: TensorDictModuleBase,
    quantile: float,
    of: NestedKey = "action_value",
    action: NestedKey = "action",
    *,
    support: Tensor | None = None,
    agent: Agents = None,
) -> Target:
    r"""A quantile of the return of the logged action: what it gives in the worst :math:`q` of cases, say.

    The distribution function is taken to be linear between the atoms, :math:`F(z_i) = \sum_{j \le i} p_j`, so that the
    quantile has a gradient: for :math:`F(z_{i-1}) < q \le F(z_i)` it is
    :math:`z_{i-1} + (z_i - z_{i-1}) (q - F(z_{i-1})) / p_i`; up to :math:`F(z_0)` it is :math:`z_0`.

    Args:
        policy, of, action, support, agent: as for :func:`distribution_mean`.
        quantile: q, in (0, 1).

    Raises:
        BadValue: q out of range, and as for :func:`distribution_mean`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Identity(), ["scores"], ["action_value"])
        >>> even = TensorDict(action_value=torch.zeros(1, 4, 2), action=torch.tensor([1]), batch_size=[1])
        >>> target = distribution_quantile(net, 0.625, support=torch.tensor([0.0, 1.0, 5.0, 9.0]))
        >>> target.read(even["action_value"], even, 1)[0].round()
        tensor([3.])
    """
    if not 0.0 < quantile < 1.0:
        raise BadValue("not a quantile", got=f"quantile={quantile!r}", needed="a number in (0, 1)")
    return Target(of, of_agent(Quantile(as_key(action), _support(policy, support), float(quantile)), agent))


@dataclasses.dataclass(frozen=True)
class Mean:
    """The expectation of the support under the logged action's atoms."""

    action: NestedKey
    support: tuple[float, ...]

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.action]

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        return (self.probabilities(value, td) * value.new_tensor(self.support)).sum(-1)

    def probabilities(self, value: Tensor, td: TensorDictBase) -> Tensor:
        """Of each atom for the logged action, ``[..., Z]``."""
        if value.ndim < td.batch_dims + 2 or value.shape[-2] != len(self.support):
            raise BadValue(
                "the atoms do not fit the support",
                got=f"values of shape {list(value.shape)}, a support of {len(self.support)}",
                needed=f"[*batch, {len(self.support)} atoms, actions]",
            )
        logs = value.log_softmax(-2)
        mine = one_hot(logs.select(-2, 0), td, self.action)
        return torch.where(mine.unsqueeze(-2), logs, 0.0).sum(-1).exp()


@dataclasses.dataclass(frozen=True)
class Quantile(Mean):
    """A quantile of the logged action's return, by a piecewise linear distribution function."""

    q: float

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        p, support = self.probabilities(value, td), value.new_tensor(self.support)
        total = p.cumsum(-1)
        index = (total < self.q).sum(-1, keepdim=True).clamp(max=len(self.support) - 1)
        before = (index - 1).clamp(min=0)
        low, high = support[before], support[index]
        part = (self.q - total.gather(-1, before)) / p.gather(-1, index)
        return torch.where(index > 0, low + (high - low) * part.clamp(max=1.0), support[0]).squeeze(-1)


def _support(policy: TensorDictModuleBase, given: Tensor | None) -> tuple[float, ...]:
    check_module(policy, "the policy")
    found = given
    if found is None:
        held = [m.support for m in policy.modules() if isinstance(getattr(m, "support", None), Tensor)]
        if not held:
            raise BadType(
                "this policy has no support",
                got=type(policy).__name__,
                needed="a DistributionalQValueActor, or support=",
                fix="chosen_value() where the values are plain numbers",
            )
        found = held[-1]
    if found.ndim != 1 or len(found) < 2 or not bool((found.diff() > 0).all()):
        raise BadValue("not a support", got=f"shape {list(found.shape)}", needed="[Z], ascending, Z >= 2")
    return tuple(found.detach().double().cpu().tolist())
