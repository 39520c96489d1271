"""Concept-conditional relevance: only what passes the chosen units of a layer goes on."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.flows import backward_by, depends, untransformed
from tdconcepts.hooks.locate import locate
from tdconcepts.hooks.plans import Bound, Run, Step
from tdconcepts.hooks.rules import Rules
from tdconcepts.hooks.sites import Site
from tdconcepts.keys import NestedKey, as_key

__all__ = ["Conditions", "Which", "which"]


class Which:
    """Which of several conditions a backward pass is for: the first thing that it learns.

    Args:
        count: how many conditions there are.
        only: the one that it is for, where that is known before: a graph can't learn it.
    """

    def __init__(self, count: int, only: int | None = None) -> None:
        self.count, self.only = count, only
        self.rows: Tensor | None = None  # [*B, count]: 1 at the condition that is pulled back

    def spread(self, values: Tensor) -> Tensor:
        """``values`` as many times as there are conditions, ``[*B, count]``: each stands for one of them."""
        if self.only is not None:
            return values.unsqueeze(-1)
        return backward_by(self._begin, values.unsqueeze(-1).expand(*values.shape, self.count), [values], keep=False)

    def _begin(self, flow: Tensor) -> tuple[Tensor]:
        self.rows = flow
        return (flow.sum(-1),)

    def choose(self, masks: Tensor, lead: torch.Size) -> Tensor:
        """Of ``masks``, ``[*lead, count, ...]`` or with ones for ``lead``, the one that counts now."""
        assert self.rows is not None
        rows = self.rows.reshape(*lead, self.count, *[1] * (masks.ndim - len(lead) - 1))
        return (rows * masks).sum(len(lead))


class _Now(threading.local):
    def __init__(self) -> None:
        self.one: Which | None = None


_NOW = _Now()


def which() -> Which | None:
    """The conditions that this thread is running a model under, if there are several.

    Examples:
        >>> which() is None
        True
    """
    return _NOW.one


class Conditions:
    """A program of rules, and of masks on what flows back through sites.

    Args:
        rules: the rules.
        condition: ``{site: units}``, or a list of these, which are explained together, each for itself. Units are ints,
            or the key of an entry with a mask ``[*B, C]`` or with unit numbers ``[*B]``, so that each row has its own,
            or such a tensor, or a mask in the shape of a row (of tokens, say). They count along the first dim of a row.

    Raises:
        BadType: for what is no mapping from sites. BadValue: at the call, for units that are not there.

    Source: Achtibat et al., *From attribution maps to human-understandable explanations through concept relevance
    propagation*, 2023.

    Examples:
        >>> from tdconcepts.lrp import EpsilonPlus
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> len(Conditions(EpsilonPlus().rules_for(net), {Site("0"): [1, 2]}).bind(net))
        2
    """

    def __init__(self, rules: Rules, condition: Mapping[Any, Any] | list[Mapping[Any, Any]] | None) -> None:
        self.many = isinstance(condition, list)
        given: list[Any] = condition if isinstance(condition, list) else [condition or {}]
        if not given or not all(isinstance(one, Mapping) for one in given):
            raise BadType(
                "not a condition",
                got=repr(condition),
                needed="{site: units}, or a list of these",
                fix='{Site("conv3"): [4, 17]}',
            )
        self.rules = rules
        self.conditions = [{Site.parse(site): units for site, units in one.items()} for one in given]
        for site, units in ((site, units) for one in self.conditions for site, units in one.items()):
            if site.index is not None:
                raise BadValue(
                    "a condition on a part of a site",
                    got=str(site),
                    needed="units of a row's first dim, or a mask in the shape of a row",
                    fix=f"{{Site({site.path!r}): mask}}",
                )
            if isinstance(units, (list, range)) and not _are_units(units):
                raise BadType(
                    f"not units of {site}",
                    got=repr(units),
                    needed="ints, a key, or a mask",
                    fix=f"condition=[{{Site({site.path!r}): [0]}}, {{Site({site.path!r}): [1, 2]}}] for several",
                )

    @property
    def in_keys(self) -> tuple[NestedKey, ...]:
        """The entries that hold units of the rows."""
        units = [units for one in self.conditions for units in one.values()]
        keyed = [as_key(key) for key in units if isinstance(key, (str, tuple)) and not _are_units(key)]
        return tuple(dict.fromkeys(keyed))

    def bind(self, module: nn.Module) -> list[Bound]:
        """The steps of the rules, then those of the masks."""
        steps = []
        for site in dict.fromkeys(site for one in self.conditions for site in one):
            units = [one.get(site) for one in self.conditions]
            steps += [Step(place, _Mask(place.name, units, self.many), every=True) for place in locate(module, site)]
        return [*self.rules.bind(module), Bound(tuple(steps), self.in_keys)] if steps else self.rules.bind(module)

    def around(self, module: nn.Module, steps: list[Step]) -> list[Step]:
        """As :meth:`~tdconcepts.hooks.rules.Rules.around`: what is read of an output is not masked by it."""
        mine = [step for bound in self.bind(module) for step in bound.steps]
        first = [step for step in steps if step.place.side == "input"]
        return [*first, *mine, *(step for step in steps if step.place.side == "output")]

    @property
    def apart(self) -> tuple[int | None, ...]:
        """The pull-backs that it takes: one for all conditions, but one for each in a graph or a transform."""
        together = not self.many or not (is_compiling() or torch._C._functorch.maybe_current_level() is not None)
        return (None,) if together else tuple(range(len(self.conditions)))

    @contextlib.contextmanager
    def acting(self, only: int | None = None) -> Iterator[None]:
        """For the time of one pull-back: several conditions share its forward, or it is for one of them ``only``."""
        before = _NOW.one
        _NOW.one = Which(len(self.conditions), only) if self.many else None
        try:
            yield
        finally:
            _NOW.one = before


class _Mask:
    """The step at a conditioned site."""

    def __init__(self, name: str, units: list[Any], many: bool) -> None:
        self.name, self.units, self.many = name, units, many

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        if not torch.is_grad_enabled() or not depends(value):
            return value
        batch = torch.Size(value.shape[:1]) if run.td is None else run.td.batch_size
        merged = len(batch) > 1 and value.shape[: len(batch)] != batch  # a network that flattens its batch dims
        lead = value.shape[:1] if merged else batch
        if value.ndim <= len(lead):
            raise BadValue(f"the site {self.name!r} has no units", got=f"shape {list(value.shape)}")
        masks = [self._mask(units, value, lead, run) for units in self.units]
        if not self.many:
            return backward_by(_masked, value, [value], masks[0], keep=False)
        one = which()
        if one is None:
            raise BadValue(
                "several conditions outside of an explainer", needed="one condition, or LRP(condition=[...])"
            )
        if one.only is not None:
            return backward_by(_masked, value, [value], masks[one.only], keep=False)
        together = torch.stack(torch.broadcast_tensors(*masks), len(lead))
        mask = functools.partial(_one_of, one, lead)
        mask.reads_only = True  # type: ignore[attr-defined]
        return backward_by(mask, value, [value], together, keep=False)

    def _mask(self, units: Any, value: Tensor, lead: torch.Size, run: Run) -> Tensor:
        """The mask of one condition, ``[*lead, C, ...]`` or with ones for ``lead``."""
        n = len(lead)
        count, rest = value.shape[n], (1,) * (value.ndim - n - 1)
        if units is None:
            return value.new_ones(*(1,) * n, count, *rest)
        if isinstance(units, int) or _are_units(units):
            wanted = [units] if isinstance(units, int) else list(units)
            if not all(-count <= unit < count for unit in wanted):
                raise self._no_unit(wanted, count)
            mask = value.new_zeros(count)
            mask[wanted] = 1.0
            return mask.reshape(*(1,) * n, count, *rest)
        given = units if isinstance(units, Tensor) or run.td is None else run.td.get(as_key(units))
        if not isinstance(given, Tensor):
            raise BadValue(f"no entry {units!r} with the units of {self.name!r}")
        if not given.is_floating_point() and given.dtype != torch.bool:
            if untransformed(given) and given.numel() and (int(given.min()) < 0 or int(given.max()) >= count):
                raise self._no_unit([int(given.min()), int(given.max())], count)
            given = nn.functional.one_hot(given.long(), count)
        row = value.shape[n:]
        if len(row) > 1 and given.shape in (row, (*lead, *row)):
            return given.to(value.dtype).reshape(*(lead if given.ndim > len(row) else (1,) * n), *row)
        if given.shape[-1:] != (count,) or given.shape[:-1].numel() not in (1, lead.numel()):
            raise BadValue(
                f"no mask of the units of {self.name!r}",
                got=f"shape {list(given.shape)}",
                needed=f"{[*lead, count]} or {list(row)}, or unit numbers of shape {list(lead)}",
            )
        rows = lead if given.shape[:-1].numel() == lead.numel() else (1,) * n
        return given.to(value.dtype).reshape(*rows, count, *rest)

    def _no_unit(self, wanted: list[int], count: int) -> BadValue:
        return BadValue(f"no such unit at {self.name!r}", got=f"{wanted}", needed=f"numbers from 0 to {count - 1}")


def _masked(flow: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (flow * mask,)


_masked.reads_only = True  # type: ignore[attr-defined]  # no rule: it may stand in front of a flat layer


def _one_of(one: Which, lead: torch.Size, flow: Tensor, masks: Tensor) -> tuple[Tensor]:
    return (flow * one.choose(masks, lead),)


def _are_units(units: Any) -> bool:
    return isinstance(units, (list, range, tuple)) and all(type(unit) is int for unit in units)
