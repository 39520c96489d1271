"""Many probes at once against a loop of scikit-learn's, neighbourhoods against a loop over points, changed weights."""

import os
import statistics
import time

import pytest
import torch
from sklearn import decomposition
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestNeighbors
from tdhook.latent.dimension_estimation import LocalPcaDimensionEstimator
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.representations import LinearProbe, LocalPCA, LogisticProbe, cross_validate, score
from tdconcepts.weights import Shifted, TaskVector, prune

SITES, LABELS, ROWS, WIDTH = 12, 100, 400, 32
KEYS = [("activation", str(site)) for site in range(SITES)]

pytestmark = pytest.mark.benchmark(group="representations")


def activations():
    """Twelve sites, of which each knows more of a hundred concepts than the one before."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(ROWS, LABELS, generator=generator)
    mix = torch.randn(LABELS, WIDTH, generator=generator)
    td = TensorDict(value=concepts, kind=(concepts > 0).long(), batch_size=[ROWS])
    for site, key in enumerate(KEYS):
        td[key] = site / SITES * concepts @ mix / LABELS**0.5 + torch.randn(ROWS, WIDTH, generator=generator)
    return td


def loop(make, label, found):
    """What one writes: a model of scikit-learn's for each site and label."""

    def form(td):
        train, test = td[: ROWS // 2], td[ROWS // 2 :]
        scores = torch.empty(SITES, LABELS)
        for s, key in enumerate(KEYS):
            x, x_test = train[key].double().numpy(), test[key].double().numpy()
            for k in range(LABELS):
                model = make().fit(x, train[label][:, k].numpy())
                scores[s, k] = found(model, x_test, test[label][:, k].numpy())
        return [scores.mean(1)]

    return form


def many(make):
    def form(td):
        probe = make().fit(td[: ROWS // 2])
        scores = score(probe, td[ROWS // 2 :])
        return [torch.stack([scores[key].mean() for key in KEYS]).float()]

    return form


def test_logistic(compare):
    ours = many(lambda: LogisticProbe(KEYS, "kind"))
    theirs = loop(LogisticRegression, "kind", lambda m, x, y: m.score(x, y))
    name = "1200 logistic probes (100 on 12 sites) / scikit-learn in a loop"
    compare(name, ours, theirs, activations(), [], faster=10, tolerance=2e-3)


def test_ridge(compare):
    ours = many(lambda: LinearProbe(KEYS, "value"))
    theirs = loop(Ridge, "value", lambda m, x, y: m.score(x, y))
    name = "1200 ridge probes (100 on 12 sites) / scikit-learn in a loop"
    compare(name, ours, theirs, activations(), [], faster=10, tolerance=1e-4)


def test_cross_validation(compare):
    """Five folds against five fits."""
    td = activations()

    def ours(td):
        scores = cross_validate(LogisticProbe(KEYS, "kind"), td).folds
        return [torch.stack([scores[key].mean() for key in KEYS]).float()]

    def theirs(td):
        fold, found = torch.arange(ROWS) % 5, []
        for f in range(5):
            scores = score(LogisticProbe(KEYS, "kind").fit(td[fold != f]), td[fold == f])
            found.append(torch.stack([scores[key].mean() for key in KEYS]))
        return [torch.stack(found).mean(0).float()]

    compare("cross-validation in 5 folds / 5 fits and scores", ours, theirs, td, [], tolerance=2e-3)


def noisy():
    """A thousand points of three dimensions in thirty-two, with one per cent of noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    return TensorDict(x=x + 0.01 * torch.randn(1000, 32, generator=generator), batch_size=[1000])


def by_tdhook(td):
    theirs = LocalPcaDimensionEstimator(k=20, criterion="ratio", in_key="x")
    return [theirs(TensorDict(x=td["x"].double(), batch_size=[]))["dimension"].float()]


def test_local_pca(compare):
    """As one calls it: with as many threads as there are, by the clock."""
    td, ours, pairs = noisy(), LocalPCA("x"), []
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        for _ in range(12):
            taken = []
            for form in (ours, by_tdhook):
                fresh, start = td.copy(), time.perf_counter()
                form(fresh)
                taken.append(time.perf_counter() - start)
            pairs.append(taken)
    finally:
        torch.set_num_threads(threads)
    one, other = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
    ratios = [statistics.median(a / b for a, b in pairs[i::3]) for i in (2, 3, 4)]
    name = "local PCA, 1000 points in 32-D, all threads, by the clock / TDHook, which loops"
    compare.add(name, one, other, ratios, "<= 0.0333 (30x faster)", statistics.median(ratios) <= 1 / 30)
    compare.benchmark.pedantic(lambda: ours(td.copy()), rounds=3)


@pytest.mark.parametrize("reference", ["TDHook, which loops", "scikit-learn's PCA in a loop", "svdvals in a loop"])
def test_local_pca_on_one_thread(compare, reference):
    """The eigenvalues of a thousand matrices by LAPACK, one after the other, are half of ours."""

    def by_point(td):
        if reference.startswith("TDHook"):
            return by_tdhook(td)
        x = td["x"].double()
        places = torch.from_numpy(NearestNeighbors(n_neighbors=21).fit(x.numpy()).kneighbors(x.numpy())[1])
        found = []
        for place in places:
            points = x[place]
            if reference.startswith("svdvals"):
                values = torch.linalg.svdvals(points - points.mean(0)) ** 2
            else:
                values = torch.from_numpy(decomposition.PCA().fit(points.numpy()).explained_variance_)
            found.append((values >= 0.05 * values[0]).sum())
        return [torch.stack(found).float()]

    aim = {"faster": 30} if reference.startswith("TDHook") else {}
    name = f"local PCA, 1000 points in 32-D / {reference}"
    compare(name, LocalPCA("x"), by_point, noisy(), [("dimension", "x")], **aim)


@pytest.mark.parametrize(("width", "rows"), [(64, 64), (1024, 256)])
@pytest.mark.parametrize("kind", ["pruned", "task vector"])
def test_changed_weights(compare, kind, width, rows):
    """Twelve layers with other weights, against a copy that has them written."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = TensorDictModule(nn.Sequential(*layers), ["x"], ["y"]).requires_grad_(False)
    td = TensorDict(x=torch.randn(rows, width), batch_size=[rows])
    if kind == "pruned":
        m = prune(net, 0.5)
    else:
        m = TaskVector({f"{2 * i}.weight": 0.01 * torch.randn(width, width) for i in range(12)}).on(net)
    written = nn.Sequential(*layers[:0])
    for i in range(12):
        new = nn.Linear(width, width).requires_grad_(False)
        change = m.program.changes[f"{2 * i}.weight"]
        assert kind == "pruned" or isinstance(change, Shifted)
        new.weight.copy_(change(layers[2 * i].weight))
        new.bias.copy_(layers[2 * i].bias)
        written.extend([new, nn.ReLU()])
    reference = TensorDictModule(written, ["x"], ["y"])
    compare(f"{kind} weights, 12 layers, width {width} / written", m, reference, td, ["y"])
