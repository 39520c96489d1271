"""What a method lets a search change: settings and the values worth trying, and a copy with some of them changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar

from tdconcepts.errors import BadType, BadValue, nearest

__all__ = ["Replaceable", "Tunable", "constructor"]

P = ParamSpec("P")
R = TypeVar("R", bound="Replaceable")


@dataclasses.dataclass(frozen=True)
class Tunable:
    """One setting of a method that a search may change: a range with a step, or a list of choices.

    Args:
        name: the constructor's argument.
        low, high: the ends of the range, both included.
        step: the distance of neighbouring values; an int range has an int step. On a logarithmic scale the factor
            between them.
        choices: the values, in place of a range.
        log: whether to search on a logarithmic scale; the range is then of positive numbers.

    Raises:
        BadValue: for neither or both of a range and choices, or an empty range.

    Examples:
        >>> Tunable("n_iter", 10, 100, 10).values()[:3]
        [10, 20, 30]
        >>> Tunable("method", choices=("gausslegendre", "riemann_middle")).values()
        ['gausslegendre', 'riemann_middle']
        >>> Tunable("epsilon", 0.001, 1.0, 10, log=True).values()
        [0.001, 0.01, 0.1, 1.0]
    """

    name: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[object, ...] = ()
    log: bool = False

    def __post_init__(self) -> None:
        is_range = self.low is not None and self.high is not None
        if is_range == bool(self.choices) or (is_range and not self.low <= self.high):  # type: ignore[operator]
            raise BadValue("not a tunable", got=repr(self), needed="low <= high, or choices")
        if is_range and self.log and not (self.low > 0 and (self.step is None or self.step > 1)):  # type: ignore[operator]
            raise BadValue("not a logarithmic scale", got=repr(self), needed="low > 0, and a step (a factor) > 1")

    def values(self) -> list[object]:
        """Every value of the grid.

        Raises:
            BadValue: for a range without a step.
        """
        if self.choices:
            return list(self.choices)
        if not self.step:
            raise BadValue(f"the tunable {self.name!r} has no grid", got="no step", needed="step=")
        low, high, step = self.low, self.high, self.step
        if self.log:
            count = round(math.log(high / low) / math.log(step))  # type: ignore[operator]
            return [float(f"{low * step**i:.12g}") for i in range(count + 1)]  # type: ignore[operator]
        count = round((high - low) / step)  # type: ignore[operator]
        whole = all(isinstance(v, int) for v in (low, high, step))
        return [v if whole else round(float(v), 12) for v in (low + i * step for i in range(count + 1))]  # type: ignore[operator]


class _Tunables:
    """``tunables`` of a class are its own, those of an instance also those of what it wraps."""

    def __init__(self, own: tuple[Tunable, ...]) -> None:
        self.own = own

    def __get__(self, one: Replaceable | None, cls: type[Replaceable]) -> tuple[Tunable, ...]:
        if one is None:
            return self.own
        made = _Made(one)
        found = {tunable.name: tunable for tunable in made.tunables or self.own}
        for argument, inner in made.wrapped().items():
            for tunable in inner.tunables:
                name = f"{argument}__{tunable.name}" if tunable.name in found else tunable.name
                found[name] = dataclasses.replace(tunable, name=name)
        return tuple(found.values())


class Replaceable:
    """What remembers how it was made, so that it can be made again with some arguments changed.

    A mixin, in front of the other bases; nothing needs to be called. ``tunables`` are the settings that a search may
    change: a tuple in the class. An instance has also those of what it wraps (of each of its arguments that is
    :class:`Replaceable` itself), under their own names, or as ``argument__name`` where the name is taken.

    Examples:
        >>> class Scaled(Replaceable):
        ...     tunables = (Tunable("factor", 1, 3, 1),)
        ...     def __init__(self, explainer, factor=1):
        ...         self.explainer, self.factor = explainer, factor
        >>> twice = Scaled(Scaled("any", 1), 2)
        >>> [tunable.name for tunable in twice.tunables]
        ['factor', 'explainer__factor']
        >>> changed = twice.replace(explainer__factor=3)
        >>> changed.factor, changed.explainer.factor, twice.explainer.factor
        (2, 3, 1)
    """

    tunables: Any = _Tunables(())
    _made: tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any], tuple[Tunable, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("tunables")
        if isinstance(own, tuple):
            cls.tunables = _Tunables(own)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        new = super().__new__(cls)
        _remember(new, None, args, kwargs)
        return new

    def replace(self, /, **changes: Any) -> Any:
        """A copy with some constructor arguments changed; the original stays as it is.

        It is built by the constructor, so that values are checked as there and ``out_keys`` are all selected. What is
        not changed is shared, not copied: the module, wrapped explainers, generators (which go on from their state).

        Args:
            changes: arguments by name, the options of ``**options`` among them. A name that only a wrapped explainer
                knows goes to it, and so does ``explainer__name``.

        Raises:
            BadType: for a name that is no argument.
        """
        made, inner = _Made(self), dict[str, dict[str, Any]]()
        for name, value in changes.items():
            home, own_name = made.home(name)
            if home is None:
                made.set(own_name, value)
            else:
                inner.setdefault(home, {})[own_name] = value
        for argument, some in inner.items():
            made.set(argument, made.bound.arguments[argument].replace(**some))
        return made.call()


def constructor(*tunables: Tunable) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that makes something :class:`Replaceable`, whose arguments are then those of ``replace``.

    Args:
        tunables: settings of what it makes; default: those that it has anyway.

    Examples:
        >>> class Power(Replaceable):
        ...     def __init__(self, exponent, base=2):
        ...         self.exponent, self.base = exponent, base
        >>> @constructor()
        ... def Square(base): return Power(2, base)
        >>> Square(3).replace(base=5).base
        5
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> R:
            new = make(*args, **kwargs)
            _remember(new, made, args, kwargs, tunables)
            return new

        return made

    return decorate


def _remember(
    new: Replaceable, make: Callable[..., Any] | None, args: Any, kwargs: Any, tunables: tuple[Tunable, ...] = ()
) -> None:
    """Past ``__setattr__``, which torch's modules do not have before their constructor; lists and dicts are copied."""
    args, kwargs = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
    new.__dict__["_made"] = make, args, kwargs, tunables


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else value


class _Made:
    """How something was made: by what, and from which arguments."""

    def __init__(self, one: Replaceable) -> None:
        make, args, kwargs, self.tunables = one._made
        cls: Any = type(one)
        self.make: Any = cls if make is None else make
        self.names, self.options, signature = _arguments(self.make, cls)
        self.bound = signature.bind_partial(*args, **kwargs)

    def wrapped(self) -> dict[str, Replaceable]:
        return {name: one for name, one in self.bound.arguments.items() if isinstance(one, Replaceable)}

    def settings(self) -> list[str]:
        """Every name that ``replace`` takes, without those that begin with an argument."""
        return [*self.names, *(name for one in self.wrapped().values() for name in _Made(one).settings())]

    def home(self, name: str) -> tuple[str | None, str]:
        """Whose argument ``name`` is (None: one's own), and how it is called there."""
        at, _, rest = name.partition("__")
        if name in self.names:
            return None, name
        if rest and at in self.wrapped():
            return at, rest
        for argument, one in self.wrapped().items():
            if name in _Made(one).settings():
                return argument, name
        title, needed = self.make.__name__, nearest(name, dict.fromkeys(self.settings()))
        raise BadType(f"{title} has no argument {name!r}", got=f"replace({name}=...)", needed=needed)

    def set(self, name: str, value: Any) -> None:
        if name in self.bound.signature.parameters:
            self.bound.arguments[name] = value
        else:
            self.bound.arguments[self.options] = {**self.bound.arguments.get(self.options, {}), name: value}

    def call(self) -> Any:
        try:
            return self.make(*self.bound.args, **self.bound.kwargs)
        except TypeError as error:  # of Python: an argument that the function passes on is given twice
            if isinstance(error, BadType):
                raise
            raise BadType(f"{self.make.__name__} does not take these arguments", got=str(error)) from error


@functools.cache
def _arguments(make: Any, cls: Any) -> tuple[list[str], str, inspect.Signature]:
    """The names that a constructor takes, the name of its ``**options`` (or ""), and its signature."""
    function = inspect.unwrap(make.__init__ if make is cls else make)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[make is cls :]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if options is not None:
        kind = str(options.annotation).removeprefix("Unpack[").removesuffix("]")
        found = function.__globals__.get(kind)
        if hasattr(found, "__optional_keys__"):
            names += sorted(found.__optional_keys__ | found.__required_keys__)
        elif make is not cls:  # passed on to the class
            names += [name for name in _arguments(cls, cls)[0] if name not in names]
    return names, options.name if options is not None else "", signature.replace(parameters=parameters)
