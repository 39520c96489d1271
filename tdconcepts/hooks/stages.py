"""The stages of a pipeline: flatten a TensorDictSequential, cut it at a key, keep what an output needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadType, nearest
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["check_module", "containers", "cut", "needed", "overwrites_nothing", "stages", "writer"]


def check_module(module: object, what: str = "module") -> TensorDictModuleBase:
    """Return ``module`` if it is a TensorDictModule, else raise with the line to write.

    Args:
        module: what was given.
        what: its name, for the error.

    Raises:
        BadType: for a bare ``nn.Module`` or anything else without ``in_keys`` and ``out_keys``.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["logits"])
        >>> check_module(net) is net
        True
    """
    if isinstance(module, TensorDictModuleBase):
        return module
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, TensorDictModuleBase):
        raise BadType(
            f"{what} is compiled",
            got=f"torch.compile({type(original).__name__})",
            needed="the TensorDictModule itself",
            fix="explain or hook the module first, then compile what you got: torch.compile(Gradient(module, ...))",
        )
    kind = f"a bare {type(module).__name__}" if isinstance(module, nn.Module) else f"{type(module).__name__}"
    raise BadType(
        f"{what} is not a TensorDictModule",
        got=kind,
        needed="a TensorDictModuleBase with in_keys and out_keys",
        fix='TensorDictModule(module, in_keys=["observation"], out_keys=["logits"])',
    )


def stages(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """The modules of a pipeline in the order in which they run, nested sequentials flattened.

    Running them one after the other on a TensorDict is the same as running ``module``. What has a ``forward`` of its
    own is one stage, a probabilistic sequential (whose last stage is run with care for log-probabilities) among them.

    Args:
        module: the pipeline.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> body = TensorDictSequential(Mod(nn.Linear(4, 3), ["x"], ["h"]), Mod(nn.Tanh(), ["h"], ["z"]))
        >>> [m.out_keys for m in stages(TensorDictSequential(body, Mod(nn.Linear(3, 2), ["z"], ["logits"])))]
        [['h'], ['z'], ['logits']]
    """
    return [stage for child in _children(module) for stage in stages(child)] or [module]


def cut(module: TensorDictModuleBase, key: NestedKey) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
    """The stages up to and including the last one that writes ``key``, and the stages after it.

    Args:
        module: the pipeline.
        key: an entry that one of its stages writes.

    Raises:
        BadKey: when no stage writes ``key``, with the keys that can be cut at.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> model = TensorDictSequential(Mod(nn.Linear(4, 3), ["x"], ["h"]), Mod(nn.Linear(3, 2), ["h"], ["y"]))
        >>> [len(part) for part in cut(model, "h")]
        [1, 1]
    """
    key, found = as_key(key), _opened(module)
    last = _last_writer(found, key)
    if last is None:
        raise BadKey(
            f"no stage of the model writes {key_text(key)}",
            got=f"stages that write {[k for stage in found for k in stage.out_keys]}",
            needed="a key that the model writes between two stages",
            fix=nearest(key, [k for stage in found for k in stage.out_keys]),
        )
    return found[: last + 1], found[last + 1 :]


def writer(module: TensorDictModuleBase, key: NestedKey) -> TensorDictModuleBase | None:
    """The last stage that writes ``key``, or None; probabilistic sequentials are looked into as well."""
    found = [stage for stage, _ in _deep(module)]
    last = _last_writer(found, as_key(key))
    return None if last is None else found[last]


def needed(
    module: TensorDictModuleBase, outputs: Iterable[NestedKey], keep: Sequence[nn.Module] = ()
) -> list[TensorDictModuleBase]:
    """The stages that ``outputs`` depend on, in order: a policy's logits are explained without sampling an action.

    A probabilistic sequential whose last stage is needed is run as a whole.

    Args:
        module: the pipeline.
        outputs: entries that are wanted.
        keep: modules that must run in any case; the stages that hold them stay, and so does what these need.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> model = TensorDictSequential(Mod(nn.Linear(4, 3), ["x"], ["h"]), Mod(nn.Linear(3, 2), ["h"], ["y"]))
        >>> [stage.out_keys for stage in needed(model, ["h"])]
        [['h']]
    """
    wanted = {as_key(key) for key in outputs}
    kept: list[TensorDictModuleBase] = []
    found = _deep(module)
    position = len(found) - 1
    while position >= 0:
        stage, whole = found[position]
        position -= 1
        if not any(overlap(key, wanted) for key in stage.out_keys) and not any(
            inner in keep for inner in (stage.modules() if keep else ())
        ):
            continue
        if whole is not None:  # the last stage of a probabilistic sequential: all of it
            stage, inside = whole, {inner for inner, _ in _deep(whole)}
            while position >= 0 and found[position][0] in inside:
                position -= 1
        wanted.difference_update(key for key in stage.out_keys if key not in stage.in_keys)
        wanted.update(stage.in_keys)
        kept.append(stage)
    return kept[::-1]


def containers(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """The sequentials that can be taken apart: running their stages passes by what is hooked on them."""
    inside = _listed(module) if _is_probabilistic(module) else _children(module, fused=True)
    return [module, *(inner for child in inside for inner in containers(child))] if inside else []


def overlap(key: NestedKey, keys: Iterable[NestedKey]) -> bool:
    """Whether ``key`` is among ``keys``, is below one of them, or holds one of them."""
    path = join(key)
    return any(path[: len(join(other))] == join(other)[: len(path)] for other in keys)


def _last_writer(found: list[TensorDictModuleBase], key: NestedKey) -> int | None:
    return next((i for i in range(len(found) - 1, -1, -1) if key in found[i].out_keys), None)


def _children(module: TensorDictModuleBase, fused: bool = False) -> list[TensorDictModuleBase]:
    """The direct stages of a plain sequential; none for one with its own forward, a tolerance or selected keys.

    With ``fused`` also those of one that runs its stages in one go, and says so by ``is_sequence``.
    """
    plain = type(module).forward is TensorDictSequential.forward or (fused and getattr(module, "is_sequence", False))
    if not plain or getattr(module, "partial_tolerant", False):
        return []
    if getattr(module, "_select_before_return", False) or is_watched(module):
        return []
    return _listed(module)


def _listed(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    held = module.module
    children = list(held.values()) if isinstance(held, nn.ModuleDict) else list(held)
    return children if all(isinstance(child, TensorDictModuleBase) for child in children) else []


def overwrites_nothing(module: nn.Module) -> bool:
    """Whether nothing in ``module`` is known to change an activation in place: not so of any forward not torch's own.

    Examples:
        >>> overwrites_nothing(nn.Sequential(nn.Linear(4, 2), nn.ReLU())), overwrites_nothing(nn.ReLU(inplace=True))
        (True, False)
    """
    return all(map(_overwrites_nothing, module.modules()))


def _overwrites_nothing(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("torch.nn.modules.", "tensordict."))
    return (known and getattr(module, "inplace", False) is not True) or isinstance(module, TensorDictModuleBase)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hangs hooks on the container itself, which running its stages would pass by."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "inert", False) for hook in hooks)


def _opened(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """As :func:`stages`, with a probabilistic sequential (the outermost) opened too: it can be cut between stages."""
    if _is_probabilistic(module):
        return [stage for child in _listed(module) for stage in stages(child)] or [module]
    return stages(module)


def _deep(module: TensorDictModuleBase) -> list[tuple[TensorDictModuleBase, TensorDictModuleBase | None]]:
    """Every stage, probabilistic sequentials opened; the last stage of one of these comes with the whole of it."""
    if _is_probabilistic(module):
        *before, last = _listed(module)
        return [pair for child in before for pair in _deep(child)] + [(last, module)]
    children = _children(module, fused=True)
    return [pair for child in children for pair in _deep(child)] if children else [(module, None)]


def _is_probabilistic(module: TensorDictModuleBase) -> bool:
    kind = type(module).forward is ProbabilisticTensorDictSequential.forward
    return kind and not is_watched(module) and bool(_listed(module))
