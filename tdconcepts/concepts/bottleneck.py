"""The concept bottleneck: a pipeline whose task sees the input through named concepts only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias

from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdconcepts.concepts.activation import ConceptActivation
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import ConceptModel, as_spec, beside, wrapped
from tdconcepts.errors import BadKey, BadValue
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["ConceptBottleneck"]

Space: TypeAlias = Literal["probs", "logits"]
KeysLike: TypeAlias = NestedKey | list[NestedKey]


class ConceptBottleneck(ConceptModel):
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

    :func:`~tdconcepts.concepts.teach` gives the pipeline that trains it jointly, sequentially or independently.

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
        spec = as_spec(concepts)
        if space not in ("probs", "logits"):
            raise BadValue("not a space for concepts", got=repr(space), needed='"probs" or "logits"')
        key = as_key(key)
        logits_key = beside(key, join(key)[-1] + "_logits") if space == "probs" else key
        blocks = [key, logits_key] if space == "probs" else [key]
        first = wrapped(encoder, "encoder", in_keys or "observation", logits_key, given=in_keys, writes=blocks)
        named: OrderedDict[str, TensorDictModuleBase] = OrderedDict(encoder=first)
        if key not in first.out_keys:
            named["activation"] = ConceptActivation(spec, logits_key, key)
        named["head"] = last = wrapped(head, "head", key, out_keys or "logits", given=out_keys, writes=[])
        if key not in last.in_keys:
            fix = f"TensorDictModule(net, {[key]}, {list(last.out_keys)})"
            got, needed = f"in_keys {last.in_keys}", key_text(key)
            raise BadKey("the head does not read the concepts", got=got, needed=needed, fix=fix)
        super().__init__(named, spec, key, space)
