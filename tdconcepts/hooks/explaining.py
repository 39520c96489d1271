"""What every explainer shares: its keys, its options, its chunks, and how results are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, nearest
from tdconcepts.hooks.batching import check_chunk_size, slices
from tdconcepts.hooks.calling import explained
from tdconcepts.hooks.hooked import check_td
from tdconcepts.hooks.pullback import Pullback, Wrt
from tdconcepts.hooks.targets import Target
from tdconcepts.keys import ATTRIBUTION, NestedKey, as_key, check_writable, join, key_text

__all__ = ["HELD", "Explaining", "Options", "check_options"]

HELD = "held target"  # one flat key: where a wrapper tells its explainer which index "argmax" chose at the clean input


class Options(TypedDict, total=False):
    """The options that every explainer takes.

    Args:
        chunk_size: how many rows may be in flight; results do not depend on it. Default: chosen from the size of a row.
        outputs: also write the module's own ``out_keys``, from the same forward: an explained policy is still a policy.
            ``by=`` then means what the module has just written.
        create_graph: keep the graph of the results, for derivatives of an explanation; else they are detached.
        out_key: the first part of the keys that are written, ``"attribution"`` by default.
    """

    chunk_size: int | None
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
            check_options(options, Options.__annotations__)
        self.chunk_size = check_chunk_size(options.get("chunk_size"))
        self.outputs = bool(options.get("outputs", False))
        self.create_graph = bool(options.get("create_graph", False))
        self.out_key = as_key(options.get("out_key", ATTRIBUTION))
        self._room = join(self.out_key)[0]
        self.pullback = Pullback(module, target, wrt, whole=self.outputs, rules=rules)
        self.in_keys = self.pullback.in_keys
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
        check_td(td)
        self._check_room(td)
        held = td.get(HELD)
        if self.chunk_size is None or td.numel() <= self.chunk_size or not td.batch_dims:
            results = attribute(td, held)
        else:
            parts = [
                attribute(part, None if held is None else held[index]) for index, part in slices(td, self.chunk_size)
            ]
            results = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for key, value in results.items():
            td.set(key, value)
        return td

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

    def width(self, td: TensorDictBase) -> int | None:
        """How many targets are pulled back at once within ``chunk_size``."""
        return None if self.chunk_size is None else max(1, self.chunk_size // max(1, td.numel()))

    def written(self, outputs: TensorDictBase) -> dict[NestedKey, Tensor]:
        """The module's own outputs, where they are wanted."""
        if not self.outputs:
            return {}
        found = {key: outputs.get(key) for key in self.pullback.module.out_keys}
        return {key: value for key, value in found.items() if value is not None}


def check_options(given: Mapping[str, Any], known: Any) -> None:
    """Raise for an option that does not exist."""
    for name in given:
        if name not in known:
            raise BadType(f"no option {name!r}", got=f"{name}={given[name]!r}", needed=nearest(name, list(known)))
