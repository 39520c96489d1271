"""The conformance rows of the representations room."""

import torch
from tensordict import TensorDict
from world import DIFFERENTIABLE, World, explainer, row

from tdconcepts import Site, Target
from tdconcepts.representations import (
    CAPCA,
    CCA,
    CKA,
    PCA,
    RSA,
    TCAV,
    ActivationMaximisation,
    BilinearProbe,
    InformationImbalance,
    LinearProbe,
    LocalKNN,
    LocalPCA,
    LogisticProbe,
    MassMeanProbe,
    Regularise,
    SteeringVector,
    TwoNN,
)

POINTS = "a set of points alone looks like a batch of rows"
LOOKS = "it looks at its points, which a graph can't"


def data(w: World) -> TensorDict:
    """Rows to fit to: the same in every world, in its dtype and under its keys."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    y = (x[:, :2] + 0.5 * torch.randn(24, 2, generator=generator, dtype=torch.float64) > 0).long()
    found = {w("observation"): x, w("latent"): x.flip(-1) + 1, w("kind"): y, w("value"): x[:, 0] - x[:, 3]}
    td = TensorDict({}, batch_size=[24], device=w.device)
    for key, value in found.items():
        td.set(key, value.to(w.dtype) if value.is_floating_point() else value)
    return td


def fitted(name, make, **exempt):
    return row(name, lambda w: make(w).fit(data(w)), detached=DIFFERENTIABLE, **exempt)


def pair(w: World) -> list:
    return [w("observation"), w("latent")]


def among(name, make):
    return row(name, lambda w: make(w("observation", group="noise")), called_with_tensors=POINTS, compiled=LOOKS)


def tcav(w: World) -> TCAV:
    made = TCAV(w.model, Target(w("logits"), [0, 2]), [Site("0.0"), w("hidden")], 3, 1.0, w.generator, **w.chunk)
    rows = data(w).exclude(w("kind"), w("value"))
    return made.fit({"first": rows[:9]}, random=rows[9:])


ROWS = [
    fitted("LinearProbe", lambda w: LinearProbe(pair(w), w("value"))),
    fitted("MassMeanProbe", lambda w: MassMeanProbe(w("observation"), w("kind"))),
    fitted("LogisticProbe", lambda w: LogisticProbe(pair(w), w("kind"), classes=2)),
    fitted("BilinearProbe", lambda w: BilinearProbe(w("observation"), w("latent"), w("value"), rank=2)),
    fitted("PCA", lambda w: PCA(pair(w), 2, whiten=True)),
    row(
        "SteeringVector",
        lambda w: SteeringVector(w("observation"), negative=w("latent"), method="pca").fit(data(w)),
        detached=DIFFERENTIABLE,
    ),
    explainer("TCAV", tcav, "0.0", "0", precision="the probes are fitted to activations of another dtype"),
    explainer(
        "ActivationMaximisation",
        lambda w: ActivationMaximisation(
            w.model, Target(w("logits"), [0, 2]), steps=3, regularise=Regularise(0.1, 0.1, high=1.5), **w.chunk
        ),
    ),
    among("CKA", lambda key: CKA([key], kernel="rbf", within=True)),
    among("CCA", lambda key: CCA(key, variance=0.9, within=True)),
    among("RSA", lambda key: RSA(key, within=True)),
    among("InformationImbalance", lambda key: InformationImbalance([key], within=True)),
    among("TwoNN", lambda key: TwoNN(key, within=True)),
    among("LocalKNN", lambda key: LocalKNN(key, k=2, within=True)),
    row(
        "CAPCA",
        lambda w: CAPCA(w("observation"), k=2),
        compiled=LOOKS,
        **dict.fromkeys(["rows", "called_with_tensors", "empty"], "the batch is the set of points"),
    ),
    among("LocalPCA", lambda key: LocalPCA(key, k=2, within=True)),
]
