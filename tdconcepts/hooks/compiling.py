"""A stage in one compiled graph, without what dynamo spends on asking whether libraries have changed."""

from __future__ import annotations

import itertools
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from tensordict.nn import TensorDictModuleBase, skip_existing
from torch import Tensor, nn
from torch.compiler import is_compiling

from tdconcepts.errors import BadType, BadValue, TdConceptsError, nearest
from tdconcepts.hooks.calling import explained, given, packed, set_entries
from tdconcepts.hooks.contexts import active
from tdconcepts.hooks.hooked import check_td
from tdconcepts.hooks.stages import check_module
from tdconcepts.keys import NestedKey, key_text

__all__ = ["CompileOptions", "Compiled"]

_LIMIT = 32  # graphs for one situation; torch's own limit, 8, is for code without a stage that changes
_KEPT = 16  # graphs for different situations; the one that was not used for longest goes first
_LIBRARIES = {"torch", "tensordict", "tdconcepts", "torchrl", "numpy"} | set(sys.stdlib_module_names)
_DEFINITIONS = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OF_A_FUNCTION = re.compile(r"__(kw)?defaults__|__closure__|__code__|__func__")
_GLOBAL = re.compile(r"\.\w+")
_OF_AN_INSTANCE = re.compile(r"\.\w+\.\w")
_OF_A_CLASS = re.compile(r"type\(([^()]+)\)")
_ROOT = re.compile(  # of a name in the guards of torch: a global of a module that was traced
    r"[a-z(]*(?:G\['(?:__import_(?P<library>[A-Za-z0-9_]+?)(?:_dot_\w+)?|__builtins_dict\w+|(?P<own>\w+))'\]"
    r"|__import__\('torch'\))(?P<rest>.*)"
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
_NUMBERS = itertools.count()


class CompileOptions(TypedDict, total=False):
    """The options of :class:`Compiled`: those of ``torch.compile`` by their names; ``fullgraph`` is always true.

    Args:
        backend: what compiles the graph; default: ``"inductor"``.
        dynamic: whether sizes are left open; default: from the second size on.
        options: of the backend, ``{"max_autotune": True}`` for one.
        recompile_limit: how often a graph may be compiled anew; default: 32.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> options: CompileOptions = {"backend": "eager", "dynamic": True}
        >>> net = Compiled(TensorDictModule(nn.Linear(4, 2), ["x"], ["y"]), **options)
        >>> net(x=torch.zeros(3, 4)).shape, net(x=torch.zeros(5, 4)).shape, net.compilations
        (torch.Size([3, 2]), torch.Size([5, 2]), 1)
    """

    backend: str | Callable[..., Any]
    dynamic: bool | None
    options: dict[str, Any]
    recompile_limit: int


class Compiled(TensorDictModuleBase):
    """``stage`` as one graph of ``torch.compile``: the same numbers, without the price of a TensorDict in a graph.

    | reads | writes |
    |---|---|
    | the stage's ``in_keys``, its ``optional_keys`` where they are there | the stage's ``out_keys`` |

    Entries are read and written in plain Python; what is compiled is a function of tensors. Of the guards that torch
    would look at before each call, those on the code of libraries are left out, which are most; all others are kept. So
    another shape, dtype, device or grad mode, ``train()``, ``requires_grad_()``, another submodule, parameter or
    attribute, a mode of tensordict and a context around the call are noticed, and compile another graph; hooks on a
    module, which torch itself ignores, too. New *values* of parameters and buffers are just used. What is not noticed
    is new code: a library's method or function that was replaced by another; then :meth:`reset`.

    Inside another ``torch.compile``, under ``torch.func`` transforms and under ``set_skip_existing``, for which
    tensordict has no graph, it is the stage itself. Hooks at sites need an :func:`anchor`, as in any compiled model.
    Checks that look at numbers (NaN in an entry) are not made in a graph. Copies and pickles have no graphs and compile
    their own. Its parameters are under ``stage.`` in the ``state_dict``.

    Args:
        stage: a TensorDictModule that torch can trace: an explainer, a pipeline, a policy. It is used, not copied.
        options: see :class:`CompileOptions`.

    Attributes:
        compilations: how many graphs have been compiled so far.

    Raises:
        BadType: for a bare ``nn.Module``, an option that is none, or an entry that is no tensor.
        BadValue: for what torch can't take as one graph, and when it would be compiled anew too often.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(nn.Linear(4, 2), ["x"], ["y"])
        >>> explain = Compiled(Gradient(net, Target("y", 0)), backend="eager")
        >>> td = explain(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))
        >>> torch.equal(td["attribution", "x"][2], net.module.weight[0])
        True
    """

    _compiles_inside = True  # contexts see by it that hooks inside would come too late

    def __init__(self, stage: TensorDictModuleBase, **options: Unpack[CompileOptions]) -> None:
        super().__init__()
        self.stage = check_module(stage, "stage")
        for name in options:
            if name not in CompileOptions.__annotations__:
                more = {"mode": 'options={"max_autotune": True} and the like', "fullgraph": "leave it out: it is true"}
                fix = more.get(name, nearest(name, CompileOptions.__annotations__))
                raise BadType(f"no option {name!r}", got=f"{name}={options[name]!r}", fix=fix)  # type: ignore[literal-required]
        self.options = options
        self.in_keys, self.out_keys = list(stage.in_keys), list(stage.out_keys)
        self.optional_keys: list[NestedKey] = list(getattr(stage, "optional_keys", ()))
        self._reads, self._writes = (*self.in_keys, *self.optional_keys), tuple(self.out_keys)
        self.compilations = 0
        self.reset()

    def reset(self) -> None:
        """Forget every graph: the next call compiles anew, whatever has changed."""
        self._graphs: dict[Any, Callable[..., tuple[Any, ...]]] = {}  # the one that was used last at the end
        self._last: tuple[Any, Any, bool] = (None, None, True)  # the situation, its graph, whether it was looked at
        self._met: list[nn.Module] = []
        self._listen()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage once: ``forward(tensordict, **settings)``, or on tensors as any stage of this package.

        ``settings`` are keyword arguments of the stage's ``forward``, constants in the graph. Tensors come without
        names in the order of ``in_keys``, or by name, and go without a TensorDict around them.
        """
        if not (args and isinstance(args[0], Tensor)) and (args or "tensordict" in kwargs):
            return self._on_entries(*args, **kwargs)
        entries, size = given(self.in_keys, args, kwargs)
        if self._steps_back():
            out = self.stage(packed(entries, size))
            found = tuple([out.get(key) for key in self._writes])
        else:
            keys, tensors = tuple(entries), list(entries.values())
            batch = len(size) if tensors else size
            found = self._found(keys, tensors, batch, None, {}, lambda: packed(entries, size))
        return found[0] if len(found) == 1 else found

    def _on_entries(self, tensordict: TensorDictBase, **settings: Any) -> TensorDictBase:
        if self._steps_back():
            return self.stage(tensordict, **settings)
        check_td(tensordict)
        tensors = [tensordict.get(key, None) for key in self._reads]
        batch = tensordict.batch_dims if tensors else tensordict.batch_size
        found = self._found(self._reads, tensors, batch, tensordict.device, settings, lambda: tensordict)
        entries = {key: value for key, value in zip(self._writes, found, strict=True) if value is not None}
        return set_entries(tensordict, entries)

    def _steps_back(self) -> bool:
        """Whether the stage itself is to run: something else compiles or transforms it, or steers its keys."""
        return is_compiling() or torch._C._functorch.maybe_current_level() is not None or skip_existing()

    def _found(
        self,
        keys: tuple[NestedKey, ...],
        tensors: list[Any],
        batch: Any,
        device: Any,
        settings: dict[str, Any],
        whole: Callable[[], TensorDictBase],
    ) -> tuple[Any, ...]:
        """What the graph makes of the entries ``keys``; ``whole`` gives the TensorDict, for a look at it and errors."""
        apart = torch.is_inference_mode_enabled()
        if apart or not all([isinstance(value, Tensor) and not value.is_inference() for value in tensors]):  # noqa: C419
            keys, tensors = _tensors(keys, tensors)
        graph = self._graph(keys, batch, device, settings)
        if not self._last[2]:
            self._look(whole(), settings)
        try:
            found, masks = _outside(graph, tensors) if apart else graph(*tensors)
        except Exception as error:
            raise self._reason(error, whole(), settings) from error
        if self._met:
            self._listen()
        if not masks:
            return found
        return tuple([value.view(torch.bool) if i in masks else value for i, value in enumerate(found)])

    def _graph(self, keys: Any, batch: Any, device: Any, settings: dict[str, Any]) -> Callable[..., tuple[Any, ...]]:
        """The compiled function for these entries under the hooks and contexts of now."""
        hooks = tuple(itertools.chain.from_iterable(self._hooks))  # torch's numbers, each given once
        runs = active()
        around = tuple([run.plan for run in runs]) if runs else ()
        also = _constants(settings) if settings else ()
        situation = keys, batch, device, hooks, around, also
        if situation == self._last[0]:
            return self._last[1]
        graph = self._graphs.pop(situation, None)
        self._last = situation, graph or self._compiled(keys, batch, device, settings), graph is not None
        self._graphs[situation] = graph = self._last[1]
        if len(self._graphs) > _KEPT:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def _compiled(self, keys: Any, batch: Any, device: Any, settings: dict[str, Any]) -> Callable[..., Any]:
        stage, out_keys = self.stage, self._writes
        options: dict[str, Any] = {"recompile_limit": _LIMIT, **self.options}
        by_inductor = options.get("backend", "inductor") == "inductor"

        def run(*tensors: Tensor) -> tuple[Any, ...]:
            size = tensors[0].shape[:batch] if tensors else batch
            td = TensorDict({}, batch_size=size, device=device)
            for key, value in zip(keys, tensors, strict=True):
                td.set(key, value)
            out = stage(td, **settings)
            found = [out.get(key, None) for key in out_keys]
            masks = [i for i, value in enumerate(found) if by_inductor and _is_mask(value)]
            for i in masks:  # inductor writes bytes sixteen at a time, and bools one by one
                found[i] = found[i].to(torch.int32).to(torch.uint8)
            return tuple(found), tuple(masks)

        # Code of its own: torch keeps graphs, and what it has learned of sizes, with the code that they are of.
        code = run.__code__.replace(co_name=f"{type(stage).__name__}_{next(_NUMBERS)}")
        own = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
        inner: dict[str, Any] = {"guard_filter_fn": self._filter}
        if by_inductor:
            inner["size_asserts"] = False  # the guards on tensors say it already
        inner |= options.pop("options", {})
        return torch.compile(own, fullgraph=True, options=inner, **options)

    def _look(self, tensordict: TensorDictBase, settings: dict[str, Any]) -> None:
        """Run a stage that sees errors only without the compiler, and says so by ``looks_first``, before its graph."""
        try:
            if getattr(self.stage, "looks_first", False):
                self.stage(tensordict.copy(), **settings)
        except Exception:
            self.reset()  # the graph must not be there when this input comes again
            raise
        self._last = *self._last[:2], True

    def _filter(self, entries: Sequence[Any]) -> list[bool]:
        """Which guards are kept; torch asks whenever it has compiled a graph."""
        self.compilations += 1
        self._met = [entry.value for entry in entries if isinstance(entry.value, nn.Module)]
        return _needed(entries)

    def _listen(self) -> None:
        """Find the hooks of all modules that were met, those outside of ``stage.modules()`` among them."""
        modules = dict.fromkeys([*self.stage.modules(), *self._met])
        self._hooks = [*_GLOBAL_HOOKS, *(vars(module)[name] for module in modules for name in _HOOKS)]
        self._met = []

    def _reason(self, error: Exception, tensordict: TensorDictBase, settings: dict[str, Any]) -> Exception:
        """What to say of an error: what the stage itself says of this input, or else that torch can't compile it."""
        if isinstance(error, TdConceptsError):
            return error
        kind = type(error)
        if kind.__name__ == "FailOnRecompileLimitHit":
            return BadValue(
                "the stage has been compiled anew too often",
                got=f"{self.compilations} graphs so far",
                needed="inputs and a model that change less from call to call",
                fix='TORCH_LOGS="recompiles" says what changes; dynamic=True, recompile_limit=..., or .reset()',
            )
        if not kind.__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch")):
            return explained(error, self.in_keys, tensordict)
        try:
            self.stage(tensordict.copy(), **settings)
        except Exception as own:
            return explained(own, self.in_keys, tensordict)
        why = re.findall(r"\A\s*(.+)|Developer debug context: (.+)", str(error))
        hooks = "hooks can't be installed" in str(error)
        return BadValue(
            f"torch.compile can't take {type(self.stage).__name__} as one graph",
            got=": ".join(first or then for first, then in why) or type(error).__name__,
            needed="taps from before" if hooks else "a stage that torch traces from end to end",
            fix="anchor(model, ...) first, at the sites and at the modules that have rules"
            if hooks
            else "call the stage itself, or compile a part of it",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphs": {}, "_last": (None, None, True), "_met": [], "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listen()


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool and value.is_cpu


def _needed(entries: Sequence[Any]) -> list[bool]:
    """Which guards are worth their time: each once, and none that only asks if a library's code is still the same."""
    seen: set[str] = set()
    values = {entry.name: entry.value for entry in entries}
    return [
        not (
            _is_code(e, values) or e.guard_type == "FUNCTORCH_STACK_MATCH" or _again(e, seen)
        )  # that stack is empty here
        for e in entries
    ]


def _again(entry: Any, seen: set[str]) -> bool:
    known = entry.guard_type == "CONSTANT_MATCH" and entry.name in seen
    if entry.guard_type == "CONSTANT_MATCH":
        seen.add(entry.name)
    return known


def _is_code(entry: Any, values: dict[str, Any]) -> bool:
    """Whether a guard asks for a module, class or function of a library, or for what these hold.

    What instances hold, and switches, are not code: the modes of tensordict and the contexts of this package are such.
    """
    value, name = entry.value, entry.name
    if isinstance(value, _DEFINITIONS):
        return _is_ours(value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None))
    if entry.guard_type == "NOT_PRESENT_IN_GENERIC_DICT":  # that a method is the one of its class
        return not isinstance(value, nn.Module) and _is_ours(type(value).__module__)
    of_a_function = _OF_A_FUNCTION.search(name) is not None
    root = _ROOT.match(name)
    if root is None:
        of = _OF_A_CLASS.search(name)
        return of_a_function and of is not None and of[1] in values and _is_ours(type(values[of[1]]).__module__)
    at_home = root["own"] in globals() if root["own"] else root["library"] is None or root["library"] in _LIBRARIES
    switch = (value is None or isinstance(value, bool)) and _GLOBAL.fullmatch(root["rest"])
    return at_home and (of_a_function or not (switch or _OF_AN_INSTANCE.match(root["rest"])))


def _is_ours(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def _constants(settings: dict[str, Any]) -> tuple[Any, ...]:
    for name, value in settings.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise BadType(
                f"a setting of a compiled stage is a constant in its graph, and {name}= can't be one",
                got=type(value).__name__,
                needed="a number, a string, a bool or None",
                fix="data travel in the TensorDict: give tensors as entries",
            )
    return tuple([(name, type(value), value) for name, value in sorted(settings.items())])


def _tensors(keys: Sequence[NestedKey], values: Sequence[Any]) -> tuple[tuple[NestedKey, ...], list[Tensor]]:
    """What is there, as tensors that autograd takes, or the error that says which entry is no tensor."""
    there = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
    for key, value in there:
        if not isinstance(value, Tensor):
            group = isinstance(value, TensorDictBase) and not is_non_tensor(value)
            raise BadType(
                f"the entry {key_text(key)} is no tensor, and a compiled stage takes nothing else",
                got=f"a group of entries {list(value.keys())}" if group else type(value).__name__,
                needed="tensors",
                fix="a stage whose in_keys name the entries of the group" if group else "call the stage itself",
            )
    with torch.inference_mode(False):
        return tuple([key for key, _ in there]), [v.clone() if v.is_inference() else v for _, v in there]


def _outside(graph: Callable[..., tuple[Any, ...]], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Run a graph outside of inference mode, where torch could not compile a gradient."""
    with torch.inference_mode(False), torch.no_grad():
        return graph(*tensors)
