"""The rules of attention: softmax, fused query-key-value layers, scaled dot products, gated products."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import backward_by, depends
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.epsilon import EpsilonRule, UniformEpsilonRule
from tdconcepts.lrp.passing import constant

__all__ = ["AHQKVRule", "AttentionRule", "GatedProductRule", "SoftmaxEpsilonRule"]

_NEAR = 1e-6  # what counts as zero where the sigmoid of a gate is divided by the gate


@dataclasses.dataclass(frozen=True)
class SoftmaxEpsilonRule(Rule):
    r"""Softmax: :math:`R_{in} = x \odot (R - y \sum R)`, with :math:`y = \mathrm{softmax}(x)` and the sum over its dim.

    A masked logit (``-inf``) gets 0. It is a Taylor decomposition without its bias, so it does not conserve relevance.
    Gradient convention: the ordinary gradient, which is the same rule.

    Args:
        epsilon: not used, for the seed's signature.

    Raises:
        BadValue: at the call, for an output of another shape than the input.

    Source: Achtibat et al., *AttnLRP*, 2024, proposition 3.1.

    Examples:
        >>> x = torch.tensor([2.0, 1.0, -torch.inf], requires_grad=True)
        >>> with SoftmaxEpsilonRule().on(nn.Softmax(-1), convention="relevance") as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([0.0, 1.0, 0.0]))[0].round(decimals=3)
        tensor([-1.4620,  0.7310,  0.0000])
    """

    epsilon: float = 1e-6

    def carry(self, call: Call) -> Tensor:
        """``nn.Softmax``, ``F.softmax``, ``torch.softmax``."""
        z, inputs = call.output, call.inputs
        if len(inputs) != 1 or not isinstance(z, Tensor) or inputs[0].shape != z.shape:
            raise call.cannot(self, "it is no softmax", "a module or function with one input")
        if not call.carries_relevance:
            return z
        return backward_by(functools.partial(_softmax, _dim(call)), z, inputs, call.kept(z))


def _dim(call: Call) -> int:
    if call.module is not None:
        dim = getattr(call.module, "dim", None)
    else:
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    if dim is None:  # torch's own, deprecated, choice
        dim = 0 if call.output.ndim in (0, 1, 3) else 1
    return int(dim)


def _softmax(dim: int, flow: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
    found = flow - y * flow.sum(dim, keepdim=True)
    return (torch.where(x.isinf(), 0.0, x.masked_fill(x.isinf(), 0.0) * found),)


@dataclasses.dataclass(frozen=True)
class AHQKVRule(Rule):
    r"""A fused query-key-value layer of which only the values propagate: :math:`J^T[0, 0, G_v]`.

    For a layer that writes ``[..., q | k | v]``. Relevance convention: epsilon, of the values only.

    Args:
        epsilon: for the relevance convention: a number or a stabiliser.

    Raises:
        BadValue: at the call, for an output whose last dim has no three equal parts.

    Source: Ali et al., *XAI for transformers: better explanations through conservative propagation*, 2022 (AH).

    Examples:
        >>> layer, x = nn.Linear(2, 6, bias=False), torch.randn(1, 2, requires_grad=True)
        >>> with AHQKVRule().on(layer) as m:
        ...     found = torch.autograd.grad(m(x), x, torch.ones(1, 6))[0]
        >>> torch.allclose(found, layer.weight[4:].sum(0))
        True
    """

    epsilon: Any = 1e-6
    scaled: ClassVar[bool] = True

    def carry(self, call: Call) -> Tensor:
        """A layer with one output tensor."""
        z = call.output
        if not isinstance(z, Tensor) or z.shape[-1] % 3:
            raise call.cannot(self, "its last dim has no three equal parts", "a layer that writes [..., q | k | v]")
        values = backward_by(_values_only, z, [z], keep=False)
        if not call.carries_relevance:
            return values
        call.output = values
        return EpsilonRule(self.epsilon).carry(call)


def _values_only(flow: Tensor) -> tuple[Tensor]:
    third = flow.shape[-1] // 3
    return (torch.cat([torch.zeros_like(flow[..., : 2 * third]), flow[..., 2 * third :]], -1),)


@dataclasses.dataclass(frozen=True)
class GatedProductRule(UniformEpsilonRule):
    r"""A product of two branches, ``act(gate) * up``: half of the relevance to each, or all to the signal.

    Of ``F.glu(x)``, which is a product with a sigmoid inside, the halves of ``x`` are the branches.

    Args:
        epsilon: for the relevance convention: a number or a stabiliser.
        zero_params: as in :class:`~tdconcepts.lrp.EpsilonRule`.
        signal: None shares equally (AttnLRP); 0 or 1 gives all to that factor and treats the other as a constant
            (CP-LRP, signal-take-all).

    Raises:
        BadValue: another signal; at the call, for what is no product of two values.

    Source: Achtibat et al., *AttnLRP*, 2024, eq. 14; Arras et al., *Explaining and interpreting LSTMs*, 2019.

    Examples:
        >>> class Product(nn.Module):
        ...     def forward(self, a, b):
        ...         return a * b
        >>> a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
        >>> with GatedProductRule(signal=1).on(Product(), convention="relevance") as m:
        ...     [r.round(decimals=4) for r in torch.autograd.grad(m(a, b), [a, b], torch.tensor([4.0]))]
        [tensor([0.]), tensor([4.])]
    """

    signal: int | None = None
    scaled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal not in (None, 0, 1):
            raise BadValue("not a factor of a product", got=f"signal={self.signal!r}", needed="None, 0 or 1")

    def carry(self, call: Call) -> Tensor:
        """A product of two tensors, or ``F.glu`` (``nn.GLU``), whose first half is the signal."""
        if call.name == "glu" or isinstance(call.module, nn.GLU):
            return self._glu(call)
        factors = [value for value in call.args if isinstance(value, Tensor)]
        dependent = [depends(value) for value in factors]
        z = call.output
        if not isinstance(z, Tensor) or len(call.args) != 2:
            raise call.cannot(self, "it is no product of two values", "a module or function of two values")
        if sum(dependent) == 1:  # times a constant
            only = factors[dependent.index(True)].expand(z.shape)
            return backward_by(_same, z, [only], keep=False) if call.carries_relevance else z
        signal = self.signal
        spread = [value.expand(z.shape) for value in factors]
        shares = tuple((0.5 if signal is None else float(i == signal)) for i in range(2))
        return backward_by(functools.partial(_gated, shares, call.carries_relevance), z, spread)

    def _glu(self, call: Call) -> Tensor:
        dim = call.module.dim if isinstance(call.module, nn.GLU) else call.kwargs.get("dim", (*call.args, -1)[1])
        shares = (0.5, 0.5) if self.signal is None else (1.0, 0.0)
        return backward_by(functools.partial(_glu, shares, dim, call.carries_relevance), call.output, call.inputs)


def _gated(shares: tuple[float, ...], relevance: bool, flow: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if relevance:
        return flow * shares[0], flow * shares[1]
    return flow * b * shares[0], flow * a * shares[1]


def _glu(shares: tuple[float, float], dim: int, relevance: bool, flow: Tensor, x: Tensor) -> tuple[Tensor]:
    """``a * sigmoid(b)``: the sigmoid hands its relevance on as it is, in the gradient convention as the ratio to b."""
    if relevance:
        return (torch.cat([flow * share for share in shares], dim),)
    a, b = x.chunk(2, dim)
    gate, near = b.sigmoid(), b.abs() <= _NEAR
    ratio = torch.where(near, gate * (1 - gate), gate / torch.where(near, 1.0, b))
    return (torch.cat([flow * gate * shares[0], flow * a * ratio * shares[1]], dim),)


@dataclasses.dataclass(frozen=True)
class AttentionRule(Rule):
    r"""Attention as a whole: of the products with the weights half each, or all to the values.

    For ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``. ``constant=False`` is AttnLRP: gradients
    :math:`G_q/4, G_k/4, G_v/2` (half of :math:`AV` to the weights, of these half to each of q and k).
    ``constant=True`` is CP-LRP: the weights are constants, all goes to the values, and relevance is conserved.
    The projections inside ``nn.MultiheadAttention`` have their ordinary gradient, which is LRP-0.

    Args:
        constant: whether the attention weights are constants.

    Raises:
        BadValue: at the call, in the relevance convention for ``nn.MultiheadAttention``, or for another module.

    Source: Achtibat et al., *AttnLRP*, 2024; Ali et al., *XAI for transformers*, 2022.

    Examples:
        >>> attention, x = nn.MultiheadAttention(4, 2, bias=False, batch_first=True), torch.randn(1, 3, 4)
        >>> x.requires_grad_()[0, 0, 0].shape
        torch.Size([])
        >>> with AttentionRule(constant=True).on(attention) as m:
        ...     y = m(x, x, x)[0]
        ...     relevance = x * torch.autograd.grad(y.sum(), x)[0]
        >>> torch.allclose(relevance.sum(), y.sum(), atol=1e-5)
        True
    """

    constant: bool = False
    scaled: ClassVar[bool] = True

    def carry(self, call: Call) -> Any:
        """Attention."""
        if isinstance(call.module, nn.MultiheadAttention):
            return self._module(call, call.module)
        if call.module is not None or call.name != "scaled_dot_product_attention":
            raise call.cannot(self, "it is no attention", "F.scaled_dot_product_attention or nn.MultiheadAttention")
        return _as_epsilon(call, call.output) if call.carries_relevance else call.output

    def prepare(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The attention of values whose flows are parted."""
        if name != "scaled_dot_product_attention":
            return args, kwargs
        given = _named(args, kwargs, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
        return (), {**given, **self._parts(given["query"], given["key"], given["value"])}

    def _parts(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        if self.constant:
            return {"query": constant(q), "key": constant(k), "value": v}
        return {"query": part(q, 0.25), "key": part(k, 0.25), "value": part(v, 0.5)}

    def _module(self, call: Call, m: nn.MultiheadAttention) -> Any:
        given = _named(call.args, call.kwargs, _GIVEN)
        q, k, v = given["query"], given["key"], given["value"]
        single = q.ndim == 2
        if single:
            q, k, v = (t.unsqueeze(0 if m.batch_first else 1) for t in (q, k, v))
        if not m.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        own = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight) if not m._qkv_same_embed_dim else None
        weights = own if own is not None else m.in_proj_weight.chunk(3)
        biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
        if m.bias_k is not None or m.add_zero_attn:
            raise call.cannot(self, "it adds keys of its own (add_bias_kv, add_zero_attn)")
        heads = [t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mask = _mask(given, heads[0], heads[1])
        dropped = m.dropout if m.training else 0.0
        mixed = F.scaled_dot_product_attention(**self._parts(*heads), attn_mask=mask, dropout_p=0.0)
        if dropped:
            raise call.cannot(self, "it is in training mode, with dropout", "model.eval()")
        out = m.out_proj(mixed.transpose(1, 2).flatten(-2))
        out = out if m.batch_first else out.transpose(0, 1)
        out = out.squeeze(0 if m.batch_first else 1) if single else out
        if isinstance(call.output, Tensor):  # without the weights
            return _as_epsilon(call, out)
        first, *rest = call.output
        call.output = first
        return (_as_epsilon(call, out), *(r.detach() if isinstance(r, Tensor) else r for r in rest))


_GIVEN = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


def part(value: Tensor, share: float) -> Tensor:
    """``value``, of whose flow a part goes on.

    Examples:
        >>> x = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(part(x, 0.25).sum(), x)[0]
        tensor([0.2500])
    """
    return backward_by(functools.partial(_part, share), value, [value], keep=False) if depends(value) else value


def _part(share: float, flow: Tensor) -> tuple[Tensor]:
    return (flow * share,)


def _as_epsilon(call: Call, z: Tensor) -> Tensor:
    """The output as it was, with the graph of ``z``."""
    value = call.output
    if not call.carries_relevance:
        return backward_by(_same, value, [z], keep=False)
    return backward_by(_over, value, [z], z, keep=False)


def _same(flow: Tensor) -> tuple[Tensor]:
    return (flow,)


def _over(flow: Tensor, z: Tensor) -> tuple[Tensor]:
    return (flow / torch.where(z < 0, z - 1e-9, z + 1e-9),)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


def _mask(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """One additive mask ``[N or 1, heads or 1, L, S]`` of the two that a MultiheadAttention takes."""
    found: Tensor | None = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = given.get(name)
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
        if name == "key_padding_mask":
            mask = mask.reshape(-1, 1, 1, k.shape[2])
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (q.shape[0], -1))
        found = mask if found is None else found + mask
    return found
