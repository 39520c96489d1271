"""How our modules are called: with a TensorDict, or with tensors whose first dim is the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import skip_existing
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from tdconcepts.errors import BadKey, BadType, BadValue, TdConceptsError, nearest
from tdconcepts.keys import NestedKey, join, key_text

__all__ = ["check_norms", "dispatch_rows", "explained", "missing_entries", "norms_of", "set_entries"]


def dispatch_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a TensorDictModule's ``forward(self, tensordict)`` be called with tensors, as tensordict's ``dispatch`` does.

    Tensors are given in the order of ``in_keys``, or by name (parts of a nested key joined by ``_``); the entries of
    ``out_keys`` come back, one tensor or a tuple. The difference is the batch: where some tensor has two dims or more
    and all share the first, that is the batch; else the tensors are one row. tensordict's ``set_skip_existing`` is
    obeyed, with fewer steps than its decorator takes.

    Args:
        forward: the method, ``(self, tensordict) -> tensordict``.

    Raises:
        BadType: too many tensors, or one given twice. BadKey: a name that is none.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> explain = Gradient(net, Target("y", 0))
        >>> explain(torch.zeros(3, 4)).shape, explain(x=torch.zeros(4)).shape
        (torch.Size([3, 4]), torch.Size([4]))
    """

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], Tensor):
            return args[0] if skip_existing() and _is_written(self, args[0]) else forward(self, *args, **kwargs)
        if "tensordict" in kwargs and not args:
            return call(self, kwargs.pop("tensordict"), **kwargs)
        out = forward(self, packed(*given(self.in_keys, args, kwargs)))
        found = tuple(out.get(key) for key in self.out_keys)
        return found[0] if len(found) == 1 else found

    return call


def _is_written(module: Any, td: TensorDictBase) -> bool:
    """Whether ``td`` has all that a module writes, so that ``set_skip_existing`` skips it: not if it reads of that."""
    have = td.keys(True)
    return all(key in have for key in module.out_keys) and not any(key in module.out_keys for key in module.in_keys)


def given(in_keys: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[Any, Any], torch.Size]:
    """The entries that a call with tensors gives, and their batch size, as :func:`dispatch_rows` takes them.

    Args:
        in_keys: the entries, in the order in which they may be given without a name.
        args: what was given so.
        kwargs: what was given by name.

    Raises:
        BadType: too many tensors, or one given twice. BadKey: a name that is none.
    """
    names = {"_".join(join(key)): key for key in in_keys} if kwargs else {}
    if len(args) > len(in_keys):
        raise BadType("too many tensors", got=f"{len(args)} for in_keys {in_keys}", needed=f"{len(in_keys)} at most")
    found = dict(zip(in_keys, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise BadKey(f"no input {name!r}", got=name, needed=nearest(name, list(names)))
        if names[name] in found:
            raise BadType(f"the input {name!r} is given twice", needed="by position or by name")
        found[names[name]] = value
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    first = {value.shape[:1] for value in tensors}
    batched = len(first) == 1 and any([value.ndim > 1 for value in tensors])  # noqa: C419 - faster
    return found, first.pop() if batched else torch.Size([])


def packed(entries: dict[Any, Any], batch_size: torch.Size) -> TensorDict:
    """A TensorDict of these entries."""
    td = TensorDict({}, batch_size=batch_size)
    for key, value in entries.items():
        td.set(key, value)
    return td


def set_entries(td: TensorDictBase, entries: Mapping[Any, Any]) -> TensorDictBase:
    """Write entries that are known to have the batch in front; ``td`` itself. Nothing else is looked at again.

    A group that is not there yet is made at once: four entries take a quarter of the time that they take one by one.

    Args:
        td: where to write, not locked.
        entries: tensors ``[*B, ...]``, or what else a TensorDict holds, by their keys; or a dict of them by the name of
            their group.

    Raises:
        RuntimeError: tensordict's own, where ``td`` is locked; whoever calls this has asked before.

    Examples:
        >>> td = set_entries(TensorDict(batch_size=[2]), {("a", "x"): torch.ones(2, 3), ("a", "y"): torch.zeros(2)})
        >>> td["a"].batch_size, sorted(td["a"].keys())
        (torch.Size([2]), ['x', 'y'])
    """
    groups: dict[str, dict[str, Any]] = {}
    fits = td.device is None and type(td) is TensorDict
    for key, value in entries.items():
        if type(value) is dict:
            groups[key] = {**groups.get(key, {}), **value}
        elif type(key) is tuple and len(key) == 2 and (key[0] in groups or not has_entry(td, key[0])):
            groups.setdefault(key[0], {})[key[1]] = value
        elif fits and type(key) is str:
            td._set_str(key, value, inplace=False, validated=True)
        else:
            td.set(key, value)
    for name, group in groups.items():
        if has_entry(td, name):  # made since by an entry further down
            for part, value in group.items():
                td.set((name, part), value)
        elif fits and not td._has_names():
            whole = TensorDict._new_unsafe(source=group, batch_size=td.batch_size)
            td._set_str(name, whole, inplace=False, validated=True)
        else:
            td.set(name, TensorDict(group, td.batch_size, device=td.device))
    return td


def check_dense(value: Tensor, name: str) -> None:
    """Refuse a nested tensor, which has no shape to line up with a batch.

    Raises:
        BadType: with what makes them.
    """
    if value.is_nested:
        raise BadType(
            f"{name} is a nested tensor",
            got="rows of different lengths",
            needed="a tensor with the batch in front",
            fix="nn.TransformerEncoder(..., enable_nested_tensor=False), or train(), or a call with gradients",
        )


def get_entry(td: TensorDictBase, key: NestedKey) -> Any:
    """``td.get(key, None)``, in a fifth of its time where the key is a name and ``td`` a plain TensorDict."""
    return td._get_str(key, None) if type(key) is str and type(td) is TensorDict else td.get(key, None)


def has_entry(td: TensorDictBase, name: str) -> bool:
    """Whether there is an entry or a group of that name."""
    return td._get_str(name, None) is not None if type(td) is TensorDict else name in td.keys()  # noqa: SIM118


def explained(error: Exception, in_keys: Sequence[NestedKey], td: TensorDictBase) -> Exception:
    """The error of a model: that of a missing entry, or of another batch size, where it is that; else as it is."""
    if isinstance(error, TdConceptsError):
        return error
    missing = [key for key in in_keys if td.get(key) is None]
    if missing:
        return missing_entries(missing, td)
    if "batch dimension mismatch" in str(error):  # tensordict's words, where the model writes an entry
        return BadValue(
            "the model writes an entry that does not have the batch in front",
            got=str(error).splitlines()[0],
            needed=f"entries of shape {[*td.batch_size, '...']}",
            fix="td.batch_size = ... with the dims that the model keeps apart; a model must not mix its rows",
        )
    return error


def missing_entries(keys: Sequence[NestedKey], td: TensorDictBase) -> BadKey:
    """The error that says which entries are not there, with the nearest names."""
    have = list(td.keys(True, True))
    shown = ", ".join(map(key_text, keys))
    close = nearest(keys[0], have)
    needed = close if close.startswith("did you mean") else shown  # others are no way out
    return BadKey(f"no entry {shown} in the TensorDict", got=f"entries {have}", needed=needed)


def norms_of(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that may take statistics of a batch, for :func:`check_norms` to look at at each call."""
    return [one for one in module.modules() if isinstance(one, _NormBase)]


def check_norms(norms: Iterable[nn.Module], what: str) -> None:
    """Raise where one of ``norms`` takes the statistics of the batch: a row is then not what it is alone.

    A batch of several points of a path, or of rows of which one is edited, has statistics of its own, and each forward
    would write to the running ones.

    Raises:
        BadValue: with the layer's type.
    """
    for norm in norms:
        own = isinstance(norm, _BatchNorm) and norm.running_mean is None  # it has no others in either mode
        if own or (norm.training and (isinstance(norm, _BatchNorm) or norm.track_running_stats)):
            raise BadValue(
                f"{what} would change each other through the statistics of the batch",
                got=f"{type(norm).__name__} " + ("without running statistics" if own else "in training mode"),
                needed="statistics that are fixed",
                fix="track_running_stats=True, and model.eval()" if own else "model.eval()",
            )
