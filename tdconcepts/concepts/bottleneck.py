"""The concept bottleneck: a pipeline whose task sees the input through named concepts only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch, set_skip_existing
from torch import Tensor, nn

from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import NestedKey, as_key, as_keys, join, key_text

__all__ = ["ConceptActivation", "ConceptBottleneck"]

Space: TypeAlias = Literal["probs", "logits"]
KeysLike: TypeAlias = NestedKey | list[NestedKey]


class ConceptActivation(TensorDictModuleBase):
    """From concept logits to concept probabilities: a sigmoid for binary concepts, a softmax for categorical ones.

    =============  ==========================  ==============
    reads          ``in_key``                  ``[*B, C]``
    writes         ``out_key``                 ``[*B, C]``
    =============  ==========================  ==============

    Args:
        concepts: what the columns mean.
        in_key: the entry with the logits.
        out_key: the entry for the probabilities.

    Raises:
        BadKey: when the entry is missing.
        BadValue: when its width is not that of the spec, or the TensorDict is locked.

    Examples:
        >>> import torch
        >>> stage = ConceptActivation(ConceptSpec(["wing", "beak"]), "concepts_logits", "concepts")
        >>> stage(concepts_logits=torch.zeros(2)).tolist()
        [0.5, 0.5]
    """

    space = "probs"

    def __init__(self, concepts: ConceptSpec, in_key: NestedKey, out_key: NestedKey) -> None:
        super().__init__()
        self.concepts = concepts
        self.in_keys = [as_key(in_key)]
        self.out_keys = [as_key(out_key)]
        self._keys = (self.in_keys[0], self.out_keys[0])

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        in_key, out_key = self._keys
        logits = tensordict.get(in_key, None)
        if not isinstance(logits, Tensor):
            have = list(tensordict.keys(True, True))
            raise BadKey("no concept logits in the TensorDict", got=key_text(in_key), needed=nearest(in_key, have))
        if tensordict.is_locked:
            raise BadValue("the TensorDict is locked", got=f"{key_text(out_key)} to write", fix="pass td.copy()")
        return tensordict.set(out_key, self.concepts.probs(logits))


class ConceptBottleneck(TensorDictSequential):
    """Input -> concepts -> task, where the task head sees the concepts and nothing else unless told to.

    ``concepts = σ(encoder(x))``, ``logits = head(concepts)``. A named :class:`TensorDictSequential` with the stages
    ``"encoder"``, ``"activation"`` (in space ``"probs"`` only) and ``"head"``.

    =======  =====================================================  ==============
    reads    ``in_keys`` (default ``"observation"``)                as the encoder
    writes   ``key + "_logits"`` (in space ``"probs"``)             ``[*B, C]``
    writes   ``key`` (default ``"concepts"``)                       ``[*B, C]``
    writes   ``out_keys`` (default ``"logits"``)                    as the head
    =======  =====================================================  ==============

    Args:
        encoder: a bare ``nn.Module`` from ``in_keys`` to concept logits ``[*B, C]``, or a TensorDictModule. The latter
            writes either the logits entry, and the activation follows, or ``key`` itself, and no activation is added.
        head: a bare ``nn.Module`` from the concepts to the task, or a TensorDictModule that reads ``key``.
        concepts: what the columns mean: a :class:`ConceptSpec`, or the names of binary concepts.
        in_keys: what a bare encoder reads, one key or a list.
        key: the entry of the concepts.
        out_keys: what a bare head writes, one key or a list.
        space: what the entry ``key`` holds, and what the head is given: ``"probs"`` (default) or ``"logits"``.
            Interventions read this, so that a ground truth of 1 is written as a probability or as a logit.

    Raises:
        BadType: for an encoder or head that is no module, and for a spec that is none.
        BadKey: for an encoder that writes neither entry, or a head that does not read ``key``.
        BadValue: for keys that are already decided by a TensorDictModule, and for an unknown space.

    Source: Koh et al., Concept Bottleneck Models, ICML 2020.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = ConceptBottleneck(nn.Linear(8, 2), nn.Linear(2, 5), concepts=["wing", "beak"], in_keys=["image"])
        >>> td = model(TensorDict({"image": torch.zeros(3, 8)}, [3]))
        >>> td["concepts"].shape, td["logits"].shape, model.in_keys, model.out_keys
        (torch.Size([3, 2]), torch.Size([3, 5]), ['image'], ['concepts_logits', 'concepts', 'logits'])
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        concepts: ConceptSpec | Sequence[str],
        *,
        in_keys: KeysLike | None = None,
        key: NestedKey = "concepts",
        out_keys: KeysLike | None = None,
        space: Space = "probs",
    ) -> None:
        spec = concepts if isinstance(concepts, ConceptSpec) else ConceptSpec(concepts)
        if space not in ("probs", "logits"):
            raise BadValue("not a space for concepts", got=repr(space), needed='"probs" or "logits"')
        key = as_key(key)
        path = join(key)
        logits_key = as_key((*path[:-1], path[-1] + "_logits")) if space == "probs" else key
        first = _wrapped(encoder, "encoder", in_keys or "observation", logits_key, given=in_keys)
        named: OrderedDict[str, TensorDictModuleBase] = OrderedDict(encoder=first)
        if key not in first.out_keys:
            if logits_key not in first.out_keys:
                needed = f"{key_text(key)} or {key_text(logits_key)}" if space == "probs" else key_text(key)
                raise BadKey("the encoder writes no concepts", got=f"out_keys {first.out_keys}", needed=needed)
            named["activation"] = ConceptActivation(spec, logits_key, key)
        named["head"] = last = _wrapped(head, "head", key, out_keys or "logits", given=out_keys)
        if key not in last.in_keys:
            raise BadKey("the head does not read the concepts", got=f"in_keys {last.in_keys}", needed=key_text(key))
        super().__init__(named)
        self.concepts, self.key, self.space = spec, key, space

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        """The stages that lead from ``in_keys`` to ``out_keys``, as a plain :class:`TensorDictSequential`."""
        return TensorDictSequential(OrderedDict(self.module.items())).select_subsequence(in_keys, out_keys)


def _wrapped(
    module: object, what: str, in_keys: KeysLike, out_keys: KeysLike, given: KeysLike | None
) -> TensorDictModuleBase:
    """``module`` itself when it has keys, else wrapped; ``given`` are the keys that the caller asked for, if any."""
    if isinstance(module, TensorDictModuleBase):
        if given is not None:
            fix = "leave the keys out, or pass the bare module"
            raise BadValue(f"the {what} is a TensorDictModule and has its keys", got=f"also {given!r}", fix=fix)
        return module
    if not isinstance(module, nn.Module):
        raise BadType(f"the {what} is no module", got=f"{module!r} ({type(module).__name__})", needed="an nn.Module")
    return TensorDictModule(module, in_keys=as_keys(in_keys), out_keys=as_keys(out_keys))
