"""What every explainer shares: its keys, its options, its chunks, and how results are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks.batching import check_chunk_size, joined, pieces_of, rows_of, slices, tracked, widths
from tdconcepts.hooks.calling import check_norms, explained, norms_of, set_entries
from tdconcepts.hooks.hooked import check_td
from tdconcepts.hooks.pullback import Pullback, Wrt
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.targets import Target
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, check_writable, join, key_text

__all__ = ["HELD", "Explaining", "Options", "Running", "check_options", "check_running", "finite"]

T = TypeVar("T")
_FEW = 8  # targets

HELD = "held target"  # one flat key: where a wrapper tells its explainer which index "argmax" chose at the clean input


class Running(TypedDict, total=False):
    """How an explainer goes about its work; none of these changes a result.

    Args:
        chunk_size: how many rows may be in flight; results do not depend on it. Default: chosen from the size of a row
            (:func:`~tdconcepts.hooks.batching.rows_of`).
        progress: show a progress bar for each long loop: True for tqdm's, or what makes one, called as
            ``progress(pieces, desc="path")``, ``tqdm.auto.tqdm`` for one. Never in worker processes.
        check_finite: raise for NaN or infinity in an entry that is explained, with its key and row. Default: on a CPU
            yes, on a GPU (which would have to be waited for) and while compiling no.
    """

    chunk_size: int | None
    progress: bool | Callable[..., Any]
    check_finite: bool | None


class Options(Running, total=False):
    """The options that every explainer takes, besides those of :class:`Running`.

    Args:
        outputs: also write the module's own ``out_keys``, from the same forward: an explained policy is still a policy.
            ``by=`` then means what the module has just written.
        create_graph: keep the graph of the results, for derivatives of an explanation; else they are detached.
        out_key: the first part of the keys that are written, ``"attribution"`` by default.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> options: Options = {"outputs": True, "out_key": "why", "chunk_size": 64}
        >>> Gradient(net, Target("y", 0), **options).out_keys
        [('why', 'x'), 'y']
    """

    outputs: bool
    create_graph: bool
    out_key: NestedKey


class Explaining:
    """The part of an explainer that is the same for all: bind, run in chunks, write.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        options: see :class:`Options`.
        extra: further keys that the explainer writes.
        rules: changed backward passes to explain by; whoever gives them checks the options.
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None,
        options: Mapping[str, Any],
        extra: Callable[[Explaining], list[NestedKey]] | None = None,
        rules: Any = None,
    ) -> None:
        if rules is None:
            check_options(options, [*Running.__annotations__, *Options.__annotations__])
        self.chunk_size, self.progress, self.check_finite = check_running(options)
        self.outputs = bool(options.get("outputs", False))
        self.create_graph = bool(options.get("create_graph", False))
        self.out_key = as_key(options.get("out_key", ATTRIBUTION))
        self._room = join(self.out_key)[0]
        self.pullback = Pullback(module, target, wrt, whole=self.outputs, rules=rules)
        self.in_keys, self.widths, self._norms = self.pullback.in_keys, widths(module), norms_of(module)
        self.entries = [w for w in self.pullback.wrt if not isinstance(w, Site) and w in self.in_keys]
        self.attribution_keys: list[NestedKey] = [as_key(join(self.out_key, name)) for name in self.pullback.names]
        self.out_keys = [
            *self.attribution_keys,
            *(extra(self) if extra else []),
            *(module.out_keys if self.outputs else []),
        ]
        own = self.out_keys[: len(self.out_keys) - len(module.out_keys)] if self.outputs else self.out_keys
        check_writable(own, self.in_keys)
        check_writable([*own, *dict.fromkeys(module.out_keys)] if self.outputs else own)

    def run(
        self, td: TensorDictBase, attribute: Callable[[TensorDictBase, Tensor | None], dict[NestedKey, Tensor]]
    ) -> TensorDictBase:
        """Write what ``attribute(part, held)`` gives for each chunk of the batch, and return ``td``."""
        self.check(td)
        held = td.get(HELD)
        rows = self.pieces(td)
        if rows is None:
            results = attribute(td, held)
        else:
            cut = list(slices(td, rows))
            parts = [
                attribute(part, None if held is None else held[index])
                for index, part in tracked(cut, self.progress, "rows")
            ]
            results = {key: joined([part[key] for part in parts], td.batch_size, rows) for key in parts[0]}
        return set_entries(td, results)

    def check(self, td: TensorDictBase) -> None:
        """Raise, before anything is computed, for what can't be explained row by row."""
        check_td(td)
        if self._norms:
            check_norms(self._norms, "rows")
        self._check_room(td)
        finite(td, self.entries, self.check_finite)

    def ran(self, td: TensorDictBase) -> tuple[TensorDictBase, dict[NestedKey, Tensor]]:
        """For methods that run the module many times: ``td`` with the ``by`` that was written, and the outputs.

        Where outputs are wanted the module runs once as a whole; what it samples then is what is written, and what
        ``by=`` means. Else ``td`` as it is, and no outputs.
        """
        if not self.outputs:
            return td, {}
        module, by = self.pullback.module, self.pullback.target.by
        inputs = td.select(*module.in_keys, strict=False)
        try:
            with torch.set_grad_enabled(self.create_graph):
                outputs = self.written(module(inputs))
        except Exception as error:
            reason = explained(error, module.in_keys, td)
            if reason is error:
                raise
            raise reason from error
        return (td.copy().set(by, outputs[by]) if by in outputs else td), outputs

    def _check_room(self, td: TensorDictBase) -> None:
        """Raise, before anything is computed, where an entry has the name of the group that results go to."""
        entry = td.get(self._room)
        if isinstance(entry, Tensor):
            raise BadKey(
                f"{key_text(self._room)} is an entry, and can't be a group of entries too",
                got=f"shape {list(entry.shape)}",
                needed="another name for the results",
                fix='out_key="why"',
            )

    def pieces(self, td: TensorDictBase) -> int | None:
        """How many rows of a batch are explained at a time; None for all of them."""
        return pieces_of(td, self.chunk_size, self.in_keys, self.pullback.module, self.widths)

    def rows(self, td: TensorDictBase, keys: Iterable[NestedKey], inside: Iterable[Tensor] = (), kept: int = 0) -> int:
        """How many copies of rows may be in flight: ``chunk_size``, or a choice; see ``rows_of``."""
        return rows_of(td, self.chunk_size, keys, inside, self.widths, kept)

    def tracked(self, pieces: Sequence[T], what: str) -> Iterable[T]:
        """``pieces``, with a progress bar where one is wanted."""
        return tracked(pieces, self.progress, what) if self.progress else pieces

    def width(self, td: TensorDictBase, copies: int = 1) -> int:
        """How many targets are pulled back at once, with so many copies of the batch in flight: what ``chunk_size``
        leaves, or a choice. Few are faster one by one.
        """
        if self.pullback.target.is_one:
            return 1
        width = max(1, self.rows(td, self.in_keys) // max(1, copies * td.numel()))
        return width if self.chunk_size is not None or width >= _FEW else 1

    def own(self, gradient: Tensor) -> Tensor:
        """``gradient`` as memory of its own: autograd may give two inputs one tensor, or an expanded one."""
        return gradient.clone() if len(self.attribution_keys) > 1 or 0 in gradient.stride() else gradient

    def written(self, outputs: TensorDictBase) -> dict[NestedKey, Tensor]:
        """The module's own outputs, where they are wanted."""
        if not self.outputs:
            return {}
        found = {key: outputs.get(key) for key in self.pullback.module.out_keys}
        return {key: value for key, value in found.items() if value is not None}


def check_running(given: Mapping[str, Any]) -> tuple[int | None, Any, bool | None]:
    """The options of :class:`Running`, checked."""
    progress, check = given.get("progress", False), given.get("check_finite")
    if not (isinstance(progress, bool) or callable(progress)):
        raise BadType(
            "not a progress bar", got=repr(progress), needed="True, False, or what makes one", fix="tqdm.tqdm"
        )
    if not (check is None or isinstance(check, bool)):
        raise BadType("check_finite= is a bool", got=repr(check), needed="True, False, or None to choose")
    return check_chunk_size(given.get("chunk_size")), progress, check


def finite(td: TensorDictBase, keys: Iterable[NestedKey], check: bool | None) -> None:
    """Raise for NaN or infinity in one of the entries ``keys``, where it is to be checked.

    Raises:
        BadValue: with the key, the row, and what is there.
    """
    if check is False or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    for key in keys:
        value = td.get(key)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not (check or value.is_cpu):
            continue
        if math.isfinite(value.detach().sum().item()):  # which a sum of finite numbers may not be: look closer
            continue
        bad = (~value.detach().isfinite()).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            row, place = list(at[: td.batch_dims]), list(at[td.batch_dims :])
            raise BadValue(
                f"{key_text(key)} is not finite",
                got=f"{value[at].item()} in row {row[0] if len(row) == 1 else row}, at {place}",
                needed="finite numbers: one NaN makes a whole explanation NaN",
                fix=f"td[{key!r}].nan_to_num_(), or check_finite=False",
            )


def check_options(given: Mapping[str, Any], known: Any) -> None:
    """Raise for an option that does not exist."""
    for name in given:
        if name not in known:
            raise BadType(f"no option {name!r}", got=f"{name}={given[name]!r}", needed=nearest(name, list(known)))
