"""What a representation holds: probes, directions, similarity, dimension. What can be read need not be used."""

from tdconcepts.representations.bilinear import BilinearProbe
from tdconcepts.representations.dimension import CAPCA, LocalKNN, LocalPCA, TwoNN
from tdconcepts.representations.geometry import RSA, InformationImbalance
from tdconcepts.representations.linear import LinearProbe, MassMeanProbe
from tdconcepts.representations.logistic import LogisticProbe
from tdconcepts.representations.maximising import ActivationMaximisation, Regularise
from tdconcepts.representations.moments import Moments
from tdconcepts.representations.principal import PCA
from tdconcepts.representations.probes import RidgeProbe, ridge_direction
from tdconcepts.representations.scoring import ProbeScores, cross_validate, score
from tdconcepts.representations.similarity import CCA, CKA, SVCCA
from tdconcepts.representations.steering import SteeringVector
from tdconcepts.representations.tcav import TCAV, TCAVScores

__all__ = [
    "CAPCA",
    "CCA",
    "CKA",
    "PCA",
    "RSA",
    "SVCCA",
    "TCAV",
    "ActivationMaximisation",
    "BilinearProbe",
    "InformationImbalance",
    "LinearProbe",
    "LocalKNN",
    "LocalPCA",
    "LogisticProbe",
    "MassMeanProbe",
    "Moments",
    "ProbeScores",
    "Regularise",
    "RidgeProbe",
    "SteeringVector",
    "TCAVScores",
    "TwoNN",
    "cross_validate",
    "ridge_direction",
    "score",
]
