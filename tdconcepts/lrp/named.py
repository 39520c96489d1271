"""The composites that have names in the literature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from tdconcepts.hooks.rules import Rule
from tdconcepts.lrp import kinds
from tdconcepts.lrp.affine import is_convolution, is_linear
from tdconcepts.lrp.attention import AttentionRule, GatedProductRule, SoftmaxEpsilonRule
from tdconcepts.lrp.boundary import FlatRule, ZBoxRule
from tdconcepts.lrp.composites import SUMS, Composite
from tdconcepts.lrp.epsilon import EpsilonRule, NormRule, UniformEpsilonRule
from tdconcepts.lrp.norms import LayerNormRule, RMSNormRule
from tdconcepts.lrp.passing import ConstantRule, IgnoreRule, NumeratorRule, PassRule, PseudoIdentityRule
from tdconcepts.lrp.recurrent import GRURule, LSTMRule, RNNRule
from tdconcepts.lrp.signed import AlphaBetaRule, GammaRule, ZPlusRule
from tdconcepts.lrp.stabilizers import Stabilizing
from tdconcepts.tunables import Tunable, constructor

__all__ = [
    "CPLRP",
    "AttnLRP",
    "BaseRuleMapper",
    "EpsilonAlpha2Beta1",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "ExcitationBackprop",
    "UniformEpsilon",
]

EPSILON = Tunable("epsilon", 1e-6, 1.0, 10, log=True)
More = Composite | Mapping[Any, Rule] | None
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@constructor()
def BaseRuleMapper(  # noqa: N802
    stabilizer: Stabilizing = 1e-6,
    rule_mapper: More = None,
    constant: bool = False,
    on_missing: Literal["raise", "warn", "gradient"] = "raise",
) -> Composite:
    """What the composites share: activations, norms, pooling, attention and recurrent layers, and the operations.

    Args:
        stabilizer: a number or a stabiliser.
        rule_mapper: rules on top.
        constant: whether attention weights and gates are constants (CP-LRP).
        on_missing: see :class:`~tdconcepts.lrp.Composite`; linear layers and convolutions have no rule here.

    Raises:
        BadType: for a stabiliser that is none, and rules on top that are none; as all composites here.
        BadValue: for a negative stabiliser.

    Examples:
        >>> BaseRuleMapper().operations["gelu"]
        PseudoIdentityRule(epsilon=1e-06)
    """
    by = 1e-6 if callable(stabilizer) else stabilizer
    passes, norm, batches = PseudoIdentityRule(by), NormRule(stabilizer), PassRule(stabilizer)
    layers, scales = LayerNormRule(stabilizer), RMSNormRule()
    softmax: Rule = ConstantRule() if constant else SoftmaxEpsilonRule()
    rules: dict[Any, Rule] = {
        kinds.activation: passes,
        kinds.average: norm,
        kinds.batch_norm: batches,
        kinds.rms_norm: scales,
        _NORMS: layers,
        nn.MultiheadAttention: AttentionRule(constant),
        (nn.LSTM, nn.LSTMCell): LSTMRule(stabilizer),
        (nn.GRU, nn.GRUCell): GRURule(stabilizer),
        (nn.RNN, nn.RNNCell): RNNRule(stabilizer),
        (nn.Softmax, nn.Softmax2d): softmax,
        nn.Bilinear: UniformEpsilonRule(stabilizer),
    }
    product = UniformEpsilonRule(stabilizer)
    operations: dict[str, Rule] = {
        **dict.fromkeys(kinds.ELEMENTWISE, passes),
        **dict.fromkeys(["layer_norm", "group_norm"], layers),
        **dict.fromkeys(["rms_norm", "normalize"], scales),
        **dict.fromkeys(["rsqrt", "reciprocal"], ConstantRule()),
        **dict.fromkeys(["matmul", "baddbmm", "einsum", "dot", "inner", "outer", "bilinear"], product),
        **dict.fromkeys(["tensordot", "kron"], product),
        "batch_norm": batches,
        **dict.fromkeys(["mul", "glu"], GatedProductRule(stabilizer, signal=1 if constant else None)),
        "div": NumeratorRule(),
        "softmax": softmax,
        "scaled_dot_product_attention": AttentionRule(constant),
        **dict.fromkeys(sorted(SUMS), norm),
    }
    return _with(Composite(rules, operations, on_missing=on_missing, plain=kinds.PLAIN), rule_mapper)


def _with(composite: Composite, more: More) -> Composite:
    return composite if more is None else composite | more


def _layers(convolutions: Rule, dense: Rule, base: Composite, more: More, first: Any = None) -> Composite:
    names = [f"conv{t}{n}d" for n in (1, 2, 3) for t in ("", "_transpose")]
    operations = {"linear": dense, "addmm": dense, **dict.fromkeys(names, convolutions)}
    rules = {is_convolution: convolutions, is_linear: dense}
    return _with(base | Composite(rules, operations, first), more)


def _flat(first: bool, stabilizer: Stabilizing) -> Any:
    return (layer, FlatRule(stabilizer)) if first else None


def layer(module: Any) -> bool:
    """A linear layer or a convolution."""
    return is_linear(module) or is_convolution(module)


@constructor(EPSILON)
def EpsilonPlus(  # noqa: N802
    epsilon: Stabilizing = 1e-6, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None, flat: bool = False
) -> Composite:
    """z-plus for convolutions, epsilon for fully connected layers.

    Args:
        epsilon: of the fully connected layers.
        stabilizer: of all others.
        rule_mapper: rules on top.
        flat: flat for the first layer that runs, as in ``EpsilonPlusFlat``.

    Source: Kohlbrenner et al., *Towards best practice in explaining neural network decisions with LRP*, 2020.

    Examples:
        >>> [rule for kind, rule in EpsilonPlus(0.25).rules[:2]]
        [ZPlusRule(epsilon=1e-06, zero_params=()), EpsilonRule(epsilon=0.25, zero_params=())]
    """
    base, first = BaseRuleMapper(stabilizer), _flat(flat, stabilizer)
    return _layers(ZPlusRule(stabilizer), EpsilonRule(epsilon), base, rule_mapper, first)


@constructor(EPSILON)
def EpsilonAlpha2Beta1(  # noqa: N802
    epsilon: Stabilizing = 1e-6, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None, flat: bool = False
) -> Composite:
    """Alpha-beta with 2 and 1 for convolutions, epsilon for fully connected layers.

    Args:
        epsilon: of the fully connected layers.
        stabilizer: of all others.
        rule_mapper: rules on top.
        flat: flat for the first layer that runs, as in ``EpsilonAlpha2Beta1Flat``.

    Source: Kohlbrenner et al., *Towards best practice in explaining neural network decisions with LRP*, 2020.

    Examples:
        >>> EpsilonAlpha2Beta1(flat=True).first[1]
        FlatRule(epsilon=1e-06)
    """
    rule = AlphaBetaRule(2.0, 1.0, stabilizer)
    return _layers(rule, EpsilonRule(epsilon), BaseRuleMapper(stabilizer), rule_mapper, _flat(flat, stabilizer))


@constructor(Tunable("gamma", 0.05, 1.0, 0.05))
def EpsilonGammaBox(  # noqa: N802
    low: Any, high: Any, gamma: float = 0.25, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None
) -> Composite:
    """z-box for the first convolution that runs, gamma for the others, epsilon for fully connected layers.

    Args:
        low: the smallest value of an input: a number, or a tensor that broadcasts to it.
        high: the largest value.
        gamma: see :class:`~tdconcepts.lrp.GammaRule`.
        stabilizer: a number or a stabiliser, of all.
        rule_mapper: rules on top.

    Source: Montavon et al., *Layer-wise relevance propagation: an overview*, 2019.

    Examples:
        >>> EpsilonGammaBox(-1.0, 1.0).first[1].low
        -1.0
    """
    first = (is_convolution, ZBoxRule(low, high, stabilizer))
    dense = EpsilonRule(stabilizer)
    return _layers(GammaRule(gamma, stabilizer), dense, BaseRuleMapper(stabilizer), rule_mapper, first)


@constructor()
def ExcitationBackprop(stabilizer: Stabilizing = 1e-6, rule_mapper: More = None) -> Composite:  # noqa: N802
    """z-plus for every layer; activations and batch norms have their gradient.

    It is the *relevance* that their gradient multiplies, so it flows by default. (In the gradient convention it is the
    ratio, which for a ReLU is the same.)

    Args:
        stabilizer: a number or a stabiliser, of all.
        rule_mapper: rules on top.

    Source: Zhang et al., *Top-down neural attention by excitation backprop*, 2016.

    Examples:
        >>> ExcitationBackprop().operations["linear"]
        ZPlusRule(epsilon=1e-06, zero_params=())
    """
    plus = ZPlusRule(stabilizer)
    plain = IgnoreRule()
    names = [*kinds.ELEMENTWISE, "batch_norm"]
    over = Composite({kinds.activation: plain, kinds.batch_norm: plain}, dict.fromkeys(names, plain))
    base = dataclasses.replace(BaseRuleMapper(stabilizer) | over, convention="relevance")
    return _layers(plus, plus, base, rule_mapper)


@constructor(EPSILON)
def UniformEpsilon(epsilon: Stabilizing = 0.25, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None) -> Composite:  # noqa: N802
    """Epsilon for every layer, and for batch norms.

    Args:
        epsilon: of the layers.
        stabilizer: of all others.
        rule_mapper: rules on top.

    Source: Bach et al., *On pixel-wise explanations*, 2015.

    Examples:
        >>> UniformEpsilon().operations["conv2d"]
        EpsilonRule(epsilon=0.25, zero_params=())
    """
    rule = EpsilonRule(epsilon)
    batches = EpsilonRule(stabilizer)
    base = BaseRuleMapper(stabilizer) | Composite({kinds.batch_norm: batches}, {"batch_norm": batches})
    return _layers(rule, rule, base, rule_mapper)


@constructor(EPSILON)
def AttnLRP(epsilon: Stabilizing = 0.0, stabilizer: Stabilizing = 1e-9, rule_mapper: More = None) -> Composite:  # noqa: N802
    """For transformers: epsilon for layers, half to each factor of a product, the softmax by its Taylor rule.

    Args:
        epsilon: of the layers; 0 is LRP-0, which in the gradient convention costs nothing.
        stabilizer: of all others.
        rule_mapper: rules on top.

    Source: Achtibat et al., *AttnLRP: attention-aware layer-wise relevance propagation for transformers*, 2024.

    Examples:
        >>> AttnLRP().operations["scaled_dot_product_attention"]
        AttentionRule(constant=False)
    """
    rule = EpsilonRule(epsilon)
    return _layers(rule, rule, BaseRuleMapper(stabilizer), rule_mapper)


@constructor(EPSILON)
def CPLRP(epsilon: Stabilizing = 0.0, stabilizer: Stabilizing = 1e-9, rule_mapper: More = None) -> Composite:  # noqa: N802
    """For transformers: attention weights and gates are constants, so relevance is conserved.

    Of a product ``act(gate) * up`` the second factor is the signal; where it is the first one, as in ``x *
    sigmoid(gate)``, write ``CPLRP() | Composite(operations={"mul": GatedProductRule(signal=0)})``.

    Args:
        epsilon: of the layers; 0 is LRP-0, which in the gradient convention costs nothing.
        stabilizer: of all others.
        rule_mapper: rules on top.

    Source: Ali et al., *XAI for transformers: better explanations through conservative propagation*, 2022.

    Examples:
        >>> CPLRP().operations["softmax"]
        ConstantRule()
    """
    rule = EpsilonRule(epsilon)
    return _layers(rule, rule, BaseRuleMapper(stabilizer, constant=True), rule_mapper)
