"""From a site or an entry to its places in one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.hooks.contexts import hold, release
from tdconcepts.hooks.sites import Place, Site, matches, module_paths, place_of_entry, places
from tdconcepts.hooks.stages import writer
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["anchor", "locate", "one_place"]


def locate(model: nn.Module, what: NestedKey | Site, paths: Mapping[str, nn.Module] | None = None) -> list[Place]:
    """The places of a site (several where its path is a glob), or the one place where an entry is written.

    Args:
        model: where to look.
        what: a site, or the key of an entry.
        paths: the modules by path, where they are known already.

    Raises:
        BadKey: where there is none.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ["x"], ["y"])
        >>> [place.name for place in locate(net, Site("*"))], locate(net, "y")[0].name
        (['0', '1'], "'y'")
    """
    if isinstance(what, Site):
        return places(model, what, paths)
    key = as_key(what)
    stage = writer(model, key) if isinstance(model, TensorDictModuleBase) else None
    if stage is None:
        written = list(getattr(model, "out_keys", []))
        named = isinstance(key, str) and matches(paths or module_paths(model), key)
        raise BadKey(
            f"the model writes no entry {key_text(key)}",
            got=key_text(key),
            needed=f"an entry that it writes: {nearest(key, written)}",
            fix=f"Site({key!r}) names a module" if named else None,
        )
    return [place_of_entry(stage, key)]


class anchor:  # noqa: N801 - used as capture and patch are
    """Put inert taps into a model *before* it is compiled, so that contexts entered later are obeyed.

    ``torch.compile`` guards a module's hooks only where it has some: a hook that comes later is silently ignored. With
    an anchor at the sites, entering and leaving a context is noticed (one graph more for each set of edited sites).
    Without one a context on a compiled model raises; a compiled *function* that calls the model can't be recognised,
    and there only an anchor makes contexts work.

    Args:
        model: the model that will be compiled.
        sites: sites or their texts, globs too.
        entries: entries of a pipeline that will be edited or explained.

    Raises:
        BadKey: a site or an entry that does not exist.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ["x"], ["y"])
        >>> held = anchor(net, "0")  # now compile, then capture and patch at "0"
        >>> held.remove()
    """

    def __init__(self, model: nn.Module, *sites: Site | str, entries: list[Any] | None = None) -> None:
        wanted: list[Any] = [Site.parse(site) for site in sites] + list(entries or [])
        paths = module_paths(model)
        found = [place.module for what in wanted for place in locate(model, what, paths)]
        self._modules = list(dict.fromkeys((model, *found)))
        for module in self._modules:
            hold(module, "output")
            hold(module, "input")

    def remove(self) -> None:
        """Take the taps away again, those that no context holds."""
        for module in self._modules:
            release(module, "output")
            release(module, "input")
        self._modules = []

    def __enter__(self) -> anchor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def one_place(model: nn.Module, what: NestedKey | Site) -> Place:
    """The place of an entry, or of a site that names one.

    Args:
        model: where to look.
        what: a site, or the key of an entry.

    Raises:
        BadKey: where there is none. BadValue: for a site that names several.

    Examples:
        >>> one_place(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), Site("1")).name
        '1'
    """
    found = locate(model, what)
    call = found[0].call
    if len(found) > 1 or call == "all" or (isinstance(call, int) and call < -1):
        names = [place.name for place in found]
        raise BadValue(
            f"{what!r} names several places",
            got=f"{names[:6]}",
            needed="one",
            fix="a list of sites, each with one call",
        )
    return found[0]
