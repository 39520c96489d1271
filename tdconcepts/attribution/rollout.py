"""Attention from the first layer to the last: rollout, and relevance by attention times its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Options, Pullback, Target, dispatch_rows
from tdconcepts.hooks.attention import Attended
from tdconcepts.hooks.explaining import Explaining, Running, check_options
from tdconcepts.keys import NestedKey, as_key, check_writable, join, key_text
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["AttentionRollout", "TransformerAttribution"]

Fusion = Literal["mean", "max", "min"]
_FUSIONS = ("mean", "max", "min")


class AttentionRollout(Replaceable, TensorDictModuleBase):
    r"""How attention mixes the tokens on its way through the layers: :math:`R = \bar A_L \cdots \bar A_1`,
    :math:`\bar A_l = \mathrm{rows}((1 - r) A_l + r I)`.

    :math:`A_l` are the weights of layer l, one map for all heads; ``rows`` divides each row by its sum.

    | reads | writes |
    |---|---|
    | what the module reads | ``("attribution", *k)`` ``[*B, T]``, or ``[*B, T, T]`` for ``token=None`` |

    Layers are those that run, in the order of execution. It says how information *may* flow, not what it is used for:
    there is no target. Any attention counts in which a softmax is multiplied with values: ``nn.MultiheadAttention``,
    ``nn.TransformerEncoder`` (its fused fast path is not taken), Hugging Face's BERT and GPT-2 (eager or SDPA), or
    written out.

    Args:
        module: a TensorDictModule, in evaluation mode if it has dropout.
        wrt: the entry of the tokens, under which the result is written; default: the first that the module reads.
        layers: which of the layers with attention, by their number in the order of execution; default: all.
        residual: r, the weight of the residual connection, in [0, 1]; 0.5 as in the paper.
        fusion: how heads become one: ``"mean"`` as in the paper, ``"max"`` or ``"min"``.
        discard: the share of each map's smallest weights that is set to zero (ties by index), in [0, 1).
        token: the row of R that is written: 0 for a class token, -1 for the last one of a causal model; None for all.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: nothing attends, maps that are not square and of one size, dropout at work, a number out of range.
        BadKey: an entry that the module does not read.

    Source: Abnar and Zuidema, *Quantifying attention flow in transformers*, 2020 (section 3, attention rollout).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> td = TensorDict(tokens=torch.randn(3, 5, 8), batch_size=[3])
        >>> td = AttentionRollout(TensorDictModule(encoder, ["tokens"], ["hidden"]))(td)
        >>> td["attribution", "tokens"].shape, bool((td["attribution", "tokens"].sum(-1) - 1).abs().max() < 1e-5)
        (torch.Size([3, 5]), True)
    """

    tunables: tuple[Tunable, ...] = (
        Tunable("residual", 0.0, 0.95, 0.05),
        Tunable("fusion", choices=_FUSIONS),
        Tunable("discard", 0.0, 0.95, 0.05),
    )

    def __init__(
        self,
        module: TensorDictModuleBase,
        wrt: NestedKey | None = None,
        *,
        layers: Sequence[int] | None = None,
        residual: float = 0.5,
        fusion: Fusion = "mean",
        discard: float = 0.0,
        token: int | None = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if not (isinstance(residual, (int, float)) and 0 <= residual <= 1):
            raise BadValue("not a weight of the residual", got=f"residual={residual!r}", needed="a number in [0, 1]")
        self.residual = float(residual)
        _set_up(self, module, Target(list(module.out_keys)[-1]), wrt, layers, fusion, discard, token, options)

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this = self._explaining
        seen = _PROGRAM.seen(this.pullback, td, gradients=False, create_graph=this.create_graph)
        total: Tensor | None = None
        for weights in chosen(seen.weights, self.layers, td.batch_dims):
            fused = discarded(fused_heads(weights, self.fusion), self.discard)
            mixed = (1 - self.residual) * fused + self.residual * _eye(fused)
            sums = mixed.sum(-1, keepdim=True)
            mixed = mixed / torch.where(sums == 0, 1.0, sums)
            total = mixed if total is None else mixed @ total
        assert total is not None
        return {this.attribution_keys[0]: row_of(total, self.token, td.batch_dims)} | this.written(seen.outputs)


class TransformerOptions(Options, total=False):
    """The options of :class:`TransformerAttribution`, besides those of every explainer.

    Args:
        relevance: a composite of LRP rules, whose relevance of the attention weights is taken. It must leave the
            modules that attend without a rule of their own: ``AttnLRP()`` does for Hugging Face's, not for torch's.
    """

    relevance: Any


class TransformerAttribution(Replaceable, TensorDictModuleBase):
    r"""Relevance of the tokens for a target: :math:`R \leftarrow R + \bar A_l R` from :math:`R = I`, layer by layer,
    with :math:`\bar A_l = \mathbb{E}_h[(\nabla A_l \odot A_l)^+]`.

    :math:`\nabla A_l` is the gradient of the target with respect to the weights of layer l, :math:`\mathbb{E}_h` the
    mean over heads. This is the rule for self-attention of the *generic* method (2021, equations 5 and 6): attention
    times its gradient. With ``relevance=``, a composite of LRP rules, it is the earlier one of the same authors
    (*Transformer interpretability beyond attention visualization*, 2021, equations 13 and 14): :math:`\bar A_l =
    \mathbb{E}_h[(\nabla A_l \odot R^{A_l})^+]` with the relevance :math:`R^{A_l}` of the weights.

    | reads | writes |
    |---|---|
    | what the target depends on | ``("attribution", *k)`` ``[*B, T]``, or ``[*B, T, T]`` for ``token=None``, for k |

    With several targets one more dim of size n follows the batch. Layers and kinds of attention as for
    :class:`AttentionRollout`. The diagonal of R is 1 from the start: what a token keeps of itself.

    Args:
        module: a TensorDictModule, in evaluation mode if it has dropout.
        target: what is explained.
        wrt: the entry of the tokens, under which the result is written; default: the first that the module reads.
        layers: which of the layers with attention, by their number in the order of execution; default: all.
        fusion: how heads become one: ``"mean"`` as in the paper, ``"max"`` or ``"min"``.
        discard: the share of each map's smallest values that is set to zero (ties by index), in [0, 1).
        token: the row of R that is written: 0 for a class token, -1 for the last one of a causal model; None for all.
        options: ``relevance``, a composite of rules in the gradient convention, such as ``AttnLRP()``; and those of
            every explainer.

    Raises:
        BadValue: nothing attends, maps that are not square and of one size, dropout at work, a number out of range.
        BadKey: an entry that the module does not read.

    Source: Chefer, Gur and Wolf, *Generic attention-model explainability for interpreting bi-modal and encoder-decoder
    transformers*, 2021 (section 3.1).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> net = TensorDictModule(encoder, ["tokens"], ["hidden"])
        >>> td = TensorDict(tokens=torch.randn(3, 5, 8), batch_size=[3])
        >>> TransformerAttribution(net, Target("hidden", (0, 4)))(td)["attribution", "tokens"].shape
        torch.Size([3, 5])
    """

    tunables = (Tunable("fusion", choices=_FUSIONS), Tunable("discard", 0.0, 0.95, 0.05))

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: NestedKey | None = None,
        *,
        layers: Sequence[int] | None = None,
        fusion: Fusion = "mean",
        discard: float = 0.0,
        token: int | None = 0,
        **options: Unpack[TransformerOptions],
    ) -> None:
        super().__init__()
        self.relevance = options.pop("relevance", None)
        _set_up(self, module, target, wrt, layers, fusion, discard, token, options)
        self._relevance: tuple[Attended, Pullback] | None = None
        if self.relevance is not None:
            if not hasattr(self.relevance, "rules_for"):
                raise BadType("not a composite of rules", got=repr(self.relevance), needed="AttnLRP(), or another one")
            program = Attended(self.relevance.rules_for(module, "gradient", ends="ratio"))
            self._relevance = program, Pullback(module, target, None, rules=program)

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, lead = self._explaining, td.batch_dims
        how: Any = {"create_graph": this.create_graph, "held": held, "width": this.width(td)}
        seen = _PROGRAM.seen(this.pullback, td, **how)
        assert seen.values is not None
        flows = seen.gradients
        if self._relevance is not None:
            program, pullback = self._relevance
            flows = [
                flow * gradient
                for flow, gradient in zip(program.seen(pullback, td, **how).gradients, flows, strict=True)
            ]
        several = seen.values.ndim > lead
        gradients = chosen(flows, self.layers, lead + several)
        total: Tensor | None = None
        for weights, gradient in zip(chosen(seen.weights, self.layers, lead), gradients, strict=True):
            part = (gradient * (weights.unsqueeze(lead) if several else weights)).relu()
            step = discarded(fused_heads(part, self.fusion), self.discard)
            total = _eye(step) + step if total is None else total + step @ total
        assert total is not None
        return {this.attribution_keys[0]: row_of(total, self.token, lead + several)} | this.written(seen.outputs)


_PROGRAM = Attended()


def _set_up(
    explainer: AttentionRollout | TransformerAttribution,
    module: TensorDictModuleBase,
    target: Target,
    wrt: NestedKey | None,
    layers: Sequence[int] | None,
    fusion: str,
    discard: float,
    token: int | None,
    options: Any,
) -> None:
    check_options(options, [*Running.__annotations__, *Options.__annotations__])
    if fusion not in _FUSIONS:
        raise BadValue("no such way to fuse heads", got=f"fusion={fusion!r}", needed=f"one of {list(_FUSIONS)}")
    if not (isinstance(discard, (int, float)) and 0 <= discard < 1):
        raise BadValue("not a share to discard", got=f"discard={discard!r}", needed="a number in [0, 1)")
    if not (token is None or type(token) is int):
        raise BadValue("not a token", got=f"token={token!r}", needed="an int, or None for all")
    if layers is not None and (isinstance(layers, str) or not len(layers) or any(type(i) is not int for i in layers)):
        raise BadValue("not numbers of layers", got=f"layers={layers!r}", needed="ints, one or more")
    this = Explaining(module, target, None, options, rules=_PROGRAM)
    key = as_key(this.pullback.wrt[0] if wrt is None else wrt)
    if key not in module.in_keys:
        raise BadKey(f"the module does not read {key_text(key)}", got=f"in_keys {list(module.in_keys)}")
    at = as_key(join(this.out_key, key))
    this.entries = [key]  # the one that is explained
    this.out_keys = [at, *(module.out_keys if this.outputs else [])]
    this.attribution_keys = [at]
    check_writable(this.out_keys, this.in_keys)
    explainer.module, explainer._explaining = module, this
    explainer.layers, explainer.fusion, explainer.discard, explainer.token = layers, fusion, float(discard), token
    explainer.in_keys, explainer.out_keys = this.in_keys, this.out_keys


def chosen(maps: list[Tensor], layers: Sequence[int] | None, lead: int) -> list[Tensor]:
    """Maps ``[*lead, heads, T, T]`` of the wanted layers, in the order of execution.

    Raises:
        BadValue: a layer that is not there, or maps of several sizes.
    """
    count = len(maps)
    if layers is not None:
        wrong = [i for i in layers if not -count <= i < count]
        if wrong:
            raise BadValue("no such layer with attention", got=f"{wrong}", needed=f"numbers below {count}")
        maps = [maps[i] for i in sorted({i % count for i in layers})]
    sizes = [tuple(one.shape[lead + 1 :]) for one in maps]
    if len({*sizes}) > 1 or sizes[0][0] != sizes[0][1]:
        raise BadValue(
            "the layers do not attend among the same tokens",
            got=f"maps of sizes {sizes}",
            needed="square maps of one size",
            fix="layers=[...] takes those of one stack; attention across two sequences is none",
        )
    return maps


def fused_heads(maps: Tensor, fusion: str) -> Tensor:
    """``[..., heads, T, T]`` as one map."""
    if fusion == "mean":
        return maps.mean(-3)
    return maps.amax(-3) if fusion == "max" else maps.amin(-3)


def discarded(maps: Tensor, share: float) -> Tensor:
    """Each map with its smallest values set to zero: ``floor(share * T * T)`` of them, ties by index."""
    flat = maps.flatten(-2)
    count = int(share * flat.shape[-1] + 1e-9)
    if not count:
        return maps
    order = flat.argsort(dim=-1, stable=True)[..., :count]
    return flat.scatter(-1, order, 0.0).view(maps.shape)


def row_of(total: Tensor, token: int | None, lead: int) -> Tensor:
    """One row of ``[*lead, T, T]``."""
    if token is None:
        return total
    if not -total.shape[-1] <= token < total.shape[-1]:
        raise BadValue("no such token", got=f"token={token}", needed=f"one of {total.shape[-1]}")
    return total.select(lead, token).clone()


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
