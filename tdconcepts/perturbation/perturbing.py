"""What every method of forward passes shares: the game of features that are there or not, and rows in flight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Options, Pullback, Site, Target
from tdconcepts.hooks.batching import expand, gather, groups, spread
from tdconcepts.hooks.explaining import Explaining, Running, check_options
from tdconcepts.hooks.leaves import pick, put
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey
from tdconcepts.perturbation.baselines import Baselines, background, check_baselines, group_of, start
from tdconcepts.perturbation.layout import Layout
from tdconcepts.perturbation.masks import Masks, check_masks, keyed_groups, mask_key, numbered, once

__all__ = ["Game", "Perturbed", "Perturbing"]


class Perturbed(Options, total=False):
    """The options that every method of forward passes takes, besides those of :class:`~tdconcepts.hooks.Options`.

    Args:
        mask: which elements are one feature: an integer tensor in the shape of a row, a callable from that shape to one
            (:class:`Grid`, :class:`Along`); the first part of the keys that hold a mask for each row, ``[*B, *row]``;
            or a dict of these by key. Equal numbers are one feature, also across entries; -1 is never touched. A number
            that a row does not have is a feature without elements there. Default: each element is one.
        baseline: what stands in for a feature that is taken away: a number; a tensor in the shape of a row; the first
            part of the keys that hold it; a callable ``(value, batch_dims) -> value`` (:class:`Blur`, :class:`Mean`); a
            TensorDict of M rows, over which results are averaged; or a dict of these by key. Default:
            ``("baseline", *k)`` where the TensorDict has it, else zero.

    Raises:
        BadType: what is no mask or baseline. BadKey: one for something that is not explained, or that is not there.
        BadValue: one of another shape.

    Examples:
        Superpixels: any map of labels is a mask, ``[H, W]`` for all channels of an image, or one for each row. Here a
        segmentation of each image is an entry, and a segment is replaced by the mean of its image:

        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.perturbation import FeatureAblation, Mean
        >>> net = TensorDictModule(lambda image: image[:, 0, 0, 0], ["image"], ["y"])
        >>> options: Perturbed = {"mask": "segments", "baseline": Mean((-2, -1))}
        >>> explain = FeatureAblation(net, Target("y"), **options)
        >>> labels = torch.tensor([[[0, 0, 1], [2, 1, 1]], [[5, 6, 6], [5, 5, 6]]])
        >>> image = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0]).view(1, 1, 2, 3).expand(2, 3, 2, 3)
        >>> td = TensorDict(image=image, segments={"image": labels}, batch_size=[2])
        >>> explain(td)["attribution", "image"][:, 0]
        tensor([[[0.5000, 0.5000, 0.0000],
                 [0.0000, 0.0000, 0.0000]],
                [[0.5000, 0.0000, 0.0000],
                 [0.5000, 0.5000, 0.0000]]])
    """

    mask: Masks
    baseline: Baselines


class Perturbing:
    """The part of a method of forward passes that is the same for all: features, baselines, chunks, results.

    Entries are one game, played together; each site, and each entry between stages, is a game of its own.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        options: see :class:`Perturbed`.
    """

    def __init__(
        self, module: TensorDictModuleBase, target: Target, wrt: Wrt | list[Wrt] | None, options: Mapping[str, Any]
    ) -> None:
        check_options(options, [*Running.__annotations__, *Options.__annotations__, *_OWN])
        self.explaining = this = Explaining(module, target, wrt, {k: v for k, v in options.items() if k not in _OWN})
        self.mask, self.baseline = options.get("mask"), options.get("baseline")
        self.layout = Layout(module)
        whole = this.pullback
        check_masks(self.mask, whole.wrt)
        check_baselines(self.baseline, list(whole.names))
        entries = [w for w in whole.wrt if not isinstance(w, Site) and w in module.in_keys]
        apart: list[list[Wrt]] = [[w] for w in whole.wrt if w not in entries]
        self.games = [Pullback(module, target, list(g)) for g in ([entries] if entries else []) + apart]
        self.keys = dict(zip(whole.wrt, this.attribution_keys, strict=True))
        held = [group_of(self.baseline, name) for name in whole.names]
        needs = [mask_key(self.mask, name) for name in whole.names]
        needs += [key for key, must in held if must]
        self.in_keys = list(dict.fromkeys([*this.in_keys, *(key for key in needs if key is not None)]))
        self.optional_keys = [key for key, must in held if key is not None and not must]
        self.out_keys = this.out_keys

    def run(self, td: TensorDictBase, play: Callable[[Game], Mapping[Wrt, Tensor]]) -> TensorDictBase:
        """Write what ``play(game)`` gives for each chunk of the batch and each game, and return ``td``."""
        also = self.groups(td)

        def attribute(part: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
            part, outputs = self.explaining.ran(part)
            held = self.hold(part) if held is None else held
            found: dict[NestedKey, Tensor] = {}
            for path in self.games:
                game = Game(self, path, part, held, also)
                untouched = not game.count
                found |= self.named(game.one_by_one() if untouched else play(game))
            return found | outputs

        return self.explaining.run(td, attribute)

    def groups(self, td: TensorDictBase) -> Tensor:
        """The numbers of all groups in masks that are entries: those of the whole batch, for all of its chunks."""
        return keyed_groups(self.mask, self.explaining.pullback.names, td) if isinstance(td, TensorDictBase) else _NONE

    def named(self, found: Mapping[Wrt, Tensor]) -> dict[NestedKey, Tensor]:
        """Results by the key under which they are written."""
        graph = self.explaining.create_graph
        return {self.keys[w]: value if graph else value.detach() for w, value in found.items()}

    def hold(self, td: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self.games[0].hold(td)


_OWN, _NONE = ("mask", "baseline"), torch.zeros(0, dtype=torch.long)
_MASKS = 2**18  # the elements of what stays that are worked out at once: they are still in the cache when used


class Game:
    """One batch and the features that can be taken away from it.

    ``ends``: the value of each entry or site; ``ids``: for each of its elements the number of its feature (-1: none),
    ``[*B or 1, *row]``; ``count``: the number of features; ``lead``: the number of batch dims.
    """

    def __init__(
        self, owner: Perturbing, path: Pullback, td: TensorDictBase, held: Tensor | None, also: Tensor = _NONE
    ) -> None:
        self.owner, self.path, self.td, self.held = owner, path, td, held
        self.lead = lead = td.batch_dims
        graph = owner.explaining.create_graph
        self.sites: dict[Wrt, Tensor] = {}
        if path.is_inner:
            self.sites = path.evaluate(td, create_graph=graph)[1]
            self.ends = {w: pick(v, w.index, lead) if isinstance(w, Site) else v for w, v in self.sites.items()}
        else:
            path.check_inputs(td, {}, gradients=False)
            self.ends = {w: td.get(w) for w in path.wrt}
        names = dict(zip(path.wrt, path.names, strict=True))
        given = owner.baseline
        self.rows = {w: background(given, names[w], end, lead) for w, end in self.ends.items()}
        self.copies = max([1, *(len(rows) for rows in self.rows.values() if rows is not None)])
        self.starts = {w: start(given, names[w], end, td) for w, end in self.ends.items() if self.rows[w] is None}
        self.ids, self.count = numbered(owner.mask, self.ends, td, also)
        self.device = next(iter(self.ends.values())).device
        self.layout, own = owner.layout, path.is_inner or graph
        self.turned = {w: not own and self.layout.takes(end) for w, end in self.ends.items()}
        for values in (self.ends, self.starts):
            values.update({w: self.layout.of(value) for w, value in values.items() if self.turned[w]})
        self._short: dict[Wrt, Tensor] = {}

    def values(self, n: int, kept: Callable[[Tensor, Wrt], Tensor], other: Other | None = None) -> Tensor:
        """The explained numbers of ``n`` experiments, ``[n, *B]`` or ``[n, *B, T]``.

        Args:
            n: how many experiments; with M rows of a baseline each is M forwards, and their mean.
            kept: for experiments ``[m]`` the elements that stay as they are, broadcast to ``[m, *B, *row]``; where the
                last dim is shorter each of its elements stands for as many as it takes.
            other: what stands in for the rest, ``[m, *B, *row]``; default: the baseline.
        """
        this, td, path, batch = self.owner.explaining, self.td, self.path, self.td.batch_size
        others = [key for key in path.reads(td) if key not in path.wrt]
        rows, copies = this.rows(td, path.in_keys, self.sites.values()), self.copies
        stay = {w: _Table(n, functools.partial(self._lying, w, kept), ids.numel()) for w, ids in self.ids.items()}
        found, every, turned = [], torch.arange(n * copies, device=self.device), any(self.turned.values())
        for group in this.tracked(groups(n * copies, rows, td.numel()), "forward passes"):
            m = len(group)
            at = every[group.start : group.stop]
            points = {w: spread(self._moved(w, at, stay[w](at, group, copies), other), m, batch) for w in path.wrt}
            held = None if self.held is None else spread(self.held.expand(m, *self.held.shape), m, batch)
            work = expand(td, m, others)
            evaluate = functools.partial(path.evaluate, work, held=held, create_graph=this.create_graph)
            value, _ = self.layout.run(evaluate, points) if turned else evaluate(points)
            found.append(gather(value, m, batch))
        values = torch.cat(found)
        return values.unflatten(0, (n, self.copies)).mean(1) if self.copies > 1 else values

    def coalitions(self, n: int, kept: Callable[[Tensor], Tensor]) -> Tensor:
        """The explained numbers where experiments ``[m]`` keep the features ``kept(experiments)``, ``[m, count]``."""

        def elements(at: Tensor, w: Wrt) -> Tensor:
            ids = self._runs(w)
            stay = torch.nn.functional.pad(kept(at), (0, 1), value=True)  # -1: the elements that are never touched
            return stay.to(ids.device)[:, ids]

        return self.values(n, elements)

    def one_by_one(self, other: Other | None = None) -> dict[Wrt, Tensor]:
        """What is lost without each of the features, as the score of its elements."""
        missing = torch.arange(-1, self.count, device=self.device)
        missing[0] = -2  # experiment 0 is the row itself; -1 are elements that are never touched
        missing = missing.view(-1, *[1] * self.lead)

        def elements(at: Tensor, w: Wrt) -> Tensor:
            ids = self._runs(w)
            return missing[at].to(ids.device).view(len(at), *[1] * ids.ndim) != ids

        values = self.values(self.count + 1, elements, other)
        return self.spread(values[:1] - values[1:])

    def spread(self, scores: Tensor) -> dict[Wrt, Tensor]:
        """A score for each feature, ``[count, *B(, T)]``, as that of each of its elements, ``[*B(, T), *row]``."""
        wide = torch.nn.functional.pad(scores.movedim(0, -1), (0, 1))
        return {w: self.shaped(w, self._each(wide, ids)) for w, ids in self.ids.items()}

    def _each(self, wide: Tensor, ids: Tensor) -> Tensor:
        lead, row = self.lead, ids.shape[self.lead :]
        if ids.shape[:lead].numel() == 1:
            return wide[..., ids.reshape(row)]
        flat = ids.reshape(*ids.shape[:lead], row.numel()) % wide.shape[-1]  # each row has its own
        flat = flat.unsqueeze(lead) if wide.ndim > lead + 1 else flat
        return wide.gather(-1, flat.expand(*wide.shape[:-1], -1)).reshape(*wide.shape[:-1], *row)

    def shaped(self, w: Wrt, found: Tensor) -> Tensor:
        """A result in the dtype of what it explains."""
        return found.to(self.ends[w].dtype) if self.ends[w].is_floating_point() else found

    def need(self, most: int, what: str, fix: str) -> None:
        """Raise where there are too many features."""
        if self.count > most:
            raise BadValue(f"too many features for {what}", got=f"{self.count}", needed=f"at most {most}", fix=fix)

    def _runs(self, w: Wrt) -> Tensor:
        """``ids`` without dims along which they don't change, with one for each run of equal ones along the last dim.

        To look features up element by element takes longer than all the rest where a feature is a tile of an image.
        """
        if w not in self._short:
            ids = self.ids[w]
            masked = self.owner.mask is not None and ids.is_cpu and ids.ndim and ids.numel()
            self._short[w] = _shortened(ids) if masked else ids
        return self._short[w]

    def _lying(self, w: Wrt, kept: Callable[[Tensor, Wrt], Tensor], at: Tensor) -> Tensor:
        """The elements that stay, lying in memory as the values do."""
        stay, end = kept(at, w), self.ends[w]
        many, each = (stay.shape[-1], end.shape[-1] // max(1, stay.shape[-1])) if end.ndim else (1, 1)
        if self.turned[w]:
            runs = stay.unsqueeze(-1).expand(*stay.shape[:-3], *end.shape[-3:-1], many, each)
            return runs.movedim(-4, -1).contiguous().flatten(-3, -2)
        short = many > 1 and each > 1
        return stay.unsqueeze(-1).expand(*stay.shape, each).flatten(-2) if short else stay

    def _moved(self, w: Wrt, at: Tensor, stay: Tensor, other: Other | None) -> Tensor:
        end, rows, lead, copies = self.ends[w], self.rows[w], self.lead, self.copies
        if other is not None:
            base = other(at // copies if copies > 1 else at, w)
        elif rows is not None:
            base = rows[(at % copies).to(rows.device)].reshape(len(at), *[1] * lead, *end.shape[lead:])
        else:
            base = self.starts[w]
        if self.turned[w]:
            return self.layout.back(torch.where(stay, self.layout.turned(end), self.layout.turned(base)))
        moved = torch.where(stay, end, base)
        if isinstance(w, Site) and w.index is not None:
            whole = self.sites[w]
            return torch.stack([put(whole, w.index, lead, one) for one in moved.unbind(0)])
        return moved


Other = Callable[[Tensor, Wrt], Tensor]


class _Table:
    """What ``make(experiments)`` gives, for one group of experiments after the other.

    It is made for many at once, so that there is nothing to do for most groups but to cut them out.
    """

    def __init__(self, n: int, make: Callable[[Tensor], Tensor], size: int) -> None:
        self.n, self.make, self.most = n, make, _MASKS // max(1, size)
        self.made, self.rows = range(0), torch.zeros(0)

    def __call__(self, at: Tensor, group: range, copies: int) -> Tensor:
        first, last = group.start // copies, (group.stop - 1) // copies
        if last not in self.made or first not in self.made:
            self.made = range(first, min(self.n, max(last + 1, first + self.most)))
            self.rows = self.make(torch.arange(self.made.start, self.made.stop, device=at.device))
        found = self.rows[first - self.made.start : last + 1 - self.made.start]
        return found if copies == 1 else found[(at // copies - first).to(found.device)]


def _shortened(ids: Tensor) -> Tensor:
    ids = once(ids)
    for dim in range(ids.ndim):
        first = ids.narrow(dim, 0, 1)
        if bool((ids == first).all()):
            ids = first
    changes = (ids[..., 1:] != ids[..., :-1]).flatten(0, -2).any(0) if ids.ndim > 1 else ids[1:] != ids[:-1]
    run = math.gcd(ids.shape[-1], *(changes.nonzero().flatten() + 1).tolist())
    return ids[..., ::run].contiguous()
