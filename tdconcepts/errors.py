"""The error family: what was got, what is needed, and the way out."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

__all__ = ["BadKey", "BadType", "BadValue", "MissingExtra", "TdConceptsError", "import_extra", "nearest"]


class TdConceptsError(Exception):
    """Every error that tdconcepts raises on purpose.

    The text says what went wrong, then what was *got*, what is *needed* and the *way out*, each on a line of its own
    and each optional. Catch this class for all of them, or ``KeyError``, ``ValueError`` and ``TypeError`` by kind.

    Examples:
        >>> from tdconcepts.errors import BadValue
        >>> print(BadValue("fraction is out of range", got="1.5", needed="a number in [0, 1]", fix="pass fraction=1.0"))
        fraction is out of range
          got:     1.5
          needed:  a number in [0, 1]
          way out: pass fraction=1.0
    """

    def __init__(self, what: str, *, got: object = None, needed: object = None, fix: object = None) -> None:
        lines = [what]
        lines += [f"  {name} {text}" for name, text in (("got:    ", got), ("needed: ", needed)) if text is not None]
        if fix is not None:
            lines.append(f"  way out: {fix}")
        super().__init__("\n".join(lines))

    def __str__(self) -> str:  # KeyError would print the repr, with its line breaks escaped
        return str(self.args[0])


class BadKey(TdConceptsError, KeyError):
    """A key, path or name that does not exist, clashes, or is not a key at all."""


class BadValue(TdConceptsError, ValueError):
    """A value, shape, index or state that the operation can't take."""


class BadType(TdConceptsError, TypeError):
    """An object of the wrong kind, a bare ``nn.Module`` or an integer tensor asked for gradients among them."""


class MissingExtra(TdConceptsError, ImportError):
    """A package that one of the extras brings is not installed."""


def import_extra(module: str, extra: str) -> Any:
    """The imported ``module``, or the command that installs the extra it comes with.

    Raises:
        MissingExtra: ``module`` can't be imported; the original error is the cause.

    Examples:
        >>> import_extra("math", "rl").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {module.partition('.')[0]}, which is not there",
            got=f"{type(error).__name__}: {error}",
            needed=f"the extra {extra!r}",
            fix=f"pip install 'tdconcepts[{extra}]'",
        ) from error


def nearest(name: object, names: Iterable[object], limit: int = 4) -> str:
    """The existing names most like ``name``, as one phrase for a *way out*.

    Examples:
        >>> nearest("lgits", ["logits", "action", "value"])
        "did you mean 'logits'?"
        >>> nearest("zzz", ["logits", "action"])
        "one of 'logits', 'action'"
    """
    known = {str(n) if not isinstance(n, str) else n: n for n in names}
    if not known:
        return "there are none here"
    close = difflib.get_close_matches(str(name), known, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(known[c]) for c in close) + "?"
    shown = ", ".join(repr(n) for n in list(known.values())[: 2 * limit])
    return f"one of {shown}" + (f" and {len(known) - 2 * limit} more" if len(known) > 2 * limit else "")
