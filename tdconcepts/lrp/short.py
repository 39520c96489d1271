"""The composites that begin with a flat layer, and those that change the backward pass of ReLUs only."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdconcepts.hooks.rules import Rule
from tdconcepts.lrp.composites import Composite
from tdconcepts.lrp.named import EPSILON, EpsilonAlpha2Beta1, EpsilonPlus, More
from tdconcepts.lrp.rectifiers import BetaSmoothRule, DeconvNetRule, GuidedBackpropRule
from tdconcepts.lrp.stabilizers import Stabilizing
from tdconcepts.tunables import Tunable, constructor

__all__ = ["BetaSmooth", "DeconvNet", "EpsilonAlpha2Beta1Flat", "EpsilonPlusFlat", "GuidedBackprop"]


@constructor(EPSILON)
def EpsilonPlusFlat(  # noqa: N802
    epsilon: Stabilizing = 1e-6, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None
) -> Composite:
    """`EpsilonPlus`, with flat for the first layer that runs.

    Args:
        epsilon: of the fully connected layers.
        stabilizer: of all others.
        rule_mapper: rules on top.

    Source: Kohlbrenner et al., *Towards best practice in explaining neural network decisions with LRP*, 2020.

    Examples:
        >>> EpsilonPlusFlat().first[1]
        FlatRule(epsilon=1e-06)
    """
    return EpsilonPlus(epsilon, stabilizer, rule_mapper, flat=True)


@constructor(EPSILON)
def EpsilonAlpha2Beta1Flat(  # noqa: N802
    epsilon: Stabilizing = 1e-6, stabilizer: Stabilizing = 1e-6, rule_mapper: More = None
) -> Composite:
    """`EpsilonAlpha2Beta1`, with flat for the first layer that runs.

    Args:
        epsilon: of the fully connected layers.
        stabilizer: of all others.
        rule_mapper: rules on top.

    Source: Kohlbrenner et al., *Towards best practice in explaining neural network decisions with LRP*, 2020.

    Examples:
        >>> EpsilonAlpha2Beta1Flat().operations["conv2d"].alpha
        2.0
    """
    return EpsilonAlpha2Beta1(epsilon, stabilizer, rule_mapper, flat=True)


@constructor()
def GuidedBackprop(rule_mapper: More = None) -> Composite:  # noqa: N802
    """Guided back-propagation of every ReLU; all else has its gradient.

    Args:
        rule_mapper: rules on top.

    Source: Springenberg et al., *Striving for simplicity*, 2015.

    Examples:
        >>> GuidedBackprop().convention
        'relevance'
    """
    return _of_relus(GuidedBackpropRule(), rule_mapper)


@constructor()
def DeconvNet(rule_mapper: More = None) -> Composite:  # noqa: N802
    """Deconvolution of every ReLU; all else has its gradient.

    Args:
        rule_mapper: rules on top.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014.

    Examples:
        >>> DeconvNet().operations["relu"]
        DeconvNetRule()
    """
    return _of_relus(DeconvNetRule(), rule_mapper)


@constructor(Tunable("beta", 1.0, 100.0, 10, log=True))
def BetaSmooth(beta: float = 10.0, rule_mapper: More = None) -> Composite:  # noqa: N802
    """The gradient of a softplus for every ReLU; all else has its own.

    Args:
        beta: sharpness, > 0, in units of 1 / x.
        rule_mapper: rules on top.

    Raises:
        BadValue: a beta that is not positive.

    Source: Dombrowski et al., *Explanations can be manipulated and geometry is to blame*, 2019.

    Examples:
        >>> BetaSmooth(5.0).operations["relu"]
        BetaSmoothRule(beta=5.0)
    """
    return _of_relus(BetaSmoothRule(beta), rule_mapper)


def _of_relus(rule: Rule, more: Any) -> Composite:
    composite = Composite({nn.ReLU: rule}, {"relu": rule}, convention="relevance", on_missing="gradient")
    return composite if more is None else composite | more
