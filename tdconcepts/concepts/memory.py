"""Memory selection: each concept's embedding is picked from a learnable bank of slots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["MemorySelector", "SelectorZU"]

Selection = Literal["soft", "gumbel", "argmax"]
AnySelection: TypeAlias = Selection | torch.Generator | tuple[Selection | torch.Generator, Selection | torch.Generator]


class MemorySelector(TensorDictModuleBase):
    """For each of T outputs, attend over M memory slots and read an embedding of width E from them.

    ``a = selector(x)  [*B, T, M]``, ``out[*b, t] = Σ_m w[*b, t, m] memory[t, m]``, ``memory [T, M, E]`` learnable, with

    * ``"soft"``: ``w = softmax(a / temperature)`` over the *memory* axis: the weights of each output sum to one;
    * ``"gumbel"``: one slot drawn from ``softmax(a)`` by the Gumbel-max trick, one-hot in the forward pass, with the
      gradient of ``softmax((a + g) / temperature)`` (straight-through);
    * ``"argmax"``: the slot with the largest ``a``, one-hot, with the gradient of the soft weights.

    =======  =====================================  ====================================
    reads    ``"latent"``                           ``[*B, in_features]``
    writes   ``"exogenous"``                        ``[*B, out_features, exogenous_size]``
    =======  =====================================  ====================================

    ``SelectorZU`` is another name of this class: PyC's (torch_concepts).

    Args:
        in_features: width of the latent.
        memory_size: number of slots, M.
        exogenous_size: width of an embedding, E.
        out_features: number of outputs (concepts, tasks), T.
        temperature: of the softmax, above 0; small is sharp.
        selection: ``"soft"`` (default), ``"gumbel"`` or ``"argmax"``; or a ``torch.Generator``, which is ``"gumbel"``
            drawing from it and not from the global one; or a pair of these, the one in training and the one at
            evaluation, such as ``("gumbel", "argmax")``. The attribute ``selection`` may be changed later.
        keys: the entry to read and the entry to write, default ``{"latent": "exogenous"}``.

    Raises:
        BadValue: for a size below 1, a temperature that is not above 0, or a latent of another width.
        BadKey: when the latent is missing.

    Source: Debot et al., Interpretable Concept-Based Memory Reasoning, NeurIPS 2024 (the rule selector, p(r | x)).

    Examples:
        >>> selector = SelectorZU(in_features=64, memory_size=10, exogenous_size=32, out_features=5)
        >>> selector(latent=torch.randn(4, 64)).shape
        torch.Size([4, 5, 32])
        >>> bool((selector.weights(torch.randn(4, 64)).sum(-1) - 1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        memory_size: int,
        exogenous_size: int,
        out_features: int,
        temperature: float = 1.0,
        selection: AnySelection = "soft",
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "memory_size": memory_size}
        sizes |= {"exogenous_size": exogenous_size, "out_features": out_features}
        wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
        if wrong:
            raise BadValue("not a size", got=repr(wrong), needed="ints of 1 or more")
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise BadValue("not a temperature", got=repr(temperature), needed="a number above 0")
        pairs = list((keys or {"latent": "exogenous"}).items())
        if len(pairs) != 1:
            raise BadValue("a selector has one entry to read and one to write", got=repr(keys), needed="one pair")
        self.in_features, self.memory_size = in_features, memory_size
        self.exogenous_size, self.out_features = exogenous_size, out_features
        self.temperature = float(temperature)
        self.selection = selection
        self._keys = (as_key(pairs[0][0]), as_key(pairs[0][1]))
        self.in_keys, self.out_keys = [self._keys[0]], [self._keys[1]]
        self.memory = nn.Embedding(out_features, memory_size * exogenous_size)
        self.selector = nn.Sequential(
            nn.Linear(in_features, exogenous_size),
            nn.LeakyReLU(),
            nn.Linear(exogenous_size, out_features * memory_size),
            nn.Unflatten(-1, (out_features, memory_size)),
        )

    @property
    def selection(self) -> AnySelection:
        """``"soft"``, ``"gumbel"``, ``"argmax"``, the generator that Gumbel noise comes from, or a pair of these."""
        return self._selection

    @selection.setter
    def selection(self, value: AnySelection) -> None:
        pair = value if isinstance(value, tuple) else (value, value)
        if len(pair) != 2 or not all(_is_selection(one) for one in pair):
            needed = '"soft", "gumbel", "argmax", a torch.Generator, or a pair: in training, at evaluation'
            raise BadValue("not a selection", got=repr(value), needed=needed)
        self._selection, self._pair = value, pair

    def weights(self, latent: Tensor) -> Tensor:
        """The weight of each slot, ``[*B, in_features] -> [*B, T, M]``; each row over M sums to one."""
        scores = self.selector(latent)
        selection = self._pair[0 if self.training else 1]
        if selection == "soft":
            return (scores / self.temperature).softmax(-1)
        if selection == "argmax":
            soft = (scores / self.temperature).softmax(-1)
        else:
            generator = selection if isinstance(selection, torch.Generator) else None
            source = scores.device if generator is None else generator.device
            # always in single precision: half would draw zeros, and double would draw others
            uniform = torch.rand(scores.shape, dtype=torch.float32, device=source, generator=generator)
            noise = -(-uniform.clamp(min=torch.finfo(torch.float32).tiny).log()).log()
            soft = ((scores + noise.to(scores.device)) / self.temperature).softmax(-1).to(scores.dtype)
        hard = F.one_hot(soft.argmax(-1), self.memory_size).to(soft.dtype)
        return hard + (soft - soft.detach())

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        in_key, out_key = self._keys
        latent = tensordict.get(in_key, None)
        if not isinstance(latent, Tensor):
            have = list(tensordict.keys(True, True))
            raise BadKey("no latent in the TensorDict", got=key_text(in_key), needed=nearest(in_key, have))
        if latent.shape[-1:] != (self.in_features,):
            raise BadValue("the latent has another width", got=list(latent.shape), needed=f"[*B, {self.in_features}]")
        if not latent.is_floating_point():
            raise BadType("the latent is not a float tensor", got=str(latent.dtype), fix=f"td[{in_key!r}].float()")
        if tensordict.is_locked:
            raise BadValue("the TensorDict is locked", got=f"{key_text(out_key)} to write", fix="pass td.copy()")
        memory = self.memory.weight.unflatten(-1, (self.memory_size, self.exogenous_size))
        return tensordict.set(out_key, torch.einsum("...tm,tme->...te", self.weights(latent), memory))


def _is_selection(value: Any) -> bool:
    return isinstance(value, torch.Generator) or (isinstance(value, str) and value in ("soft", "gumbel", "argmax"))


SelectorZU = MemorySelector
