"""Shapley values: a feature's mean contribution over all orders in which features can come in."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target, dispatch_rows
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.perturbation.perturbing import Game, Perturbed, Perturbing
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["ShapleyExact", "ShapleySampling"]

_MOST = 20


class ShapleySampling(Replaceable, TensorDictModuleBase):
    r"""Shapley values, estimated from random orders: :math:`\frac1n\sum_\pi y(S_\pi(g) \cup g) - y(S_\pi(g))`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    :math:`S_\pi(g)` are the features in front of :math:`g` in the order :math:`\pi`; those that are not there have the
    value of the baseline. The scores of a row sum to ``y(w) - y(baseline)`` for any number of orders. All rows share
    the orders, so a row gets what it gets alone. ``n_samples * (features - 1) + 2`` forwards.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        n_samples: the number of orders.
        generator: where they come from: the same state, the same answer, whatever the chunks. Default: torch's own.
        options: ``mask``, ``baseline``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and
            ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: no samples. BadType: what is no generator, mask or baseline.

    Source: Castro et al., *Polynomial calculation of the Shapley value based on sampling*, 2009.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x[..., 0] * x[..., 1] + x[..., 2], ["x"], ["y"])
        >>> explain = ShapleySampling(net, Target("y"), n_samples=50, generator=torch.Generator().manual_seed(0))
        >>> td = explain(TensorDict(x=torch.tensor([[2.0, 3.0, 4.0]]), batch_size=[1]))
        >>> td["attribution", "x"][0, 2].item(), td["attribution", "x"].sum().item()
        (4.0, 10.0)
    """

    tunables = (Tunable("n_samples", 10, 100, 10),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        n_samples: int = 25,
        generator: torch.Generator | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        if type(n_samples) is not int or n_samples < 1:
            raise BadValue("not a number of samples", got=f"n_samples={n_samples!r}", needed="an int >= 1")
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module, self.n_samples, self._source = module, n_samples, Source(generator)
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys
        self.optional_keys = self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        orders: dict[object, Tensor] = {}  # drawn once for each game, for all chunks of the batch

        def play(game: Game) -> dict[Wrt, Tensor]:
            if game.path not in orders:
                orders[game.path] = self._source.permutations(self.n_samples, game.count).cpu()
            return _along_orders(game, orders[game.path])

        return self._perturbing.run(tensordict, play)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)


class ShapleyExact(Replaceable, TensorDictModuleBase):
    r"""Shapley values, from all subsets: :math:`\sum_{S \not\ni g} \frac{|S|!\,(G-|S|-1)!}{G!}\,(y(S \cup g) - y(S))`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    As :class:`ShapleySampling`, without chance. ``2 ** G`` forwards for G features (not G!), so G is at most
    20.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        options: ``mask``, ``baseline``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and
            ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: more than 20 features. BadType: what is no mask or baseline.

    Source: Shapley, *A value for n-person games*, 1953 (equation 13).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x[..., 0] * x[..., 1] + x[..., 2], ["x"], ["y"])
        >>> explain = ShapleyExact(net, Target("y"))
        >>> explain(TensorDict(x=torch.tensor([[2.0, 3.0, 4.0]]), batch_size=[1]))["attribution", "x"]
        tensor([[3., 3., 4.]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module = module
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys
        self.optional_keys = self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._perturbing.run(tensordict, _over_subsets)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)


def _along_orders(game: Game, orders: Tensor) -> dict[Wrt, Tensor]:
    """``orders [n, G]``; experiment 0 has no feature, 1 has all, the others are inner points of the orders."""
    n, count = orders.shape
    orders = orders.to(game.device)
    ranks, inner = orders.argsort(-1), count - 1

    def kept(at: Tensor) -> Tensor:
        sample, position = (at - 2).clamp(min=0) // max(1, inner), (at - 2) % max(1, inner)
        found = ranks[sample] <= position.unsqueeze(-1)
        return torch.where((at < 2).unsqueeze(-1), (at == 1).unsqueeze(-1), found)

    values = game.coalitions(2 + n * inner, kept)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    first, last = (values[i].expand(n, 1, *values.shape[1:]) for i in (0, 1))
    chain = torch.cat([first, values[2:].unflatten(0, (n, inner)), last], 1) if inner else torch.cat([first, last], 1)
    gains = chain.diff(dim=1).flatten(0, 1)
    scores = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=values.device)
    return game.spread(scores.index_add(0, orders.flatten().to(values.device), gains) / n)


def _over_subsets(game: Game) -> dict[Wrt, Tensor]:
    game.need(_MOST, "all subsets", "a mask with fewer groups, or ShapleySampling")
    count = game.count
    bits = torch.arange(count, device=game.device)
    values = game.coalitions(2**count, lambda at: (at.unsqueeze(-1) >> bits) & 1 == 1)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    every = torch.arange(2**count)
    size = sum(((every >> bit) & 1 for bit in range(count)), torch.zeros_like(every))
    weight = torch.tensor([1 / (count * math.comb(count - 1, k)) for k in range(count)] + [0.0], dtype=torch.float64)
    gain, cost = weight[(size - 1).clamp(min=0)], -weight[size]
    scores = []
    for bit in range(count):
        with_it = (every >> bit) & 1 == 1
        factor = torch.where(with_it, gain, cost).to(values)
        scores.append(torch.tensordot(factor, values, 1))
    return game.spread(torch.stack(scores))
