"""Sites: the names of activations inside a model, how they print, parse and resolve."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from tensordict.nn import TensorDictModuleBase, TensorDictModuleWrapper
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Place", "Site", "is_compiled", "matches", "module_paths", "parameter_paths", "place_of_entry", "places"]

Index: TypeAlias = Any  # int | slice | Ellipsis | list of int | tuple of these
_TEXT = re.compile(
    r"(?P<path>[^:\[\]@]*)(?::(?P<side>in|out)(?:put)?(?:\.(?P<leaf>[^\[@]+))?)?(?:\[(?P<index>.*)\])?(?:@(?P<call>-?\d+|all))?"
)
_ROOT = "."


@dataclasses.dataclass(frozen=True, eq=True)
class Site:
    """The name of an activation inside a model: what a module writes, or what it is given.

    Text form: ``path[:in|:out[.leaf]][index][@call]``, as in ``encoder.2:in[..., 4]`` or ``lstm:out.0@-1``;
    :meth:`parse` reads what ``str`` prints.

    Args:
        path: the module's path as ``model.named_modules()`` has it, without the ``module.`` layers that TensorDict
            wrappers add (with them it works too). ``*`` stands for one part of a path, ``**`` for any number of parts
            (of modules that can be called: not of a ``ModuleList``), ``"."`` for the model itself.
        side: ``"output"`` (default) or ``"input"``.
        index: which part, as one would index *one row* of the activation (after the batch dims): an int, a slice,
            ``...``, a list of ints, or a tuple of these. Default: all of it.
        call: which call, where the module runs several times in one forward: ``0``, ``-1``, or ``"all"``. Default:
            the only call; where there are more, reading raises and editing edits each.
        leaf: which tensor, where the module writes or is given several: a position, a name (of a keyword, a dict entry,
            a field, a TensorDict key), or a tuple of these for nested ones. Default: the only one.

    Raises:
        BadValue: for a side, index or call that is none.

    Examples:
        >>> Site("encoder.2", "input", index=(..., 4))
        Site('encoder.2:in[..., 4]')
        >>> Site.parse("blocks.*.attn:out.0@-1")
        Site('blocks.*.attn:out.0@-1')
    """

    path: str
    side: Literal["output", "input"] = "output"
    index: Index = None
    call: int | Literal["all"] | None = None
    leaf: int | str | tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise BadType("a Site's path is a string", got=repr(self.path), fix="Site.parse() reads the text form")
        side = {"in": "input", "out": "output"}.get(self.side, self.side)
        if side not in ("output", "input"):
            raise BadValue("a module has no such side", got=repr(self.side), needed='"output" or "input"')
        if not (self.call is None or self.call == "all" or type(self.call) is int):
            raise BadValue("not a call", got=repr(self.call), needed='None, an int such as 0 or -1, or "all"')
        if self.index is not None:
            index = self.index if isinstance(self.index, tuple) else (self.index,)
            if not index or sum(part is Ellipsis for part in index) > 1 or not all(map(_is_index, index)):
                raise BadValue(
                    "not an index", got=repr(self.index), needed="ints, slices, lists of ints and at most one ..."
                )
            object.__setattr__(self, "index", index)
        if isinstance(self.leaf, tuple) and len(self.leaf) == 1:
            object.__setattr__(self, "leaf", self.leaf[0])
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "path", self.path or _ROOT)

    def __hash__(self) -> int:  # slices and lists have no hash
        return hash((self.path, self.side, self.call))

    def __str__(self) -> str:
        leaf = (
            ""
            if self.leaf is None
            else "." + ".".join(map(str, self.leaf if isinstance(self.leaf, tuple) else (self.leaf,)))
        )
        side = ":in" if self.side == "input" else ":out" if leaf else ""
        index = "" if self.index is None else "[" + ", ".join(map(_index_text, self.index)) + "]"
        return f"{self.path}{side}{leaf}{index}" + ("" if self.call is None else f"@{self.call}")

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    @property
    def key(self) -> str:
        """The name under which results for this site are written: its text form."""
        return str(self)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site that ``text`` names; a :class:`Site` is returned as it is.

        Raises:
            BadValue: for a text that is none, with the grammar.
        """
        if isinstance(text, Site):
            return text
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or not match["path"]:
            grammar = "path[:in|:out[.leaf]][index][@call], as in 'encoder.2:in[..., 4]'"
            raise BadValue("not a site", got=repr(text), needed=grammar)
        parts = [part for part in (match["leaf"] or "").split(".") if part]
        leaf = tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts)
        return cls(
            match["path"],
            "input" if match["side"] == "in" else "output",
            index=None if match["index"] is None else _parse_index(match["index"]),
            call=int(match["call"]) if match["call"] not in (None, "all") else match["call"],  # type: ignore[arg-type]
            leaf=None if not leaf else leaf[0] if len(leaf) == 1 else leaf,
        )


class Place(NamedTuple):
    """A site in one model: the module itself, and how to find the tensor in what it writes or is given."""

    what: Site | NestedKey
    name: str
    module: nn.Module
    side: str
    part: tuple[Any, ...] | None
    call: int | str | None
    leaf: Any
    out_keys: tuple[NestedKey, ...] | None  # of a TensorDictModule, which answers a call with tensors by tensors


def module_paths(root: nn.Module, full: bool = False) -> dict[str, nn.Module]:
    """Every module under ``root`` by its path, without the layers that TensorDict, DDP and compile wrappers add.

    With ``full`` the paths of ``named_modules``. A module with two names has both.
    """
    found: dict[str, nn.Module] = {_ROOT: root}
    _walk(root, "", full, found, ())
    return found


def parameter_paths(root: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under ``root`` by its path, as :func:`module_paths` has those of modules.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> list(parameter_paths(TensorDictModule(nn.Sequential(nn.Linear(2, 1)), ["x"], ["y"])))
        ['0.weight', '0.bias']
    """
    found: dict[str, nn.Parameter] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(f"{path}{name}", parameter)
        hidden = _hidden(module)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, path if name == hidden else f"{path}{name}.")

    visit(root, "")
    return found


def places(root: nn.Module, site: Site, paths: Mapping[str, nn.Module] | None = None) -> list[Place]:
    """Where ``site`` is in ``root``: one place, or several where its path is a glob, in the order of the model.

    A glob means each entry of a stage that has several; a path that is spelled out has to say which, by ``leaf``.

    Raises:
        BadKey: when nothing matches, with the nearest paths.
    """
    paths = module_paths(root) if paths is None else paths
    names = matches(paths, site.path)
    if not names:
        full = module_paths(root, full=True)
        names = matches(full, site.path)
        paths = full if names else paths
    if not names:
        raise BadKey(
            f"no module at path {site.path!r}",
            got=repr(site),
            needed=f"a path in {type(root).__name__}: " + nearest(site.path, [p for p in paths if p != _ROOT]),
            fix='a TensorDict entry is named by its key alone; Site("...") names a module',
        )
    if names == [site.path]:
        return [_place(site, paths[site.path])]
    found = [(dataclasses.replace(site, path=name), paths[name]) for name in names]
    return [_place(one, module) for site, module in found for one in _each_entry(site, module)]


def place_of_entry(stage: nn.Module, key: NestedKey) -> Place:
    """The place where ``stage`` writes the entry ``key``: an edit there is seen by every later stage."""
    return Place(as_key(key), key_text(key), stage, "output", None, None, as_key(key), tuple(_out_keys(stage)))


def _out_keys(stage: nn.Module) -> list[NestedKey]:
    return stage.out_keys if isinstance(stage, TensorDictModuleBase) else []


def _each_entry(site: Site, module: nn.Module) -> list[Site]:
    """The site, or one for each entry that the stage there has."""
    keys = getattr(module, f"{site.side[:-3]}_keys", ()) if isinstance(module, TensorDictModuleBase) else ()
    named = [key for key in keys if key != "_"]
    if site.leaf is not None or len(named) < 2:
        return [site]
    return [dataclasses.replace(site, leaf=key) for key in named]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile(model)`` or ``Compiled`` gave, or has had its ``compile()`` called."""
    ours = getattr(type(module), "_compiles_inside", False)
    return ours or "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _place(site: Site, module: nn.Module) -> Place:
    out_keys = tuple(module.out_keys) if isinstance(module, TensorDictModuleBase) else None
    return Place(site, site.key, module, site.side, site.index, site.call, site.leaf, out_keys)


def matches(paths: Mapping[str, nn.Module], path: str) -> list[str]:
    """The paths of modules that ``path`` names, several where it is a glob."""
    if path in paths:
        return [path]
    if "*" not in path:
        return []
    glob = "".join({"**": ".*", "*": "[^.]*"}.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*)", path))
    pattern = re.compile(glob)
    found: dict[nn.Module, str] = {}
    for name, module in paths.items():
        if name != _ROOT and pattern.fullmatch(name) and _has_forward(module):
            found.setdefault(module, name)  # a module with two names is one place
    return list(found.values())


def _has_forward(module: nn.Module) -> bool:
    """Whether ``module`` can be called at all: a ModuleList can't, so a glob does not mean it."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _walk(module: nn.Module, path: str, full: bool, found: dict[str, nn.Module], above: tuple[nn.Module, ...]) -> None:
    hidden = None if full else _hidden(module)
    for name, child in module._modules.items():
        if child is None or child in above:
            continue
        below = path if name == hidden else f"{path}.{name}" if path else name
        if name != hidden:
            found.setdefault(below, child)
        _walk(child, below, full, found, (*above, module))


def _hidden(module: nn.Module) -> str | None:
    """The name of the child that a wrapper wraps."""
    if isinstance(module, TensorDictModuleWrapper):
        return "td_module"
    if isinstance(module, (TensorDictModuleBase, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None


def _is_index(part: Any) -> bool:
    if isinstance(part, list):
        return bool(part) and all(type(item) is int for item in part)
    if isinstance(part, slice):
        return all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))
    return part is Ellipsis or type(part) is int


def _index_text(part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if isinstance(part, slice):
        start, stop = ("" if bound is None else str(bound) for bound in (part.start, part.stop))
        return f"{start}:{stop}" + ("" if part.step is None else f":{part.step}")
    return str(part)


def _parse_index(text: str) -> tuple[Any, ...]:
    try:
        tree = ast.parse(f"x[{text}]", mode="eval").body
        return tuple(map(_evaluate, tree.slice.elts)) if isinstance(tree.slice, ast.Tuple) else (_evaluate(tree.slice),)  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError):
        raise BadValue(
            "not an index", got=f"[{text}]", needed="ints, slices, lists of ints and at most one ..."
        ) from None


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Slice):
        return slice(*(None if bound is None else _evaluate(bound) for bound in (node.lower, node.upper, node.step)))
    return ast.literal_eval(node)
