"""What the stages of this room share: entries in, entries out, checked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import dispatch_rows
from tdconcepts.hooks.plain import call_stage
from tdconcepts.keys import NestedKey, as_key, as_keys, check_writable, join, key_text

__all__ = ["BlockStage", "ConceptModel", "as_size", "as_spec", "beside", "check_block", "task_head", "wrapped"]


class BlockStage(TensorDictModuleBase):
    """A stage that computes its ``out_keys`` from its ``in_keys``; what it computes is :meth:`compute`.

    Entries of ``optional_keys`` are read where they are there.

    =======  ============  ==========================
    reads    ``in_keys``   float tensors ``[*B, ...]``
    writes   ``out_keys``  tensors ``[*B, ...]``
    =======  ============  ==========================

    Raises:
        BadKey: for an entry that is missing.
        BadType: for an entry that is not a float tensor.
        BadValue: for a locked TensorDict.
    """

    def __init__(
        self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey], optional: Sequence[NestedKey] = ()
    ) -> None:
        super().__init__()
        self._read, self._write = [as_key(key) for key in in_keys], [as_key(key) for key in out_keys]
        check_writable(self._write)
        self.in_keys, self.out_keys = list(self._read), list(self._write)
        self.optional_keys = [as_key(key) for key in optional]

    def compute(self, *entries: Any) -> Tensor | tuple[Tensor, ...]:
        """One tensor for each of the ``out_keys``, from the entries of the ``in_keys`` and of the ``optional_keys``
        (None where there is none)."""
        raise NotImplementedError

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        entries = [read(tensordict, key) for key in self._read]
        entries += [tensordict.get(key, None) for key in self.optional_keys]
        if tensordict.is_locked:
            raise BadValue("the TensorDict is locked", got=f"{key_text(self._write[0])} to write", fix="pass td.copy()")
        results = self.compute(*entries)
        for key, result in zip(self._write, results if isinstance(results, tuple) else (results,), strict=True):
            tensordict.set(key, result)
        return tensordict


class ConceptModel(TensorDictSequential):
    """A concept model: a :class:`TensorDictSequential` with named stages that knows what its concepts are.

    Args:
        stages: the stages by name.
        concepts: what the columns of its block mean.
        key: the entry of that block.
        space: what the block holds, ``"probs"`` or ``"logits"``.
    """

    def __init__(
        self, stages: Mapping[str, TensorDictModuleBase], concepts: ConceptSpec, key: NestedKey, space: str = "probs"
    ) -> None:
        super().__init__(OrderedDict(stages))
        self.concepts, self.key, self.space = concepts, as_key(key), space

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        """The stages that lead from ``in_keys`` to ``out_keys``, as a plain :class:`TensorDictSequential`."""
        return TensorDictSequential(OrderedDict(self.module.items())).select_subsequence(in_keys, out_keys)

    def _run_module(self, module: TensorDictModuleBase, tensordict: TensorDictBase, **kwargs: Any) -> Any:
        """A stage without what tensordict wraps around it: that takes longer than a small network."""
        return super()._run_module(module, tensordict, **kwargs) if kwargs else call_stage(module, tensordict)


def wrapped(
    module: object,
    what: str,
    in_keys: NestedKey | list[NestedKey],
    out_keys: NestedKey | list[NestedKey],
    given: NestedKey | list[NestedKey] | None = None,
    writes: list[NestedKey] | None = None,
) -> TensorDictModuleBase:
    """``module`` itself when it has keys, else wrapped; ``given`` are the keys that the caller asked for, if any.

    One that has keys must write one of ``writes``: by default one of ``out_keys``, and anything where it is empty.
    """
    if isinstance(module, TensorDictModuleBase):
        if given is not None:
            fix = "leave the keys out, or pass the bare module"
            raise BadValue(f"the {what} is a TensorDictModule and has its keys", got=f"also {given!r}", fix=fix)
        needed, written = as_keys(out_keys) if writes is None else as_keys(writes), as_keys(module.out_keys)
        if needed and not any(key in written for key in needed):
            raise BadKey(
                f"the {what} does not write what the model reads of it",
                got=f"out_keys {written}",
                needed=" or ".join(key_text(key) for key in needed),
                fix=f"TensorDictModule(net, {list(module.in_keys)}, {as_keys(out_keys)[:1]})",
            )
        return module
    if not isinstance(module, nn.Module):
        raise BadType(f"the {what} is no module", got=f"{module!r} ({type(module).__name__})", needed="an nn.Module")
    return TensorDictModule(module, in_keys=as_keys(in_keys), out_keys=as_keys(out_keys))


def task_head(in_features: int, head: object) -> nn.Module:
    """``head`` itself, or a linear layer to that many outputs."""
    if type(head) is int:
        as_size(out_features=head)
        return nn.Linear(in_features, head)
    if not isinstance(head, nn.Module) or isinstance(head, TensorDictModuleBase):
        got = f"{head!r} ({type(head).__name__})"
        raise BadType("the head is no module", got=got, needed="a bare nn.Module, or the number of task outputs")
    return head


def as_spec(concepts: ConceptSpec | Sequence[str] | int) -> ConceptSpec:
    """The spec itself, or that of binary concepts with these names (or that many)."""
    return concepts if isinstance(concepts, ConceptSpec) else ConceptSpec(concepts)


def beside(key: NestedKey, name: str) -> NestedKey:
    """The entry ``name`` in the group in which ``key`` is.

    Examples:
        >>> beside("concepts", "latent"), beside(("agents", "concepts"), "latent")
        ('latent', ('agents', 'latent'))
    """
    return as_key((*join(key)[:-1], name))


def read(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The float tensor at ``key``."""
    value = tensordict.get(key, None)
    if not isinstance(value, Tensor):
        have = list(tensordict.keys(True, True))
        raise BadKey("no such entry in the TensorDict", got=key_text(key), needed=nearest(key, have))
    return value


def check_block(block: Tensor, shape: Sequence[int], key: NestedKey) -> Tensor:
    """``block`` if it is a float tensor with these last dims, else an error that names the entry."""
    if not block.is_floating_point():
        raise BadType(f"{key_text(key)} is not a float tensor", got=str(block.dtype), fix=f"td[{key!r}].float()")
    if block.shape[-len(shape) :] != tuple(shape):
        needed = f"[*B, {', '.join(map(str, shape))}]"
        raise BadValue(f"{key_text(key)} has another shape", got=list(block.shape), needed=needed)
    return block


def as_size(**sizes: object) -> None:
    """Raise :class:`~tdconcepts.errors.BadValue` for a size that is not an int of 1 or more."""
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
    if wrong:
        raise BadValue("not a size", got=repr(wrong), needed="ints of 1 or more")
