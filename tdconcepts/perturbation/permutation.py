"""Give a feature to the wrong rows and look at what the target loses."""

from __future__ import annotations

from typing import Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target, check_td, dispatch_rows
from tdconcepts.hooks.batching import joined, slices
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey
from tdconcepts.perturbation.perturbing import Game, Perturbed, Perturbing
from tdconcepts.tunables import Replaceable

__all__ = ["FeaturePermutation"]


class FeaturePermutation(Replaceable, TensorDictModuleBase):
    r"""What the target loses when a feature comes from other rows: :math:`y(w) - y(w \text{ with } g \text{ of row }
    \pi_g(i))`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    :math:`\pi_g` is a random order of all rows of the batch, another for each feature; so rows depend on each other, by
    definition.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        generator: where the orders come from: the same state, the same answer, whatever the chunks.
        options: ``mask``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and ``chunk_size``,
            ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: a single row, or a baseline.

    Source: Fisher et al., *All models are wrong, but many are useful*, 2019 (section 3.2).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x[..., 0], ["x"], ["y"])
        >>> td = FeaturePermutation(net, Target("y"))(TensorDict(x=torch.randn(8, 3), batch_size=[8]))
        >>> td["attribution", "x"][:, 1:].abs().max().item(), abs(td["attribution", "x"].sum().item()) < 1e-5
        (0.0, True)
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        if "baseline" in options:
            raise BadValue("other rows are the baseline here", got="baseline=", fix="FeatureAblation(baseline=...)")
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module, self._source = module, Source(generator)
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        check_td(tensordict)
        this = self._perturbing
        n = tensordict.batch_size.numel()
        if n == 1:
            got, needed = f"batch size {list(tensordict.batch_size)}", "two rows or more"
            raise BadValue("one row has no other row to take a feature from", got=got, needed=needed)
        this.explaining.check(tensordict)
        rows, batch = this.explaining.pieces(tensordict), tensordict.batch_size
        parts, outputs = [], []
        for index, part in slices(tensordict, rows):
            ran, wrote = this.explaining.ran(part)
            parts.append((index, ran, this.hold(ran)))
            outputs.append(wrote)
        also = this.groups(tensordict)
        results: dict[NestedKey, Tensor] = {key: joined([o[key] for o in outputs], batch, rows) for key in outputs[0]}
        for path in this.games:
            played = [(index, Game(this, path, part, held, also)) for index, part, held in parts]
            full = {w: joined([game.ends[w] for _, game in played], batch, rows) for w in path.wrt}
            orders = self._source.permutations(played[0][1].count, n).cpu()
            found = [
                this.named(_permute(game, full, orders, index, tensordict))
                for index, game in this.explaining.tracked(played, "rows")
            ]
            results |= {key: joined([one[key] for one in found], batch, rows) for key in found[0]}
        for key, value in results.items():
            tensordict.set(key, value)
        return tensordict

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)


def _permute(
    game: Game, full: dict[Wrt, Tensor], orders: Tensor, index: object, whole: TensorDictBase
) -> dict[Wrt, Tensor]:
    """``orders [G, N]`` of all rows; this game has those at ``index``."""
    orders = orders.to(game.device)
    mine = orders.view(len(orders), *whole.batch_size)
    mine = mine if index is ... else mine[(slice(None), *index)]  # type: ignore[misc]
    flat = {w: value.flatten(0, game.lead - 1) for w, value in full.items()}

    def other(at: Tensor, w: Wrt) -> Tensor:  # experiment 0 is the row itself
        return flat[w][mine[(at - 1).clamp(min=0)].to(flat[w].device)]

    return game.one_by_one(other)
