"""SVERL: Shapley values of what an agent sees, for its behaviour, for its value estimate, and for its return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Options, Target, check_module, check_td, dispatch_rows
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, join, key_text
from tdconcepts.perturbation.masks import Masks, check_masks, mask_key, numbered
from tdconcepts.perturbation.perturbing import Game, Perturbing
from tdconcepts.rl.episodes import run_episodes

__all__ = ["Hidden", "Sverl", "sverl_outcome"]

_MOST = 16  # features whose subsets are all played


class Sverl(TensorDictModuleBase):
    r"""How much each feature that the agent sees contributes to a number, in the states that it visits.

    Shapley values of the game :math:`v(C) = E_{S \sim d}[\, y(S) \mid S_C = s_C]`: features outside of C are not
    known, and whatever the visited states :math:`d` say about them.

    | reads | writes |
    |---|---|
    | the entries that the target depends on | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    * **Behaviour**: ``Sverl(policy, probability(policy), states)``, of :math:`\pi_C(a|s)` for the logged action.
    * **Prediction**: ``Sverl(critic, state_value(), states)``, of the value estimate. It explains a predictor, not
      the agent's performance; that is :func:`sverl_outcome`.

    Args:
        module: a policy or a critic.
        target: what is explained, one number a row.
        states: visited states, a TensorDict ``[M]`` with what is explained.
        wrt: entries that the module reads; default: all of them.
        match: ``"exact"``: the average of y over the visited states that agree with s on C, as the paper defines it
            (with discrete features; where none agrees, over s alone); ``"marginal"`` (the default): features outside
            of C are taken from each visited state in turn, whatever the others are, as for continuous features.
        n_samples: how many random orders; default: all subsets, ``2 ** G`` of them for G features, at most 16.
        options: ``mask`` (see :class:`~tdconcepts.perturbation.Perturbed`), ``generator`` for the orders; and
            ``chunk_size``, ``outputs``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: no states, or too many features for all subsets. BadKey: states without what is explained.

    Source: Beechey et al. 2023, "Explaining reinforcement learning with Shapley values", equations 6 to 11.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda x: x[..., :1] * x[..., 1:], ["observation"], ["state_value"])
        >>> states = TensorDict(observation=torch.tensor([[1.0, 1.0], [1.0, 3.0], [0.0, 1.0]]), batch_size=[3])
        >>> explain = Sverl(critic, Target("state_value"), states, match="exact")
        >>> explain(states[:1].copy())["attribution", "observation"]  # v(all) = 1, v(none) = 4/3
        tensor([[ 0.5833, -0.9167]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        states: TensorDictBase,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        match: Literal["exact", "marginal"] = "marginal",
        n_samples: int | None = None,
        **options: Unpack[SverlOptions],
    ) -> None:
        super().__init__()
        if match not in ("exact", "marginal"):
            raise BadValue("not a match", got=f"match={match!r}", needed='"exact" or "marginal"')
        _check_samples(n_samples)
        rows = _flat(states)
        given = {k: v for k, v in options.items() if k != "generator"}
        self._perturbing = Perturbing(module, target, wrt, {**given, "baseline": 0.0 if match == "exact" else rows})
        for w in self._perturbing.explaining.pullback.wrt:
            if w not in module.in_keys:
                raise BadKey(f"{w!r} is not what the agent sees", needed=f"an entry of {list(module.in_keys)}")
            if rows.get(w, None) is None:
                raise BadKey(f"no entry {w!r} in the visited states", got=f"entries {list(rows.keys(True, True))}")
        self.module, self.match, self.n_samples = module, match, n_samples
        self._states, self._source = rows, Source(options.get("generator"))
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        check_td(tensordict)
        drawn: list[Tensor] = []  # the same coalitions for all chunks of the batch

        def play(game: Game) -> dict[Wrt, Tensor]:
            if not drawn:
                drawn.append(_orders(game.count, self.n_samples, self._source))
            value = self._matching(game) if self.match == "exact" else lambda some: _played(game, some)
            return game.spread(_shapley(game.count, drawn[0] if self.n_samples else None, value))

        return self._perturbing.run(tensordict, play)

    def _matching(self, game: Game) -> Callable[[Tensor], Tensor]:
        states = {w: self._states.get(w).to(end.device) for w, end in game.ends.items()}
        count = len(self._states)

        def other(at: Tensor, w: Wrt) -> Tensor:  # experiment 0 is the state itself, the others the visited states
            end, place = game.ends[w], at.clamp(min=1) - 1
            seen = states[w][place].reshape(len(at), *[1] * game.lead, *end.shape[game.lead :]).expand(-1, *end.shape)
            return torch.where((at == 0).view(-1, *[1] * end.ndim), end, seen.to(end.dtype))

        def nothing(at: Tensor, w: Wrt) -> Tensor:
            return torch.zeros((1,) * (1 + game.ends[w].ndim), dtype=torch.bool, device=game.ends[w].device)

        values = game.values(count + 1, nothing, other)  # [1 + M, *B]
        agree = torch.stack([self._agree(game, states, g) for g in range(game.count)])  # [G, M, *B]

        def value(coalitions: Tensor) -> Tensor:
            found = []
            for coalition in coalitions.to(agree.device):
                both = agree[coalition].all(0).to(values.dtype)
                total = both.sum(0)
                mean = (both * values[1:]).sum(0) / total.clamp(min=1.0)
                found.append(values[0] if bool(coalition.all()) else torch.where(total > 0, mean, values[0]))
            return torch.stack(found)

        return value

    def _agree(self, game: Game, states: dict[Wrt, Tensor], group: int) -> Tensor:
        found = None
        for w, end in game.ends.items():
            seen = states[w].reshape(len(states[w]), *[1] * game.lead, *end.shape[game.lead :])
            same = (seen == end) | (game.ids[w] != group)
            each = same.flatten(1 + game.lead).all(-1) if end.ndim > game.lead else same
            found = each if found is None else found & each
        assert found is not None
        return found


class SverlOptions(Options, total=False):
    """The options of :class:`Sverl`: ``mask``, ``generator``, and those of :class:`~tdconcepts.hooks.Options`."""

    mask: Masks
    generator: torch.Generator | None


class Hidden(TensorDictModuleBase):
    r"""A policy that does not see some features: :math:`\pi_C(a|s) = E_{S' \sim d}[\pi(a \mid s_C, S'_{\bar C})]`.

    Each time it acts it takes the features that it does not see from a visited state drawn at random, and acts as the
    policy would: that is a draw from the mixture.

    | reads | writes |
    |---|---|
    | what ``policy`` reads | what ``policy`` writes |

    Args:
        policy: the policy.
        states: visited states, a TensorDict ``[M]``.
        kept: for each entry which elements are seen, truth values in the shape of a row.
        generator: where the draws come from. Default: torch's own.

    Raises:
        BadKey: states without an entry. BadValue: ``kept`` of another shape.

    Source: Beechey et al. 2023, equation 5.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> policy = TensorDictModule(lambda x: x.sum(-1), ["observation"], ["action"])
        >>> visited = TensorDict(observation=torch.tensor([[10.0, 20.0]]), batch_size=[1])
        >>> blind = Hidden(policy, visited, {"observation": torch.tensor([True, False])})
        >>> blind(TensorDict(observation=torch.tensor([[1.0, 2.0]]), batch_size=[1]))["action"]
        tensor([21.])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        states: TensorDictBase,
        kept: dict[NestedKey, Tensor],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.policy = check_module(policy, "the policy")
        self._states, self._kept, self._source = _flat(states), dict(kept), Source(generator)
        for key, keep in self._kept.items():
            seen = self._states.get(key, None)
            if seen is None:
                raise BadKey(f"no entry {key_text(key)} in the visited states", got=f"{list(states.keys(True, True))}")
            if keep.dtype != torch.bool or keep.shape != seen.shape[1:]:
                needed = f"truth values of shape {list(seen.shape[1:])}"
                raise BadValue(f"what is seen of {key_text(key)}", got=f"shape {list(keep.shape)}", needed=needed)
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act on every row of ``tensordict``; what it sees there stays as it is."""
        rows = tensordict.copy()
        draw = (
            (self._source.uniform(*tensordict.batch_size) * len(self._states)).long().clamp(max=len(self._states) - 1)
        )
        for key, keep in self._kept.items():
            value = tensordict.get(key)
            drawn = self._states.get(key).to(value)[draw.to(value.device)]
            rows.set(key, torch.where(keep.to(value.device), value, drawn))
        acted = self.policy(rows)
        for key in self.out_keys:
            tensordict.set(key, acted.get(key))
        return tensordict


def sverl_outcome(
    env: Any,
    policy: TensorDictModuleBase,
    states: TensorDictBase,
    seeds: Sequence[int] = range(8),
    *,
    wrt: NestedKey | list[NestedKey] | None = None,
    mask: Masks = None,
    episodes: int = 8,
    n_samples: int | None = None,
    max_steps: int = 1000,
    greedy: bool = True,
    generator: torch.Generator | None = None,
) -> TensorDictBase:
    r"""What each feature contributes to the *return*: Shapley values of :math:`v(C) = V^{\pi_C}(s)`, by episodes.

    The policy really acts without the features outside of C (:class:`Hidden`), from the start state of each seed to the
    end, for every coalition: what a feature is worth to the agent, where a value estimate only says what it predicts.

    =================================== ================================================================
    reads                               gives
    =================================== ================================================================
    what the policy reads               ``("attribution", *k)`` ``[S, ...]`` for each ``k`` in ``wrt``,
                                        ``"outcome"`` ``[S]``: v(all), ``"blind"`` ``[S]``: v(none)
    =================================== ================================================================

    The scores of a start state sum to ``outcome - blind``.

    Args:
        env: a torchrl environment; how it is seeded: :func:`~tdconcepts.rl.episode_returns`.
        policy: a TensorDictModule that writes the action.
        states: visited states, a TensorDict ``[M]``: the logged rollout, flattened.
        seeds: a start state each.
        wrt: entries that the policy reads; default: all.
        mask: which elements are one feature; see :class:`~tdconcepts.perturbation.Perturbed`.
        episodes: how many for each coalition and start state, averaged; all coalitions share their random numbers.
        n_samples: how many random orders; default: all subsets of at most 16 features.
        max_steps: an episode is cut after so many steps.
        greedy: act deterministically, as far as what is hidden allows (the default), or sample.
        generator: where the orders and the hidden features come from.

    Raises:
        BadValue: no states, no episodes, too many features for all subsets.

    Source: Beechey et al. 2023, "Explaining reinforcement learning with Shapley values", equations 3 to 5 (SVERL-P).

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.rl import cartpole_env
        >>> lean = TensorDictModule(lambda o: (o[..., 2] > 0).long(), ["observation"], ["action"])
        >>> visited = TensorDict(observation=torch.zeros(1, 4), batch_size=[1])
        >>> found = sverl_outcome(cartpole_env(2), lean, visited, [0, 1], episodes=1, max_steps=50)
        >>> (found["attribution", "observation"].mean(0) > 0).tolist()  # it acts by the pole's angle alone
        [False, False, True, False]
    """
    check_module(policy, "the policy")
    _check_samples(n_samples)
    if episodes < 1:
        raise BadValue("no episodes", got=f"episodes={episodes}", needed="one or more")
    given = list(policy.in_keys) if wrt is None else wrt if isinstance(wrt, list) else [wrt]
    keys, rows = [as_key(key) for key in given], _flat(states)
    for key in keys:
        if rows.get(key, None) is None:
            raise BadKey(f"no entry {key_text(key)} in the visited states", got=f"{list(states.keys(True, True))}")
    check_masks(mask, tuple(keys))
    if any(mask_key(mask, key) is not None for key in keys):
        fix = "a tensor in the shape of a row, or a callable"
        raise BadValue("the features are the same in all states here", got=f"mask={mask!r}", fix=fix)
    found, count = numbered(mask, {key: rows.get(key) for key in keys}, rows, torch.zeros(0).long())
    ids = {key: numbers.squeeze(0).cpu() for key, numbers in found.items()}
    source = Source(generator)
    first = int(source.uniform(1).item() * 2**24)
    orders = _orders(count, n_samples, source)
    played: dict[bytes, Tensor] = {}

    def outcome(coalition: Tensor) -> Tensor:
        name = bytes(coalition.tolist())
        if name not in played:
            wide = torch.nn.functional.pad(coalition, (0, 1), value=True)
            kept = {key: wide[ids[key]] for key in keys}
            total = []
            for number in range(1 if bool(coalition.all()) and greedy else episodes):
                draws = torch.Generator(source.device).manual_seed(first + number)
                blind = Hidden(policy, rows, kept, draws)
                episode, _ = run_episodes(env, blind, list(seeds), max_steps=max_steps, greedy=greedy)
                total.append(episode.get("return"))
            played[name] = torch.stack(total).mean(0)
        return played[name]

    def value(coalitions: Tensor) -> Tensor:
        return torch.stack([outcome(one) for one in coalitions])

    scores = _shapley(count, orders if n_samples else None, value)
    wide = torch.nn.functional.pad(scores.movedim(0, -1), (0, 1))
    ends = [outcome(torch.full((count,), full)) for full in (True, False)]
    result = TensorDict({"outcome": ends[0], "blind": ends[1]}, batch_size=[len(seeds)])
    for key in keys:
        result.set(as_key(join(ATTRIBUTION, key)), wide[..., ids[key]])
    return result


def _played(game: Game, coalitions: Tensor) -> Tensor:
    return game.coalitions(len(coalitions), lambda at: coalitions[at])


def _orders(count: int, n_samples: int | None, source: Source) -> Tensor:
    if n_samples is None and count > _MOST:
        fix = "n_samples=, or a mask with fewer groups"
        raise BadValue("too many features for all subsets", got=f"{count}", needed=f"at most {_MOST}", fix=fix)
    return source.permutations(n_samples or 0, count).cpu() if n_samples else torch.zeros(0, count).long()


def _shapley(count: int, orders: Tensor | None, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Shapley values ``[G, *B]`` of ``value(coalitions [k, G]) -> [k, *B]``: from all subsets, or from orders."""
    if orders is None:
        every = torch.arange(2**count).unsqueeze(-1) >> torch.arange(count) & 1 == 1
        values = value(every)
        size = every.sum(-1)
        weight = torch.tensor([1 / (count * math.comb(count - 1, k)) for k in range(count)] + [0.0]).double()
        gain, cost = weight[(size - 1).clamp(min=0)], -weight[size]
        factors = torch.where(every, gain.unsqueeze(-1), cost.unsqueeze(-1)).T.to(values)
        return torch.tensordot(factors, values, 1)
    ranks = orders.argsort(-1)
    steps = torch.stack([ranks < k for k in range(count + 1)], 1)  # [n, G + 1, G]
    values = value(steps.flatten(0, 1)).unflatten(0, (len(orders), count + 1))
    gains = values.diff(dim=1)  # [n, G (position), *B]
    place = ranks.to(gains.device).reshape(*ranks.shape, *[1] * (gains.ndim - 2)).expand(gains.shape)
    return gains.gather(1, place).mean(0)


def _flat(states: TensorDictBase) -> TensorDictBase:
    if not isinstance(states, TensorDictBase):
        raise BadType("visited states are a TensorDict", got=type(states).__name__, needed="[M] rows of what it sees")
    if not states.batch_dims or not states.batch_size.numel():
        raise BadValue("no visited states", got=f"batch_size {list(states.batch_size)}", needed="[M] rows, M >= 1")
    return states.reshape(-1)


def _check_samples(n_samples: int | None) -> None:
    if n_samples is not None and (type(n_samples) is not int or n_samples < 1):
        raise BadValue("not a number of samples", got=f"n_samples={n_samples!r}", needed="an int >= 1, or None")
