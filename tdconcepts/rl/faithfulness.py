"""Is what an explanation calls important needed for the *return*? Deletion and insertion curves, closed loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_module
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, join, key_text
from tdconcepts.metrics.faithfulness import ranked
from tdconcepts.rl.episodes import check_run, run_episodes
from tdconcepts.rl.returns import student_t

__all__ = ["Partial", "ReturnCurves", "return_curves"]

ORDERS = ("most", "least", "random")


@dataclasses.dataclass(frozen=True)
class ReturnCurves:
    """What :func:`return_curves` measured.

    Args:
        mode: ``"deletion"`` or ``"insertion"``.
        orders: the O orders: ``"most"`` important features first, ``"least"``, ``"random"``.
        features: the J numbers of features that were hidden (deletion) or shown (insertion).
        episodes: a TensorDict of batch ``[O, J, S]`` (S seeds) with ``"return"``, ``"length"`` and ``"finished"``.
        confidence: of the intervals.

    Examples:
        >>> from tensordict import TensorDict
        >>> returns = torch.tensor([[[500.0, 500.0], [20.0, 10.0], [9.0, 9.0]]])
        >>> curves = ReturnCurves("deletion", ("most",), (0, 1, 2), TensorDict({"return": returns}, [1, 3, 2]))
        >>> curves.curve("most")[1], curves.area("most")
        (tensor([500.,  15.,   9.]), 134.75)
    """

    mode: str
    orders: tuple[str, ...]
    features: tuple[int, ...]
    episodes: TensorDictBase
    confidence: float = 0.95

    def curve(self, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number of features, mean return, and its confidence interval, ``[J]`` each: as a figure takes it."""
        if order not in self.orders:
            raise BadValue(f"no order {order!r}", got=order, needed=f"one of {self.orders}")
        returns = self.episodes.get("return")[self.orders.index(order)]
        count = returns.shape[-1]
        mean = returns.mean(-1)
        half = student_t(self.confidence, count - 1) * returns.std(-1) / count**0.5 if count > 1 else mean * torch.nan
        return torch.tensor(self.features).double(), mean, mean - half, mean + half

    def area(self, order: str) -> float:
        """The mean return along the curve, by the trapezoid rule over the share of features: small for a good deletion
        and large for a good insertion of the most important first.
        """
        x, mean, _, _ = self.curve(order)
        return float(torch.trapezoid(mean, x) / (x[-1] - x[0])) if len(x) > 1 else float(mean[0])


class Partial(TensorDictModuleBase):
    """A policy that sees only a part of each state, chosen by an explanation of that very state.

    It acts on the whole state, explains that action, hides features in the order of their attribution, and acts again.

    | reads | writes |
    |---|---|
    | what ``policy`` reads | what ``policy`` writes |

    Args:
        policy: the policy.
        explainer: writes ``("attribution", wrt)`` of the policy's action; None ranks at random, anew at each step.
        wrt: the entry whose features are hidden.
        hidden: how many of its F features.
        order: hide the ``"most"`` important first, or the ``"least"``.
        baseline: what hidden features are replaced by, a number or a tensor in the shape of a row.
        generator: of the random ranks. Default: torch's own.

    Raises:
        BadKey: a policy that does not read ``wrt``, an explainer that does not explain it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import InputXGradient, Target
        >>> policy = TensorDictModule(lambda x: x.sum(-1), ["observation"], ["action"])
        >>> part = Partial(policy, InputXGradient(policy, Target("action")), "observation", hidden=1)
        >>> part(TensorDict(observation=torch.tensor([[1.0, 5.0, 2.0]]), batch_size=[1]))["action"]
        tensor([3.])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        explainer: TensorDictModuleBase | None,
        wrt: NestedKey,
        hidden: int,
        order: Literal["most", "least"] = "most",
        baseline: float | Tensor = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.explainer, self.wrt = check_module(policy, "the policy"), explainer, as_key(wrt)
        if self.wrt not in policy.in_keys:
            raise BadKey(f"the policy reads no entry {key_text(wrt)}", needed=f"one of {list(policy.in_keys)}")
        self._score = as_key(join(ATTRIBUTION, self.wrt))
        if explainer is not None and self._score not in check_module(explainer, "the explainer").out_keys:
            got = f"out_keys {list(explainer.out_keys)}"
            raise BadKey(f"the explainer does not explain {key_text(wrt)}", got=got, needed=key_text(self._score))
        if order not in ("most", "least"):
            raise BadValue("not an order", got=repr(order), needed='"most" or "least"')
        self.hidden, self.order, self.baseline, self._source = hidden, order, baseline, Source(generator)
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act on every row of ``tensordict``; what it sees there stays as it is."""
        value, lead = tensordict.get(self.wrt), tensordict.batch_dims
        if self.explainer is None:
            score = self._source.uniform(*value.shape).to(value.device)
        else:
            rows = self.policy(tensordict.copy())
            score = self.explainer(rows).get(self._score)
            if score.shape != value.shape:
                got, needed = f"shape {list(score.shape)}", f"{list(value.shape)}: one target"
                raise BadValue(f"the attribution {key_text(self._score)} does not fit", got=got, needed=needed)
        rank = ranked([score], lead)
        mask = rank < self.hidden if self.order == "most" else rank >= rank.shape[-1] - self.hidden
        base = torch.as_tensor(self.baseline).to(value)
        acted = self.policy(tensordict.copy().set(self.wrt, torch.where(mask.reshape(value.shape), base, value)))
        for key in self.out_keys:
            tensordict.set(key, acted.get(key))
        return tensordict


def return_curves(
    env: Any,
    policy: TensorDictModuleBase,
    explainer: TensorDictModuleBase,
    seeds: Sequence[int] = range(16),
    *,
    wrt: NestedKey = "observation",
    mode: Literal["deletion", "insertion"] = "deletion",
    features: Sequence[int] | None = None,
    baseline: float | Tensor = 0.0,
    orders: Sequence[str] = ORDERS,
    max_steps: int = 1000,
    greedy: bool = True,
    generator: torch.Generator | None = None,
) -> ReturnCurves:
    r"""The return of an agent that sees less and less (deletion), or more and more (insertion), of each state.

    At every step of every episode the explainer ranks the features of the state it is in, and the agent acts without
    the j most important ones; the same for the least important, and for j at random as a control. A faithful
    explanation makes the return fall at once in the first case and late in the second. One-step agreement
    (:class:`~tdconcepts.metrics.AIM`) does not show that: an action that flips may be mended by the next one.

    Args:
        env: a torchrl environment; how it is seeded: :func:`~tdconcepts.rl.episode_returns`.
        policy: a TensorDictModule that writes the action.
        explainer: of the same policy, for the action that it takes: ``Gradient(policy, chosen_value("logits"))``.
        seeds: an episode each, the same for all curves.
        wrt: the entry whose features are hidden.
        mode: ``"deletion"`` starts from all features, ``"insertion"`` from none.
        features: the numbers j, each in [0, F]; default: all of 0 to F where F <= 16, else 9 numbers from 0 to F.
        baseline: what hidden features are replaced by; the mean over the visited states is a fair one.
        orders: which of ``"most"``, ``"least"``, ``"random"``.
        max_steps, greedy: as for :func:`~tdconcepts.rl.compare_returns`.
        generator: of the random order.

    Raises:
        BadValue: a mode, an order or a number of features that is none. BadKey: as :class:`Partial`.

    Source: Samek et al. 2017, "Evaluating the visualization of what a deep neural network has learned" (deletion);
    Petsiuk et al. 2018, "RISE", section 3.4 (insertion), on returns in place of class scores.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> from tdconcepts.rl import cartpole_env
        >>> lean = TensorDictModule(lambda o: ((o[..., 2] > 0).long(), o[..., 2]), ["observation"], ["action", "angle"])
        >>> env, why = cartpole_env(2), Gradient(lean, Target("angle"))
        >>> found = return_curves(env, lean, why, [0, 1], features=[0, 1], orders=["most", "least"], max_steps=50)
        >>> found.area("most") < found.area("least")
        True
    """
    if mode not in ("deletion", "insertion"):
        raise BadValue("not a mode", got=repr(mode), needed='"deletion" or "insertion"')
    if not orders or any(order not in ORDERS for order in orders):
        raise BadValue("not an order", got=f"orders={list(orders)}", needed=f"some of {ORDERS}")
    seeds = check_run(env, policy, seeds)
    count = _features(env, wrt)
    numbers = list(range(count + 1)) if count <= 16 else torch.linspace(0, count, 9).round().int().tolist()
    numbers = numbers if features is None else list(features)
    if not numbers or any(type(j) is not int or not 0 <= j <= count for j in numbers):
        raise BadValue("not a number of features", got=f"features={numbers}", needed=f"ints from 0 to {count}")
    first = int(Source(generator).uniform(1).item() * 2**24)
    found = []
    for order in orders:
        for j in numbers:
            draws = torch.Generator().manual_seed(first)
            hidden = j if mode == "deletion" else count - j
            first_gone = order if mode == "deletion" else {"most": "least", "least": "most"}.get(order, order)
            by = None if order == "random" else explainer
            away: Literal["most", "least"] = "least" if first_gone == "least" else "most"
            part = Partial(policy, by, wrt, hidden, away, baseline, draws)
            found.append(run_episodes(env, part, list(seeds), max_steps=max_steps, greedy=greedy)[0])
    episodes = torch.stack(found).reshape(len(orders), len(numbers), len(seeds))
    return ReturnCurves(mode, tuple(orders), tuple(numbers), episodes)


def _features(env: Any, wrt: NestedKey) -> int:
    with torch.no_grad():
        start = env.reset()
    value = start.get(as_key(wrt), None)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise BadType(
            f"no floating-point entry {key_text(wrt)} is observed",
            got=f"entries {list(start.keys(True, True))}",
            needed="an entry of numbers",
        )
    return max(1, value.shape[start.batch_dims :].numel())
