"""The tensors inside what a module writes or is given: find one leaf, or a part of it, and replace it out of place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks.sites import Place
from tdconcepts.keys import NestedKey, as_key

__all__ = ["get_leaf", "pick", "put", "set_leaf"]


def get_leaf(place: Place, tree: Any) -> Tensor:
    """The tensor that ``place`` names in a module's output, or in its ``(args, kwargs)``.

    Raises:
        BadKey: where there is no such tensor, or several and the site does not say which.
    """
    path = _leaf_path(place, tree)
    for part in path:
        tree = _child(tree, part, place)
    return tree


def set_leaf(place: Place, tree: Any, new: Tensor) -> Any:
    """A copy of ``tree`` with the tensor of ``place`` replaced, types and other leaves kept.

    A TensorDict is what flows through the pipeline, so its entry is set in place.
    """
    return _replaced(tree, _leaf_path(place, tree), new)


def pick(value: Tensor, index: tuple[Any, ...] | None, lead: int) -> Tensor:
    """The part of ``value`` that ``index`` names in each row; ``lead`` dims in front of it are the batch."""
    if index is None:
        return value
    try:
        return value[(slice(None),) * lead + index]
    except IndexError:
        raise BadValue(
            "the index of a site is out of range",
            got=f"{list(index)} in rows of shape {list(value.shape[lead:])}",
            needed="indices within the row, one for each of its dims at most",
        ) from None


def put(value: Tensor, index: tuple[Any, ...] | None, lead: int, new: Tensor) -> Tensor:
    """``value`` with the part that ``index`` names in each row replaced, out of place (vmap can map ``new``)."""
    if index is None:
        return new
    shape = value.shape[lead:]
    where = torch.arange(shape.numel(), device=value.device).view(shape)[index].reshape(-1)
    flat = value.flatten(lead) if value.ndim > lead else value.unsqueeze(-1)
    spread = where.expand(*value.shape[:lead], where.numel())
    return flat.scatter(-1, spread, new.reshape(spread.shape)).view(value.shape)


def _leaf_path(place: Place, tree: Any) -> tuple[Any, ...]:
    if place.side == "input":
        args, kwargs = tree
        if isinstance(place.leaf, str) and place.leaf not in kwargs:
            position = _position(place.module, place.leaf)
            if position is not None and position < len(args):
                return (0, position)
        if place.leaf is not None and not (args and isinstance(args[0], TensorDictBase)):
            first, *rest = _as_tuple(place.leaf)
            return (0 if isinstance(first, int) else 1, first, *rest)
        if args and isinstance(args[0], TensorDictBase):
            return (0, 0, _entry(place, place.module.in_keys, "in_keys"))
    elif isinstance(tree, Tensor) and (place.leaf is None or place.out_keys is not None):
        return ()
    elif isinstance(tree, TensorDictBase) and place.out_keys is not None:
        return (_entry(place, place.out_keys, "out_keys"),)
    elif place.out_keys is not None:  # a TensorDictModule called with tensors
        return (place.out_keys.index(_entry(place, place.out_keys, "out_keys")),)
    elif place.leaf is not None:
        return (place.leaf,) if isinstance(tree, TensorDictBase) else _as_tuple(place.leaf)
    return _only_tensor(place, tree)


def _entry(place: Place, keys: Any, what: str) -> NestedKey:
    keys = list(keys)
    if place.leaf is not None:
        return as_key(place.leaf)
    if len(keys) != 1:
        fix = f"name one: Site({place.name!r}, leaf={keys[0] if keys else 'key'!r})"
        raise BadKey(f"the module at {place.name!r} has several entries", got=f"{what} {keys}", needed="one", fix=fix)
    return keys[0]


def _only_tensor(place: Place, tree: Any) -> tuple[Any, ...]:
    found = [path for path, value in _leaves(tree, ()) if isinstance(value, Tensor)]
    if len(found) == 1:
        return found[0]
    shown = [path[1:] if place.side == "input" else path for path in found]
    names = [path[0] if len(path) == 1 else path for path in shown]
    raise BadKey(
        f"site {place.name!r} does not say which tensor",
        got=f"{len(found)} tensors at {names}" if found else f"a {type(tree).__name__} without tensors",
        needed="one tensor",
        fix=f"Site({place.name.split(':')[0]!r}, {place.side!r}, leaf={names[0]!r})" if found else "another site",
    )


def _leaves(tree: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(tree, TensorDictBase):
        yield from (((*path, key), tree.get(key)) for key in tree.keys(True, True))
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for position, value in enumerate(tree):
            yield from _leaves(value, (*path, position))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, field.name), (*path, field.name))
    else:
        yield path, tree


def _child(tree: Any, part: Any, place: Place) -> Any:
    try:
        if isinstance(tree, TensorDictBase):
            value = tree.get(part)
            if value is None:
                raise KeyError(part)
            return value
        if isinstance(tree, Mapping) or (isinstance(tree, (tuple, list)) and isinstance(part, int)):
            return tree[part]
        return getattr(tree, part)
    except (KeyError, IndexError, AttributeError, TypeError):
        have = [path[0] for path, _ in _leaves(tree, ()) if path]
        raise BadKey(
            f"site {place.name!r} has no tensor {part!r}", got=f"{part!r}", needed=nearest(part, have)
        ) from None


def _replaced(tree: Any, path: tuple[Any, ...], new: Tensor) -> Any:
    if not path:
        return new
    part, rest = path[0], path[1:]
    if isinstance(tree, TensorDictBase):
        return tree.set(part, new)
    if isinstance(tree, Mapping):
        changed: Any = tree.copy() if isinstance(tree, dict) else dict(tree)
        if type(changed) is not type(tree):
            changed = type(tree)(**changed)  # a ModelOutput's copy() is a plain dict
        changed[part] = _replaced(tree[part], rest, new)
        return changed
    if isinstance(tree, (tuple, list)):
        part = tree._fields.index(part) if isinstance(part, str) else part  # type: ignore[union-attr]
        values = [_replaced(v, rest, new) if i == part % len(tree) else v for i, v in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return dataclasses.replace(tree, **{part: _replaced(getattr(tree, part), rest, new)})


def _position(module: nn.Module, name: str) -> int | None:
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(name) if name in names else None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
