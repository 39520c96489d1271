"""Table 1 of Concept Embedding Models (Espinosa Zarlenga et al., NeurIPS 2022) on its three synthetic tasks.

    python -m benchmarks.papers.embedding_tasks [--seeds 3] [--epochs 500] [--models CEM ...] [--json FILE]

The settings are those of the paper and of the code that its authors published (github.com/mateoespinosa/cem): 2100
samples to train on and then 600 to test on, drawn from numpy's generator with the seed 42, the same for every run; an
MLP of 128-128 with leaky ReLUs, embeddings of 128, RandInt with 0.25, a linear head; 500 epochs, batches of 256 in the
order of the samples, Adam with a step size of 1e-2, which is divided by 10 where the last batch's loss has not fallen
for ten epochs (ReduceLROnPlateau); weight 1 for the concepts. Two things differ: RandInt draws for each row, as the
paper says (the published code draws once for each batch), and the validation set of 300, which can stop a run at epoch
480 at the earliest, is not used.

The published accuracies count a task as predicted where its *logit* is above 0.5, a probability above 0.62: the
accuracy there is taken of the head's output, to which no sigmoid is applied. Both are printed here, that one and the
usual one, probability above 0.5, on the same 600 samples and on 100 000 fresh ones; in percent, the mean over the seeds
and the standard deviation.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts import (
    ConceptActivation,
    ConceptBottleneck,
    ConceptEmbedding,
    ConceptLoss,
    ConceptSpec,
    TotalLoss,
    teach,
    toy_data,
)
from tdconcepts.concepts.toys import TOYS

TRAIN, TEST, FRESH, DATA_SEED = 2100, 600, 100_000, 42
WIDTH, BATCH, STEP, WEIGHT = 128, 256, 1e-2, 1.0
PAPER = {
    "xor": {"CEM": 99.17, "Bool CBM": 51.33, "Fuzzy CBM": 51.42, "no concepts": 99.33},
    "trigonometry": {"CEM": 98.43, "Bool CBM": 77.77, "Fuzzy CBM": 98.37, "no concepts": 98.47},
    "dot": {"CEM": 97.13, "Bool CBM": 48.00, "Fuzzy CBM": 48.17, "no concepts": 97.57},
}
TASK = ConceptSpec(["task"])


class Numpy:
    """Draws of numpy's generator, in double precision, where toy_data has torch's."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.state.uniform(size=shape))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.state.normal(size=shape))


class Data(NamedTuple):
    train: TensorDictBase
    test: TensorDictBase
    fresh: TensorDictBase
    concepts: ConceptSpec


def published(name: str) -> Data:
    """The paper's samples, and fresh ones."""
    names, _, draw = TOYS[name]
    source: Any = Numpy(DATA_SEED)
    parts = []
    for n in (TRAIN, TEST):
        x, labels, task = draw(n, source)
        parts.append(TensorDict(observation=x.float(), labels=labels.float(), task=task.float(), batch_size=[n]))
    fresh = toy_data(name, FRESH, torch.Generator().manual_seed(0)).td  # type: ignore[arg-type]
    return Data(*parts, fresh, ConceptSpec(names))


def body(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU())


def model_of(kind: str, features: int, spec: ConceptSpec) -> TensorDictSequential:
    if kind == "CEM":
        return ConceptEmbedding(body(features), 1, spec, in_features=WIDTH, embedding_size=WIDTH)
    if kind == "no concepts":  # as wide as the embeddings, with nothing between its last two layers
        wide = nn.Sequential(body(features), nn.Linear(WIDTH, spec.size * WIDTH))
        return TensorDictSequential(
            TensorDictModule(wide, ["observation"], ["latent"]),
            TensorDictModule(nn.Linear(spec.size * WIDTH, 1), ["latent"], ["logits"]),
        )
    encoder = nn.Sequential(body(features), nn.Linear(WIDTH, spec.size))
    if kind == "Fuzzy CBM":
        return ConceptBottleneck(encoder, nn.Linear(spec.size, 1), spec)
    hard = TensorDictSequential(
        TensorDictModule(encoder, ["observation"], ["concepts_logits"]), ConceptActivation(spec, hard=True)
    )
    return ConceptBottleneck(hard, nn.Linear(spec.size, 1), spec)


def trained(kind: str, data: Data, seed: int, epochs: int) -> TensorDictSequential:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = model_of(kind, data.train["observation"].shape[-1], data.concepts)
    losses = [ConceptLoss(TASK, {"logits": "task"}, "task")]
    weights = {"task": 1.0}
    pipeline = model
    if kind != "no concepts":
        pipeline = teach(model, how="randint" if kind == "CEM" else "joint", generator=generator)
        losses.append(ConceptLoss(data.concepts))
        weights["concepts"] = WEIGHT
    training = TensorDictSequential(pipeline, *losses, TotalLoss(weights))
    optimizer = torch.optim.Adam(training.parameters(), lr=STEP, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    batches = [data.train[rows] for rows in torch.arange(TRAIN).split(BATCH)]
    for _ in range(epochs):
        for batch in batches:
            loss = training(batch.copy())["loss", "total"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(loss.item())
    return model.eval()


def accuracies(model: TensorDictSequential, data: Data) -> list[float]:
    """As published (a logit above 0.5); of a probability above 0.5; and the latter on fresh samples."""
    found = []
    for part, least in ((data.test, 0.5), (data.test, 0.0), (data.fresh, 0.0)):
        with torch.no_grad():
            logits = model(part.copy())["logits"].squeeze(-1)
        found.append(100 * ((logits > least) == (part["task"] > 0.5)).double().mean().item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--models", nargs="+", default=list(PAPER["xor"]), choices=PAPER["xor"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[list[float]]]] = {}
    print("| task | model | paper | as published | difference | p > 0.5 | fresh, p > 0.5 | seconds |")
    print("|---" * 8 + "|")
    for name, row in PAPER.items():
        data = published(name)
        for kind, paper in row.items():
            if kind not in options.models:
                continue
            start = time.perf_counter()
            found = [accuracies(trained(kind, data, seed, options.epochs), data) for seed in range(options.seeds)]
            results.setdefault(name, {})[kind] = found
            columns = list(zip(*found, strict=True))
            spreads = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
            first, *others = [f"{statistics.mean(c):.1f} ± {s:.1f}" for c, s in zip(columns, spreads, strict=True)]
            seconds = time.perf_counter() - start
            line = [name, kind, f"{paper:.1f}", first, f"{statistics.mean(columns[0]) - paper:+.1f}", *others]
            print("| " + " | ".join([*line, f"{seconds:.0f}"]) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
