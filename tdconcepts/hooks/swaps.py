"""Parameters under a program: functions of the model are given another tensor in their place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.contexts import active
from tdconcepts.hooks.flows import untransformed
from tdconcepts.hooks.plans import Bound, Step
from tdconcepts.hooks.programs import _Adds
from tdconcepts.hooks.sites import Place, Site, parameter_paths

__all__ = ["Change", "Weights", "matching"]

Change: TypeAlias = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights(_Adds):
    """A program: what each of some parameters is while it runs.

    Args:
        changes: for each parameter, by its name without the ``module.`` layers that TensorDict adds (``"0.weight"``),
            what is made of it: a callable that gives a tensor of the same shape, such as those of
            ``tdconcepts.weights``. One with an attribute ``tensors`` is a function of these and the parameter alone,
            and is called again only when one of them has changed. Names may be globs, as in ``"blocks.*.weight"``. A
            parameter under two names has one change.

    Raises:
        BadKey: from :meth:`on`: a name that matches nothing, or two changes of one parameter.
        BadValue: at the call: a change that gives another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Linear(2, 1, bias=False), ["x"], ["y"])
        >>> with Weights({"weight": lambda w: 0 * w}).on(net) as m:
        ...     m(TensorDict(x=torch.ones(1, 2), batch_size=[1]))["y"].tolist()
        [[0.0]]
    """

    changes: Mapping[str, Change]

    def __post_init__(self) -> None:
        if not isinstance(self.changes, Mapping) or not self.changes:
            raise BadType("not a mapping of changes", got=repr(self.changes), needed='{"0.weight": Masked(mask)}')
        wrong = {name: change for name, change in self.changes.items() if not callable(change)}
        if wrong:
            raise BadType("a change is none", got=repr(wrong), needed="Masked, Shifted, LowRank or a callable")

    def bind(self, module: nn.Module) -> list[Bound]:
        """Find the parameters in ``module``."""
        table = parameter_paths(module)
        found: dict[nn.Parameter, tuple[str, Change]] = {}
        for pattern, change in self.changes.items():
            for name in matching(pattern, table):
                parameter = table[name]
                if parameter in found and found[parameter][1] is not change:
                    both = f"{found[parameter][0]!r} and {name!r}"
                    raise BadKey("one parameter has two changes", got=both, needed="one", fix="contexts nest")
                found[parameter] = (name, change)
        place = Place(Site("."), ".", module, "input", None, None, None, None)
        return [Bound((Step(place, _Swap(found), every=True, whole=True),))]


class _Swap:
    """Gives functions the changed tensors in place of the parameters."""

    def __init__(self, found: dict[nn.Parameter, tuple[str, Change]]) -> None:
        self.__setstate__([(parameter, name, change) for parameter, (name, change) in found.items()])

    def __getstate__(self) -> list[tuple[nn.Parameter, str, Change]]:
        return self.found

    def __setstate__(self, found: list[tuple[nn.Parameter, str, Change]]) -> None:
        self.found = found
        self.places = {id(parameter): i for i, (parameter, _, _) in enumerate(found)}  # others in a copy
        self.held: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def __call__(self, tree: Any, run: Any, given: Any) -> Any:
        return tree

    def swap(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What ``func`` is given: the arguments, with changed tensors in place of parameters."""
        if func in _ASIDE:
            return args, kwargs
        return tuple([self._swapped(arg) for arg in args]), {k: self._swapped(v) for k, v in kwargs.items()}

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            i = self._place(value)
            return value if i is None else self._changed(i)
        if type(value) in (list, tuple):
            return type(value)([self._swapped(part) for part in value])
        return value

    def _place(self, value: nn.Parameter) -> int | None:
        if is_compiling():  # which has no ids
            return next((i for i, (parameter, _, _) in enumerate(self.found) if parameter is value), None)
        return self.places.get(id(value))

    def _changed(self, i: int) -> Tensor:
        """The changed tensor: that of the last time, where it is a function of tensors that are as they were."""
        parameter, name, change = self.found[i]
        tensors = getattr(change, "tensors", None)
        if tensors is None or not _still((parameter, *tensors)):
            return self._made(parameter, name, change)
        versions = tuple([tensor._version for tensor in (parameter, *tensors)])
        held = self.held.get(i)
        if held is None or held[0] != (*versions, held[1]._version):
            new = self._made(parameter, name, change)
            self.held[i] = held = ((*versions, new._version), new)
        return held[1]

    def _made(self, parameter: nn.Parameter, name: str, change: Change) -> Tensor:
        new = change(parameter)
        if not isinstance(new, Tensor) or new.shape != parameter.shape:
            got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise BadValue(f"the change of {name!r} gives another shape", got=got, needed=list(parameter.shape))
        return new if new.dtype == parameter.dtype else new.to(parameter.dtype)


def _still(tensors: tuple[Tensor, ...]) -> bool:
    """Whether nothing but these tensors matters: no graph, no transform, no other context's changes around this one."""
    if is_compiling() or not all(map(untransformed, tensors)):
        return False
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        return False  # these have no versions
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return sum(len(run.plan.swaps) for run in active()) == 1


# What is asked of a parameter and not computed with it; its place in memory is its own.
_ASIDE = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
) | frozenset((Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.data_ptr))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a name or a glob stands for: ``*`` for one part, ``**`` for any number."""
    names = list(names)
    if pattern in names:
        return [pattern]
    glob = "".join({"**": ".*", "*": "[^.]*"}.get(p) or re.escape(p) for p in re.split(r"(\*\*|\*)", pattern))
    found = [name for name in names if re.fullmatch(glob, name)]
    if not found:
        raise BadKey(f"no parameter {pattern!r}", got=pattern, needed=nearest(pattern, names))
    return found
