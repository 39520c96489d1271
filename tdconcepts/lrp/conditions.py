"""Concept-conditional relevance: only what passes the chosen units of a layer goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.flows import backward_by, depends
from tdconcepts.hooks.locate import locate
from tdconcepts.hooks.plans import Bound, Run, Step
from tdconcepts.hooks.rules import Rules
from tdconcepts.hooks.sites import Site
from tdconcepts.keys import NestedKey, as_key

__all__ = ["Conditions"]


class Conditions:
    """A program of rules, and of masks on what flows back through sites.

    Args:
        rules: the rules.
        condition: ``{site: units}``; units are ints, or the key of an entry with a mask ``[*B, C]`` or with unit
            numbers ``[*B]``, so that each row has its own. They count along the first dim of a row.

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

    def __init__(self, rules: Rules, condition: Mapping[Any, Any] | None) -> None:
        if condition is not None and not isinstance(condition, Mapping):
            raise BadType("not a condition", got=repr(condition), needed='{Site("conv3"): [4, 17]}')
        self.rules = rules
        self.condition = {Site.parse(site): units for site, units in (condition or {}).items()}

    @property
    def in_keys(self) -> tuple[NestedKey, ...]:
        """The entries that hold units of the rows."""
        keyed = [
            units for units in self.condition.values() if isinstance(units, (str, tuple)) and not _are_units(units)
        ]
        return tuple(as_key(key) for key in keyed)

    def bind(self, module: nn.Module) -> list[Bound]:
        """The steps of the rules, then those of the masks."""
        masks = []
        for site, units in self.condition.items():
            masks += [Step(place, _Mask(place.name, units), every=True) for place in locate(module, site)]
        return [*self.rules.bind(module), Bound(tuple(masks), self.in_keys)] if masks else self.rules.bind(module)

    def around(self, module: nn.Module, steps: list[Step]) -> list[Step]:
        """As :meth:`~tdconcepts.hooks.rules.Rules.around`: what is read of an output is not masked by it."""
        mine = [step for bound in self.bind(module) for step in bound.steps]
        first = [step for step in steps if step.place.side == "input"]
        return [*first, *mine, *(step for step in steps if step.place.side == "output")]


class _Mask:
    """The step at a conditioned site."""

    def __init__(self, name: str, units: Any) -> None:
        self.name, self.units = name, units

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        if not torch.is_grad_enabled() or not depends(value):
            return value
        lead = 1 if run.td is None else run.td.batch_dims
        return backward_by(_masked, value, [value], self._mask(value, run, lead), keep=False)

    def _mask(self, value: Tensor, run: Run, lead: int) -> Tensor:
        if value.ndim <= lead:
            raise BadValue(f"the site {self.name!r} has no units", got=f"shape {list(value.shape)}")
        count, rest = value.shape[lead], (1,) * (value.ndim - lead - 1)
        if isinstance(self.units, int) or _are_units(self.units):
            wanted = [self.units] if isinstance(self.units, int) else list(self.units)
            if not all(-count <= unit < count for unit in wanted):
                raise BadValue(
                    f"no such unit at {self.name!r}", got=f"{wanted}", needed=f"numbers from 0 to {count - 1}"
                )
            mask = value.new_zeros(count)
            mask[wanted] = 1.0
            return mask.reshape(*(1,) * lead, count, *rest)
        given = self.units if isinstance(self.units, Tensor) else run.td.get(as_key(self.units))  # type: ignore[union-attr]
        if given is None:
            raise BadValue(f"no entry {self.units!r} with the units of {self.name!r}")
        if not given.is_floating_point() and given.dtype != torch.bool:
            given = nn.functional.one_hot(given, count)
        return given.to(value.dtype).reshape(*given.shape, *rest)


def _masked(flow: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (flow * mask,)


def _are_units(units: Any) -> bool:
    return isinstance(units, (list, range)) or (isinstance(units, tuple) and all(type(u) is int for u in units))
