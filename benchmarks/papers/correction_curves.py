"""Intervention curves of a concept bottleneck and of a concept embedding model, as in both papers, on small data.

    python -m benchmarks.papers.correction_curves [--seeds 5] [--epochs 150] [--json FILE]

Figure 4 of Concept Bottleneck Models (Koh et al. 2020) and figure 6 of Concept Embedding Models (Espinosa Zarlenga et
al. 2022) need data sets that have to be downloaded. Here scikit-learn's 1797 digits are read by the seven segments that
a calculator would light; 15 images of each digit are trained on, and k = 0 to 7 segments of each of the others are then
corrected, those that a policy puts first. The bottleneck learns with and without true concepts in the head's input
(RandInt, p = 0.25), the embedding model with them. Printed: the mean accuracy over the splits for each k, in percent,
and its area.
"""

import argparse
import json
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts import GradientPolicy, RandomPolicy, Target, UncertaintyPolicy
from tdconcepts.concepts import (
    SEGMENTS,
    ConceptBottleneck,
    ConceptEmbedding,
    ConceptLoss,
    ConceptSpec,
    TotalLoss,
    digits_data,
    teach,
)
from tdconcepts.metrics import correction_curve, curve_area

DIGIT = ConceptSpec(["digit"], [10])
MODELS = {"CBM": "joint", "CBM, RandInt": "randint", "CEM": "randint"}
WIDTH, EMBEDDING, EACH = 64, 16, 15


def split(data: TensorDictBase, seed: int) -> tuple[TensorDictBase, TensorDictBase]:
    """15 images of each digit, and the others."""
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for digit in range(10):
        chosen[(data["digit"] == digit).nonzero().flatten()[:EACH]] = True
    return data[chosen], data[~chosen]


def trained(kind: str, data: TensorDictBase, seed: int, epochs: int) -> TensorDictSequential:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
    if kind == "CEM":
        model = ConceptEmbedding(body, 10, SEGMENTS, WIDTH, EMBEDDING, in_keys="pixels")
    else:
        encoder = nn.Sequential(body, nn.Linear(WIDTH, SEGMENTS.size))
        model = ConceptBottleneck(encoder, nn.Linear(SEGMENTS.size, 10), SEGMENTS, in_keys="pixels")
    generator = torch.Generator().manual_seed(seed)
    training = TensorDictSequential(
        teach(model, "segments", MODELS[kind], generator=generator),
        ConceptLoss(SEGMENTS, {"concepts_logits": "segments"}, reduction="sum"),
        ConceptLoss(DIGIT, {"logits": "digit"}, "task"),
        TotalLoss({"concepts": 1.0, "task": 1.0}),
    )
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(50):
            optimizer.zero_grad()
            training(data[rows])["loss", "total"].mean().backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[torch.Tensor]] = {}
    for seed in range(options.seeds):
        train, test = split(digits_data(), seed)
        for kind in MODELS:
            model = trained(kind, train, seed, options.epochs)
            policies = {
                "random": RandomPolicy(generator=torch.Generator().manual_seed(seed)),
                "uncertainty": UncertaintyPolicy(),
                "gradient": GradientPolicy(Target("logits", "argmax")),
            }
            for name, policy in policies.items():
                curve = correction_curve(model, test, policy, labels="segments", task="digit")
                curves.setdefault(f"{kind} | {name}", []).append(100 * curve)
    print("| model | policy | " + " | ".join(map(str, range(8))) + " | area |")
    print("|---" * 11 + "|")
    means = {name: torch.stack(found).mean(0) for name, found in curves.items()}
    for name, mean in means.items():
        print(f"| {name} | " + " | ".join(f"{x:.1f}" for x in mean.tolist()) + f" | {curve_area(mean).item():.1f} |")
    falls = {name: min(0.0, mean.diff().min().item()) for name, mean in means.items()}
    print(f"\nlargest fall of a mean curve from k to k + 1: {min(falls.values()):.2f} points")
    for kind in MODELS:
        gain = means[f"{kind} | gradient"] - means[f"{kind} | random"]
        print(f"{kind}: gradient above random by {[round(x, 1) for x in gain.tolist()]}")
    if options.json:
        found = {name: torch.stack(curve).tolist() for name, curve in curves.items()}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
