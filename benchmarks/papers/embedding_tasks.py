"""Table 1 of Concept Embedding Models (Espinosa Zarlenga et al., NeurIPS 2022) on its three synthetic tasks.

    python -m benchmarks.papers.embedding_tasks [--seeds 3] [--epochs 500] [--models CEM ...] [--json FILE]

The settings are the paper's: 3000 samples, an MLP of 128-128, embeddings of 128, RandInt with 0.25, 500 epochs, batches
of 256, Adam with a step size of 1e-2, weight 1 for the concepts, and a linear head. 70% of the samples are trained on,
20% are tested on, and the 10% that the paper keeps for validation are not used. What is printed is the accuracy on the
test samples in percent, the mean over the seeds and the standard deviation.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tensordict import TensorDictBase
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

WIDTH, BATCH, STEP, WEIGHT = 128, 256, 1e-2, 1.0
PAPER = {
    "xor": {"CEM": 99.17, "Bool CBM": 51.33, "Fuzzy CBM": 51.42, "no concepts": 99.33},
    "trigonometry": {"CEM": 98.43, "Bool CBM": 77.77, "Fuzzy CBM": 98.37, "no concepts": 98.47},
    "dot": {"CEM": 97.13, "Bool CBM": 48.00, "Fuzzy CBM": 48.17, "no concepts": 97.57},
}
TASK = ConceptSpec(["task"])


def body(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU())


def model_of(kind: str, features: int, spec: ConceptSpec) -> TensorDictSequential:
    if kind == "CEM":
        return ConceptEmbedding(body(features), 1, spec, in_features=WIDTH, embedding_size=WIDTH)
    if kind == "no concepts":
        return TensorDictSequential(
            TensorDictModule(body(features), ["observation"], ["latent"]),
            TensorDictModule(nn.Linear(WIDTH, 1), ["latent"], ["logits"]),
        )
    encoder = nn.Sequential(body(features), nn.Linear(WIDTH, spec.size))
    if kind == "Fuzzy CBM":
        return ConceptBottleneck(encoder, nn.Linear(spec.size, 1), spec)
    hard = TensorDictSequential(
        TensorDictModule(encoder, ["observation"], ["concepts_logits"]), ConceptActivation(spec, hard=True)
    )
    return ConceptBottleneck(hard, nn.Linear(spec.size, 1), spec)


def trained(kind: str, name: str, seed: int, epochs: int) -> tuple[TensorDictSequential, TensorDictBase]:
    """The model and its test samples."""
    generator = torch.Generator().manual_seed(seed)
    data = toy_data(name, 3000, generator)
    train, test = data.td[:2100], data.td[2400:]
    torch.manual_seed(seed)
    model = model_of(kind, train["observation"].shape[-1], data.concepts)
    losses = [ConceptLoss(TASK, {"logits": "task"}, "task")]
    weights = {"task": 1.0}
    pipeline = model
    if kind != "no concepts":
        pipeline = teach(model, how="randint" if kind == "CEM" else "joint", generator=generator)
        losses.append(ConceptLoss(data.concepts))
        weights["concepts"] = WEIGHT
    training = TensorDictSequential(pipeline, *losses, TotalLoss(weights))
    optimizer = torch.optim.Adam(training.parameters(), lr=STEP, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).split(BATCH):
            loss = training(train[rows])["loss", "total"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), test


def accuracy(model: TensorDictSequential, test: TensorDictBase) -> float:
    with torch.no_grad():
        logits = model(test.copy())["logits"].squeeze(-1)
    return 100 * ((logits > 0) == (test["task"] > 0.5)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--models", nargs="+", default=list(PAPER["xor"]), choices=PAPER["xor"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[float]]] = {}
    print("| task | model | paper | here | difference | seconds |\n|---|---|---|---|---|---|")
    for name, row in PAPER.items():
        for kind, paper in row.items():
            if kind not in options.models:
                continue
            start = time.perf_counter()
            found = [accuracy(*trained(kind, name, seed, options.epochs)) for seed in range(options.seeds)]
            results.setdefault(name, {})[kind] = found
            mean, spread = statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0
            seconds = time.perf_counter() - start
            line = f"{paper:.1f} | {mean:.1f} ± {spread:.1f} | {mean - paper:+.1f} | {seconds:.0f}"
            print(f"| {name} | {kind} | {line} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
