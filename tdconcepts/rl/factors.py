"""From saliency to a claim that can fail: change a factor of the environment, see if behaviour and saliency agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Pullback, Target, check_module
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, join, key_text
from tdconcepts.metrics.randomisation import spearman

__all__ = ["Factor", "FactorTest", "factor_test"]

Change: TypeAlias = Callable[[TensorDictBase], TensorDictBase]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A semantic factor of the environment: where it shows in an observation, and how to change it.

    Args:
        change: ``td -> td``: states in which this factor, and it alone, is another one; from a simulator, or by hand.
        place: truth values in the shape of a row (or ``[*B, *row]``, where it moves): the elements that show it.

    Examples:
        >>> from tensordict import TensorDict
        >>> mirrored = lambda td: td.set("observation", td["observation"] * torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> pole = Factor(mirrored, place=torch.tensor([False, False, True, True]))
        >>> pole.change(TensorDict(observation=torch.ones(1, 4), batch_size=[1]))["observation"]
        tensor([[ 1.,  1., -1., -1.]])
    """

    change: Change
    place: Tensor


@dataclasses.dataclass(frozen=True)
class FactorTest:
    """What :func:`factor_test` found, ``[F, *B]`` each, by factor and state.

    Args:
        names: of the F factors.
        behaviour: how far the distribution over actions moves when the factor is changed (total variation, in [0, 1]).
        flips: whether the greedy action does.
        share: the factor's share of the saliency before the change.
        moved: how far its share moves with the change.

    Examples:
        >>> effect, share = torch.tensor([[0.9, 0.1], [0.0, 0.2]]), torch.tensor([[0.8, 0.3], [0.2, 0.1]])
        >>> test = FactorTest(("pole", "cart"), effect, effect > 0.5, share, torch.zeros(2, 2))
        >>> test.across_states()  # the pole is salient where it matters, the cart where it does not
        {'pole': 1.0, 'cart': -1.0}
    """

    names: tuple[str, ...]
    behaviour: Tensor
    flips: Tensor
    share: Tensor
    moved: Tensor

    def across_states(self) -> dict[str, float]:
        """For each factor the rank correlation, over states, of its saliency and its effect: is it salient *where* it
        matters? NaN where either does not vary.
        """
        shares, effects = self.share.flatten(1), self.behaviour.flatten(1)
        return dict(zip(self.names, spearman(shares, effects, signed=True).tolist(), strict=True))

    def across_factors(self) -> Tensor:
        """For each state the rank correlation, over factors, of saliency and effect ``[*B]``: do the factors that
        matter stand out? NaN where either does not vary.
        """
        return spearman(self.share.movedim(0, -1), self.behaviour.movedim(0, -1), signed=True)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of the table, as text."""
        agreement = self.across_states()
        headers = ["factor", "saliency share", "behaviour moves by", "actions flip", "share moves by", "agreement"]
        columns = [value.double().flatten(1).mean(1) for value in (self.share, self.behaviour, self.flips, self.moved)]
        rows = []
        for i, name in enumerate(self.names):
            cells = [f"{float(column[i]):.3f}" for column in columns]
            rows.append([name, *cells, f"{agreement[name]:+.2f}"])
        return headers, rows


def factor_test(
    policy: TensorDictModuleBase,
    explainer: TensorDictModuleBase,
    states: TensorDictBase,
    factors: Mapping[str, Factor],
    *,
    of: NestedKey = "logits",
    wrt: NestedKey = "observation",
) -> FactorTest:
    r"""Change each factor of the environment in turn; does what is salient matter, and does saliency follow?

    A saliency map suggests that the agent acts as it does *because of* a factor. That is a claim about another world,
    in which the factor is different, so it is tested there: the policy's distribution over actions is compared with
    that in the changed state, :math:`\frac12 \sum_a |\pi(a|s) - \pi(a|s')|`, and set against the factor's share of the
    saliency, :math:`\sum_{i \in \mathrm{place}} |A_i| / \sum_i |A_i|`. Most maps do not pass.

    Args:
        policy: the policy.
        explainer: of that policy, writes ``("attribution", wrt)``; the logged action is held where it asks for it.
        states: the states ``[*B]``, with what the explainer reads.
        factors: name -> :class:`Factor`.
        of: the logits (or values) of the actions, ``[*B, A]``; their softmax is compared.
        wrt: the entry that was explained.

    Raises:
        BadValue: no factors, a place that does not fit, a change that gives other states than it was given.
        BadKey: an explainer that does not explain ``wrt``.

    Source: Atrey et al. 2020, "Exploratory not explanatory: counterfactual analysis of saliency maps for deep
    reinforcement learning", section 4.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient
        >>> net = TensorDictModule(lambda x: torch.stack([x[..., 0], -x[..., 0]], -1), ["observation"], ["logits"])
        >>> flip = lambda i: lambda td: td.set("observation", td["observation"] * (1 - 2 * torch.eye(2)[i]))
        >>> factors = {name: Factor(flip(i), torch.eye(2)[i].bool()) for i, name in enumerate(["used", "unused"])}
        >>> states = TensorDict(observation=torch.ones(3, 2), batch_size=[3])
        >>> found = factor_test(net, Gradient(net, Target("logits", 0)), states, factors)
        >>> found.share[:, 0], found.flips[:, 0]
        (tensor([1., 0.]), tensor([ True, False]))
    """
    check_module(policy, "the policy")
    if not isinstance(states, TensorDictBase):
        raise BadType("not states", got=type(states).__name__, needed="a TensorDict of states [*B]")
    score = as_key(join(ATTRIBUTION, as_key(wrt)))
    if score not in check_module(explainer, "the explainer").out_keys:
        got = f"out_keys {list(explainer.out_keys)}"
        raise BadKey(f"the explainer does not explain {key_text(wrt)}", got=got, needed=key_text(score))
    if not factors:
        raise BadValue("no factors", got="an empty mapping", needed="name -> Factor")
    read = Pullback(policy, Target(of, slice(None)))
    before, share = _looked_at(read, states), _sizes(explainer, states, score)
    columns: list[tuple[Tensor, ...]] = []
    for name, factor in factors.items():
        if not isinstance(factor, Factor):
            raise BadType(f"the factor {name!r} is none", got=type(factor).__name__, needed="Factor(change, place)")
        changed = factor.change(states.copy())
        if not isinstance(changed, TensorDictBase) or changed.batch_size != states.batch_size:
            got = getattr(changed, "batch_size", type(changed).__name__)
            raise BadValue(f"the change of {name!r} gives other states", got=got, needed=f"{list(states.batch_size)}")
        place = factor.place
        if not isinstance(place, Tensor):
            raise BadType(f"the place of {name!r} is no tensor", got=type(place).__name__, needed="truth values")
        if place.dtype != torch.bool or place.shape not in (share.shape, share.shape[states.batch_dims :]):
            needed = f"truth values of shape {list(share.shape[states.batch_dims :])} or {list(share.shape)}"
            raise BadValue(f"the place of {name!r} does not fit", got=f"shape {list(place.shape)}", needed=needed)
        after, later = _looked_at(read, changed), _sizes(explainer, changed, score)
        inside = [(one * place).flatten(states.batch_dims).sum(-1) for one in (share, later)]
        moves = 0.5 * (before.softmax(-1) - after.softmax(-1)).abs().sum(-1)
        columns.append((moves, before.argmax(-1) != after.argmax(-1), inside[0], (inside[1] - inside[0]).abs()))
    return FactorTest(tuple(factors), *(torch.stack(parts) for parts in zip(*columns, strict=True)))


def _looked_at(read: Pullback, td: TensorDictBase) -> Tensor:
    with torch.no_grad():
        return read.evaluate(td)[0]


def _sizes(explainer: TensorDictModuleBase, td: TensorDictBase, score: NestedKey) -> Tensor:
    """Each element's share of the row's saliency; an even one where there is none."""
    size = explainer(td.copy()).get(score).detach().abs()
    total = size.flatten(td.batch_dims).sum(-1).reshape(*td.batch_size, *[1] * (size.ndim - td.batch_dims))
    return torch.where(total > 0, size / total, torch.full_like(size, 1 / max(1, size[(0,) * td.batch_dims].numel())))
