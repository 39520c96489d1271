"""Explain by relevance: rules, composites of rules, and the explainer that propagates a target's value."""

from tdconcepts.lrp.attention import AHQKVRule, AttentionRule, GatedProductRule, SoftmaxEpsilonRule
from tdconcepts.lrp.boundary import FlatRule, WSquareRule, ZBoxRule
from tdconcepts.lrp.composites import Composite
from tdconcepts.lrp.epsilon import EpsilonRule, NormRule, UniformEpsilonRule
from tdconcepts.lrp.explainer import LRP
from tdconcepts.lrp.folding import FoldedBatchNorm, FoldRule, fold
from tdconcepts.lrp.modifiers import ModifiedRule, ParamModifier, RemovableRuleHandle
from tdconcepts.lrp.named import (
    CPLRP,
    AttnLRP,
    BaseRuleMapper,
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlus,
    ExcitationBackprop,
    UniformEpsilon,
)
from tdconcepts.lrp.norms import LayerNormRule, RMSNormRule
from tdconcepts.lrp.passing import (
    ConstantRule,
    IgnoreRule,
    NumeratorRule,
    PassRule,
    PseudoIdentityRule,
    StopRule,
    UniformRule,
)
from tdconcepts.lrp.rap import RAPRule
from tdconcepts.lrp.rectifiers import BetaSmoothRule, DeconvNetRule, GuidedBackpropRule
from tdconcepts.lrp.recurrent import GRURule, LSTMRule, RNNRule
from tdconcepts.lrp.report import Conservation
from tdconcepts.lrp.short import BetaSmooth, DeconvNet, EpsilonAlpha2Beta1Flat, EpsilonPlusFlat, GuidedBackprop
from tdconcepts.lrp.signed import AlphaBetaRule, GammaRule, ZPlusRule
from tdconcepts.lrp.stabilizers import Stabilizer

__all__ = [
    "CPLRP",
    "LRP",
    "AHQKVRule",
    "AlphaBetaRule",
    "AttentionRule",
    "AttnLRP",
    "BaseRuleMapper",
    "BetaSmooth",
    "BetaSmoothRule",
    "Composite",
    "Conservation",
    "ConstantRule",
    "DeconvNet",
    "DeconvNetRule",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "EpsilonRule",
    "ExcitationBackprop",
    "FlatRule",
    "FoldRule",
    "FoldedBatchNorm",
    "GRURule",
    "GammaRule",
    "GatedProductRule",
    "GuidedBackprop",
    "GuidedBackpropRule",
    "IgnoreRule",
    "LSTMRule",
    "LayerNormRule",
    "ModifiedRule",
    "NormRule",
    "NumeratorRule",
    "ParamModifier",
    "PassRule",
    "PseudoIdentityRule",
    "RAPRule",
    "RMSNormRule",
    "RNNRule",
    "RemovableRuleHandle",
    "SoftmaxEpsilonRule",
    "Stabilizer",
    "StopRule",
    "UniformEpsilon",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
    "fold",
]
