"""What one asks of an agent: the value of the logged action, V, log pi(a|s), advantage, contrast and entropy."""

from __future__ import annotations

from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase

from tdconcepts.errors import BadType
from tdconcepts.hooks import Target, check_module
from tdconcepts.keys import NestedKey, as_key
from tdconcepts.rl.selections import (
    Advantage,
    Agents,
    Alone,
    Chosen,
    Contrast,
    Likelihood,
    Probability,
    of_agent,
)

__all__ = ["advantage", "chosen_value", "contrast", "entropy", "log_prob", "probability", "state_value"]


def chosen_value(of: NestedKey = "action_value", action: NestedKey = "action", *, agent: Agents = None) -> Target:
    """The value (or logit) of the action that was logged: :math:`Q(s, a)`.

    Args:
        of: the entry with one number for each action, ``[*B, A]``, for several agents ``[*B, N, A]``.
        action: the logged action: indices ``[*B(, N)]`` or ``[*B(, N), 1]``, or one-hot rows ``[*B(, N), A]``.
        agent: which agent; a list or range of them is *several targets*. Default: there is only one.

    Raises:
        BadValue: when it is read, an action that does not index the values, or several agents and no ``agent``.

    Examples:
        >>> chosen_value()
        Target('action_value', by='action')
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["action_value"])  # for each of three agents
        >>> td = TensorDict(observation=torch.zeros(5, 3, 4), action=torch.ones(5, 3).long(), batch_size=[5])
        >>> explain = Gradient(net, chosen_value(agent=[0, 2]))
        >>> explain(td)["attribution", "observation"].abs().sum(-1).gt(0)[0]  # [targets, agents]
        tensor([[ True, False, False],
                [False, False,  True]])
    """
    return Target(of, by=action) if agent is None else Target(of, of_agent(Chosen(as_key(action)), agent))


def state_value(of: NestedKey = "state_value", *, agent: Agents = None) -> Target:
    """The value of the state, :math:`V(s)`; with ``of="state_action_value"`` a critic's :math:`Q(s, a)`.

    Args:
        of: the entry, ``[*B, 1]`` or ``[*B]``, for several agents ``[*B, N, 1]``.
        agent: which agent; a list or range is several targets. Default: there is only one.

    Examples:
        >>> state_value()
        Target('state_value')
    """
    return Target(of) if agent is None else Target(of, of_agent(Alone(), agent))


def contrast(
    other: int | str | tuple[str, ...] = "second",
    of: NestedKey = "action_value",
    action: NestedKey = "action",
    *,
    agent: Agents = None,
) -> Target:
    """Why this action rather than that: :math:`Q(s, a) - Q(s, a')`.

    What both actions share (the value of the state) cancels, so this explains the *choice*.

    Args:
        other: the other action a': an index; ``"second"``, the best of those that were not taken; or an entry that
            holds it, in the form of ``action``.
        of: the entry with one number for each action; values or logits.
        action: the logged action.
        agent: as for :func:`chosen_value`.

    Raises:
        BadValue: when it is read, an index out of range, or one action only.

    Source: Juozapaitis et al. 2019, "Explainable reinforcement learning via reward decomposition" (differences of
    values); Huber et al. 2022, "Benchmarking perturbation-based saliency maps" (on values that mix V and advantage).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict(q=torch.tensor([[1.0, 5.0, 3.0]]), action=torch.tensor([2]), batch_size=[1])
        >>> contrast(of="q").read(td["q"], td, 1)[0], contrast(0, of="q").read(td["q"], td, 1)[0]
        (tensor([-2.]), tensor([2.]))
    """
    rival = other if isinstance(other, int) or other == "second" else as_key(other)
    return Target(of, of_agent(Contrast(as_key(action), rival), agent))


def advantage(
    of: NestedKey = "action_value",
    action: NestedKey = "action",
    *,
    baseline: str | tuple[str, ...] = "mean",
    agent: Agents = None,
) -> Target:
    r"""How much better than usual the logged action is: :math:`Q(s, a) - V(s)`.

    Args:
        of: the entry with one number for each action.
        action: the logged action.
        baseline: V: ``"mean"`` of the values over actions (that of dueling networks), ``"max"`` of them, or an entry
            that the same module writes: a state value, ``[*B, 1]``, or logits of a policy with as many numbers as
            there are values, :math:`V = \sum_a \pi(a|s) Q(s, a)`.
        agent: as for :func:`chosen_value`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict(action_value=torch.tensor([[1.0, 5.0, 3.0]]), action=torch.tensor([1]), batch_size=[1])
        >>> advantage().read(td["action_value"], td, 1)[0], advantage(baseline="max").read(td["action_value"], td, 1)[0]
        (tensor([2.]), tensor([0.]))
    """
    known = baseline if baseline in ("mean", "max") else as_key(baseline)
    return Target(of, of_agent(Advantage(as_key(action), known), agent))


def log_prob(policy: TensorDictModuleBase, action: NestedKey = "action", *, agent: Agents = None) -> Target:
    r"""The log-probability (density) of the logged action, :math:`\log \pi(a|s)`, for any distribution.

    Args:
        policy: a probabilistic policy (``ProbabilisticActor``, ``ProbabilisticTensorDictSequential``, an
            ``ActorValueOperator`` with one): its last probabilistic stage says which distribution, of which entries.
        action: the logged action.
        agent: which agent; a list or range is several targets. Default: the joint one, the sum over all.

    Raises:
        BadType: a policy without a distribution.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
        >>> net = TensorDictModule(lambda x: 2 * x, ["observation"], ["logits"])
        >>> draw = ProbabilisticTensorDictModule(
        ...     ["logits"], ["action"], distribution_class=torch.distributions.Categorical
        ... )
        >>> policy = ProbabilisticTensorDictSequential(net, draw)
        >>> td = TensorDict(observation=torch.zeros(1, 2), action=torch.tensor([1]), batch_size=[1])
        >>> from tdconcepts import Gradient
        >>> Gradient(policy, log_prob(policy))(td)["attribution", "observation"]
        tensor([[-1.,  1.]])
    """
    head, written = _head(policy)
    return Target(head.in_keys[0], of_agent(Likelihood(head, written, as_key(action)), agent))


def probability(policy: TensorDictModuleBase, action: NestedKey = "action", *, agent: int | None = None) -> Target:
    r"""The probability (density) of the logged action, :math:`\pi(a|s)`; errors as :func:`log_prob`.

    Args:
        policy, action, agent: as for :func:`log_prob`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdconcepts.rl import cartpole_policy
        >>> policy, td = cartpole_policy(), TensorDict(action=torch.tensor([0]), batch_size=[1])
        >>> td["logits"] = torch.zeros(1, 2)
        >>> probability(policy).read(td["logits"], td, 1)[0]
        tensor([0.5000])
    """
    head, written = _head(policy)
    return Target(head.in_keys[0], Probability(of_agent(Likelihood(head, written, as_key(action)), agent)))


def entropy(policy: TensorDictModuleBase, *, agent: Agents = None) -> Target:
    r"""How undecided the policy is: the entropy of :math:`\pi(\cdot|s)` in nats.

    Args:
        policy: as for :func:`log_prob`.
        agent: as for :func:`log_prob`.

    Raises:
        BadType: a policy without a distribution; at the call, a distribution whose entropy has no closed form.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdconcepts.rl import cartpole_policy
        >>> policy, td = cartpole_policy(), TensorDict(logits=torch.zeros(1, 2), batch_size=[1])
        >>> entropy(policy).read(td["logits"], td, 1)[0].exp()  # as undecided as between so many actions
        tensor([2.])
    """
    head, written = _head(policy)
    return Target(head.in_keys[0], of_agent(Likelihood(head, written, None), agent))


def _head(policy: TensorDictModuleBase) -> tuple[ProbabilisticTensorDictModule, tuple[NestedKey, ...]]:
    """The last probabilistic stage of a policy, and which of its parameters the policy writes."""
    check_module(policy, "the policy")
    heads = [module for module in policy.modules() if isinstance(module, ProbabilisticTensorDictModule)]
    if not heads:
        raise BadType(
            "this policy has no distribution",
            got=type(policy).__name__,
            needed="a ProbabilisticActor or a ProbabilisticTensorDictSequential",
            fix='chosen_value("action_value") for a value policy',
        )
    written = tuple(as_key(key) for key in heads[-1].in_keys if key in policy.out_keys)
    return heads[-1], written
