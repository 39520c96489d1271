"""The key vocabulary: which entries tdconcepts reads and writes, and how a key is checked, joined and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tdconcepts.errors import BadKey, nearest

__all__ = ["NestedKey", "as_key", "as_keys", "check_present", "check_writable", "join", "key_text"]

NestedKey: TypeAlias = str | tuple[str, ...]

ACTIVATION = "activation"
ATTRIBUTION = "attribution"
BASELINE = "baseline"
CONVERGENCE_DELTA = "convergence_delta"
GRADIENT = "gradient"
INTERVENTION = "intervention"
METRIC = "metric"
NOISE = "noise"
SWEEP = "sweep"


def as_key(key: object) -> NestedKey:
    """A checked key in its one canonical form: a string, or a flat tuple of two strings or more.

    TensorDict itself turns ``("a", 1)`` into ``"a"``; here that is a :class:`~tdconcepts.errors.BadKey`.

    Args:
        key: a string, or a tuple of strings and of such tuples.

    Raises:
        BadKey: anything else, an empty string among them.

    Examples:
        >>> as_key("observation"), as_key(("agents", ("state",))), as_key(("action",))
        ('observation', ('agents', 'state'), 'action')
    """
    parts = tuple(_flatten(key))
    return parts[0] if len(parts) == 1 else parts


def as_keys(keys: object) -> list[NestedKey]:
    """A list of checked keys, from one key or a list of them.

    A tuple is one nested key, as everywhere in tensordict; several keys are a list.

    Args:
        keys: a key, or a list of them.

    Raises:
        BadKey: what is no key.

    Examples:
        >>> as_keys("x"), as_keys(("a", "b")), as_keys(["x", ("a", "b")])
        (['x'], [('a', 'b')], ['x', ('a', 'b')])
    """
    return [as_key(key) for key in keys] if isinstance(keys, list) else [as_key(keys)]


def join(*parts: object) -> tuple[str, ...]:
    """One nested key from its parts.

    Args:
        parts: keys, from the outermost.

    Examples:
        >>> join("attribution", ("agents", "state"))
        ('attribution', 'agents', 'state')
    """
    return tuple(name for part in parts for name in _flatten(part))


def key_text(key: object) -> str:
    """How messages and tables print a key.

    Args:
        key: any key.

    Examples:
        >>> key_text("x"), key_text(("agents", "state"))
        ("'x'", "('agents', 'state')")
    """
    return repr(as_key(key))


def check_writable(out_keys: Sequence[NestedKey], in_keys: Iterable[NestedKey] = ()) -> None:
    """Refuse keys that can't be written together: twice the same, or one below another, be that one written or read.

    Args:
        out_keys: what is written.
        in_keys: what is read.

    Raises:
        BadKey: the two keys that clash.

    Examples:
        >>> check_writable([("attribution", "x"), "y"], in_keys=["x", "y"])
    """
    written: dict[tuple[str, ...], NestedKey] = {}
    for key in out_keys:
        path = join(key)
        if path in written:
            raise BadKey(
                "two entries would be written under one key",
                got=key_text(key),
                fix="pass another out_key= to one of them",
            )
        written[path] = key
    entries = {join(key): key for key in in_keys} | written
    for path, key in entries.items():
        above = entries if path in written else written  # what is read may lie as it likes
        for depth in range(1, len(path)):
            if path[:depth] in above:
                raise BadKey(
                    "an entry and a group of entries can't have one name",
                    got=f"{key_text(key)}, below {key_text(path[:depth])}",
                    needed="keys that do not start with another entry's key",
                    fix="pass out_key= with another first name",
                )


def check_present(key: NestedKey, keys: Iterable[NestedKey], where: str) -> None:
    """Raise with the nearest names where ``key`` is not among ``keys``.

    Args:
        key: what is looked for.
        keys: those that there are.
        where: what they are the keys of, for the error.

    Raises:
        BadKey: it is not there.

    Examples:
        >>> check_present("action", ["observation", "action"], "the rollout")
    """
    known = list(keys)
    if key not in known:
        raise BadKey(f"no entry {key_text(key)} in {where}", got=key_text(key), needed=nearest(key, known))


def _flatten(key: object) -> Iterable[str]:
    if isinstance(key, str):
        if not key:
            raise BadKey("an empty string is not a key", got="''", needed="a string or a tuple of strings")
        yield key
    elif isinstance(key, tuple) and key:
        for part in key:
            yield from _flatten(part)
    else:
        raise BadKey(
            "not a TensorDict key",
            got=f"{key!r} ({type(key).__name__})",
            needed="a string or a tuple of strings",
            fix="a list holds several keys: ['a', ('b', 'c')]",
        )
