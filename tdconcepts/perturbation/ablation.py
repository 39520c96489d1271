"""Take a feature away and look at what the target loses: features one by one, and windows that slide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks import Target, dispatch_rows
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey
from tdconcepts.perturbation.perturbing import Game, Perturbed, Perturbing
from tdconcepts.tunables import Replaceable

__all__ = ["FeatureAblation", "Occlusion"]

Sizes: TypeAlias = int | tuple[int, ...]


class FeatureAblation(Replaceable, TensorDictModuleBase):
    r"""What the target loses when a feature is replaced by its baseline: :math:`y(w) - y(w \text{ without } g)`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    Every element of a feature gets the feature's score. Entries are played together, so that a feature may lie in
    several; each site, and each entry between stages, is for itself. Integer entries can be explained too. With several
    targets one more dim of size T follows the batch.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        options: ``mask``, ``baseline``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and
            ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: a mask or a baseline of another shape. BadType: what is no mask or baseline.
        BadKey: a mask or baseline for something else.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014 (section 4.2).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x @ torch.tensor([1.0, 2.0, 3.0]), ["x"], ["y"])
        >>> explain = FeatureAblation(net, Target("y"), mask=torch.tensor([0, 0, 1]))
        >>> explain(TensorDict(x=torch.ones(1, 3), batch_size=[1]))["attribution", "x"]
        tensor([[3., 3., 3.]])
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
        return self._perturbing.run(tensordict, Game.one_by_one)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)


class Occlusion(Replaceable, TensorDictModuleBase):
    r"""What the target loses under a sliding window: the mean of :math:`y(w) - y(w \text{ without } W)` over windows.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    As :class:`FeatureAblation`, but for the features: windows that overlap, in place of a ``mask``. An element gets the
    mean over the windows that cover it. Each entry is for itself.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        window: the size of the window in elements, for the last dims of a row (the dims before them are covered
            whole), or a dict of these by key. The last window of a dim ends with it.
        stride: how far the window moves, 1 by default; at most the window.
        options: ``baseline``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and ``chunk_size``,
            ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: sizes below one, more of them than dims, a stride that leaves elements out, a mask, or a baseline of
            another shape. BadType: what is no baseline. BadKey: a window or baseline for something else.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014 (section 4.2).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x @ torch.tensor([1.0, 2.0, 3.0]), ["x"], ["y"])
        >>> explain = Occlusion(net, Target("y"), window=2)
        >>> explain(TensorDict(x=torch.ones(1, 3), batch_size=[1]))["attribution", "x"]
        tensor([[3., 4., 5.]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        window: Sizes | Mapping[NestedKey, Sizes],
        stride: Sizes | Mapping[NestedKey, Sizes] = 1,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        if "mask" in options:
            raise BadValue(
                "an occlusion has windows, no mask", got="mask=", fix="window=, or FeatureAblation(mask=...)"
            )
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module, self.window, self.stride = module, window, stride
        self._sizes = {
            w: _sizes(window, stride, name, list(self._perturbing.explaining.pullback.names))
            for w, name in zip(
                self._perturbing.explaining.pullback.wrt, self._perturbing.explaining.pullback.names, strict=True
            )
        }
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys
        self.optional_keys = self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._perturbing.run(tensordict, self._occlude)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)

    def _occlude(self, game: Game) -> dict[Wrt, Tensor]:
        return {w: self._slide(game, w) for w in game.ends}

    def _slide(self, game: Game, mine: Wrt) -> Tensor:
        end, lead = game.ends[mine], game.lead
        row = end.shape[lead:]
        sizes, strides = self._sizes[mine]
        if len(sizes) > len(row):
            got, needed = f"window={sizes}", f"at most {len(row)} sizes, for rows of shape {list(row)}"
            raise BadValue("a window of more dims than the row", got=got, needed=needed)
        rest = row[len(row) - len(sizes) :]
        inside = _Windows(rest, sizes, strides, end.device)
        n, outside = inside.count, (*[1] * (lead + len(row) - len(sizes)), *rest)

        def kept(at: Tensor, w: Wrt) -> Tensor:  # experiment 0 is the row itself
            if w != mine:
                return at.view(-1, *[1] * game.ends[w].ndim) >= 0
            hidden = inside((at - 1).clamp(min=0)) & (at > 0).view(-1, *[1] * len(rest))
            return ~hidden.view(len(at), *outside)

        values = game.values(n + 1, kept)
        found = inside.mean((values[:1] - values[1:]).movedim(0, -1))
        found = found.reshape(*values.shape[1:], *[1] * (len(row) - len(rest)), *rest)
        return game.shaped(mine, found.expand(*values.shape[1:], *row).clone())


class _Windows:
    """Windows that slide over a row; each covers a part of every dim, and so all is worked out dim by dim."""

    def __init__(self, row: torch.Size, sizes: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> None:
        self.per_dim = [_covered(n, k, s, device) for n, k, s in zip(row, sizes, strides, strict=True)]
        self.counts = [len(covered) for covered in self.per_dim]
        self.count = math.prod(self.counts)

    def __call__(self, at: Tensor) -> Tensor:
        """The elements that windows ``at [m]`` cover, ``[m, *row]``; windows along the last dim come one by one."""
        found = torch.ones(len(at), dtype=torch.bool, device=at.device)
        for covered in reversed(self.per_dim):
            found = covered[at % len(covered)].view(len(at), -1, *[1] * (found.ndim - 1)) & found.unsqueeze(1)
            at = at // len(covered)
        return found

    def mean(self, losses: Tensor) -> Tensor:
        """Of losses ``[..., windows]`` the mean over the windows that cover an element, ``[..., *row]``."""
        found = losses.to(torch.promote_types(losses.dtype, torch.float32)).unflatten(-1, self.counts)
        for covered in self.per_dim:
            share = covered / covered.sum(0)
            found = torch.tensordot(found, share.to(found.dtype), ([losses.ndim - 1], [0]))
        return found


def _covered(length: int, size: int, stride: int, device: torch.device) -> Tensor:
    """For each window along one dim the positions that it covers, ``[windows, length]``."""
    count = -(-max(0, length - size) // stride) + 1
    begin = (torch.arange(count, device=device) * stride).unsqueeze(-1)
    at = torch.arange(length, device=device)
    return (begin <= at) & (at < begin + size)


def _sizes(window: object, stride: object, name: NestedKey, names: list[NestedKey]) -> tuple[tuple[int, ...], ...]:
    found = []
    for what, given in (("window", window), ("stride", stride)):
        if isinstance(given, Mapping):
            wrong = [key for key in given if key not in names]
            if wrong or (name not in given and what == "window"):
                got, needed = f"{what} for {list(given)}", nearest(wrong[0], names) if wrong else f"one for {name!r}"
                raise BadKey(f"a {what} for other entries than those explained", got=got, needed=needed)
            given = given.get(name, 1)
        one = (given,) if isinstance(given, int) else given
        if not isinstance(one, tuple) or not one or not all(type(size) is int and size >= 1 for size in one):
            raise BadValue(f"not a {what}", got=f"{what}={given!r}", needed="an int >= 1, or a tuple of them")
        found.append(one)
    sizes, strides = found
    strides = strides * len(sizes) if len(strides) == 1 else strides
    if len(strides) != len(sizes) or any(s > k for s, k in zip(strides, sizes, strict=True)):
        got = f"window={sizes}, stride={strides}"
        raise BadValue("a stride that leaves elements out", got=got, needed="one for each size, at most that size")
    return sizes, strides
