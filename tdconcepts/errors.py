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

    Args:
        what: what went wrong.
        got, needed, fix: the three lines, each where it is not None.

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
        self.args = ("\n".join(lines),)  # torch.compile can't trace the __init__ of Exception, and would hide the text

    def __str__(self) -> str:  # KeyError would print the repr, with its line breaks escaped
        return str(self.args[0])


class BadKey(TdConceptsError, KeyError):
    """A key, path or name that does not exist, clashes, or is not a key at all.

    Args:
        what, got, needed, fix: as for :class:`TdConceptsError`.

    Examples:
        >>> from tdconcepts.keys import as_key
        >>> try:
        ...     as_key(("agents", 1))
        ... except KeyError as error:
        ...     print(error)
        not a TensorDict key
          got:     1 (int)
          needed:  a string or a tuple of strings
          way out: ...
    """


class BadValue(TdConceptsError, ValueError):
    """A value, shape, index or state that the operation can't take.

    Args:
        what, got, needed, fix: as for :class:`TdConceptsError`.

    Examples:
        >>> issubclass(BadValue, ValueError)
        True
    """


class BadType(TdConceptsError, TypeError):
    """An object of the wrong kind, a bare ``nn.Module`` or an integer tensor asked for gradients among them.

    Args:
        what, got, needed, fix: as for :class:`TdConceptsError`.

    Examples:
        >>> issubclass(BadType, TypeError)
        True
    """


class MissingExtra(TdConceptsError, ImportError):
    """A package that one of the extras brings is not installed.

    Args:
        what, got, needed, fix: as for :class:`TdConceptsError`.

    Examples:
        >>> try:
        ...     import_extra("no_such_package", "report")
        ... except ImportError as error:
        ...     print(str(error).splitlines()[-1].strip())
        way out: pip install 'tdconcepts[report]'
    """


def import_extra(module: str, extra: str) -> Any:
    """The imported ``module``, or the command that installs the extra it comes with.

    Args:
        module: its name.
        extra: the extra of this package that brings it.

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

    Args:
        name: what was given.
        names: those that exist.
        limit: how many to name; twice as many where none is alike.

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
