"""A strategy on weights: what the concepts would be if every weight that makes them were positive."""

from __future__ import annotations

from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torch.func import functional_call

from tdconcepts.errors import BadKey, BadValue, nearest
from tdconcepts.interventions.splice import Splice
from tdconcepts.interventions.stages import ConceptStage
from tdconcepts.keys import NestedKey, key_text

__all__ = ["PositiveWeights"]


class PositiveWeights(ConceptStage):
    """Writes the concepts as they come out with negative weights and biases at zero: ``value = layer(x; max(w, 0))``.

    The layer is the last stage with parameters that the concepts come from, with all the stages from there to the
    concepts (a sigmoid, say). It is called once more, functionally: its parameters and buffers stay as they are, and
    the gradient reaches the parameters that are above zero.

    =======  ============================================  ===========
    reads    ``"concepts"``, or what it is bound to        ``[*B, C]``
    reads    what the layer reads                          as it does
    writes   ``("intervention", "value")``                 ``[*B, C]``
    =======  ============================================  ===========

    Raises:
        BadValue: outside a model, and where no stage before the concepts has parameters.
        BadKey: when an entry that the layer reads is missing.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.interventions import intervene
        >>> net = TensorDictModule(torch.nn.Linear(2, 1, bias=False), ["x"], ["concepts"])
        >>> net.module.weight.data = torch.tensor([[2.0, -5.0]])
        >>> fixed = intervene(TensorDictSequential(net), strategy=PositiveWeights()).select_out_keys("concepts")
        >>> fixed(x=torch.ones(2)).tolist(), net(x=torch.ones(2)).tolist()
        ([2.0], [-3.0])
    """

    writes = "value"

    def __init__(self) -> None:
        self._layer: tuple[TensorDictModuleBase, ...] = ()
        super().__init__()

    def bind(self, splice: Splice) -> ConceptStage:
        bound = cast(PositiveWeights, super().bind(splice))
        last = max((i for i, stage in enumerate(splice.before) if any(True for _ in stage.parameters())), default=None)
        if last is None:
            raise BadValue(
                "there are no weights to make positive",
                got=f"{len(splice.before)} stages before {key_text(splice.at)}, none with parameters",
                needed="a model that computes the concepts",
                fix="intervene(model, at=..., strategy=PositiveWeights())",
            )
        # In a tuple, so that its parameters are not registered twice: they belong to the model.
        bound._layer = (TensorDictSequential(*splice.before[last:]),)
        bound.in_keys = list(dict.fromkeys([splice.at, *bound._layer[0].in_keys]))
        return bound

    def compute(self, concepts: Tensor, tensordict: TensorDictBase) -> Tensor:
        if not self._layer:
            raise BadValue("this strategy is not part of a model", fix="intervene(model, at=..., strategy=...)")
        layer: TensorDictSequential = self._layer[0]
        inputs = {key: tensordict.get(key, None) for key in layer.in_keys}
        missing = [key for key, entry in inputs.items() if entry is None]
        if missing:
            have: list[NestedKey] = list(tensordict.keys(True, True))
            raise BadKey(f"no entry {key_text(missing[0])}", got=f"entries {have}", needed=nearest(missing[0], have))
        weights = {name: parameter.relu() for name, parameter in layer.named_parameters()}
        weights |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
        work = TensorDict(inputs, tensordict.batch_size)
        return torch.as_tensor(functional_call(layer, weights, (work,)).get(self.splice.at))
