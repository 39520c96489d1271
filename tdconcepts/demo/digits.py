"""The concept part of the demo: read digits by their seven segments, then correct the segments that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdconcepts.concepts import SEGMENTS, ConceptBottleneck, SelectorZU, digits_data
from tdconcepts.hooks import Target
from tdconcepts.interventions import GradientPolicy, GroundTruth, RandomPolicy, UncertaintyPolicy, intervene
from tdconcepts.report import Section, intervention_curve

__all__ = ["accuracy_by_corrections", "digits_bottleneck", "digits_data", "digits_section", "train_bottleneck"]

Progress: TypeAlias = Callable[[str, float, str], None]

PER_DIGIT = 15  # training images of each digit; all others are test images
STEPS = 400
PLAIN, MEMORY = "concept bottleneck", "with memory (SelectorZU)"
TRAINING, CORRECTING = "concepts: training", "concepts: correcting"


def digits_section(seed: int = 0, quick: bool = False, progress: Progress | None = None) -> Section:
    """Train concept bottlenecks on 150 digits and correct 0 to 7 of their concepts on the others, by three policies.

    Args:
        seed: of the first split; the others follow.
        quick: 2 splits of the images instead of 5.
        progress: called with (stage, fraction done, note).

    Raises:
        MissingExtra: without scikit-learn, whose bundled digits are used, or matplotlib.
    """
    say = progress or (lambda stage, fraction, note: None)
    data = digits_data()
    seeds = range(seed, seed + (2 if quick else 5))
    models: list[tuple[TensorDictBase, dict[str, ConceptBottleneck]]] = []
    for i, split in enumerate(seeds):
        train, test = _split(data, split)
        models.append((test, {}))
        for j, name in enumerate((PLAIN, MEMORY), 1):
            models[-1][1][name] = _trained(name, train, split)
            say(TRAINING, (i + j / 2) / len(seeds), f"split {i + 1} of {len(seeds)}")
    curves: dict[str, list[Tensor]] = {}
    concept_hits: dict[str, list[Tensor]] = {PLAIN: [], MEMORY: []}
    for i, (split, (test, trained)) in enumerate(zip(seeds, models, strict=True)):
        for name, (kind, policy) in _contestants(split).items():
            curves.setdefault(name, []).append(accuracy_by_corrections(trained[kind], test, policy))
        for kind, model in trained.items():
            concept_hits[kind].append(_concept_accuracy(model, test))
        say(CORRECTING, (i + 1) / len(seeds), f"split {i + 1} of {len(seeds)}")
    return _written({name: torch.stack(c) for name, c in curves.items()}, concept_hits, len(data) - 10 * PER_DIGIT)


def digits_bottleneck(memory: bool = False) -> ConceptBottleneck:
    """Pixels -> seven segments -> digit; with ``memory`` each segment's embedding is read from 10 learned slots.

    Examples:
        >>> digits_bottleneck(memory=True).in_keys, digits_bottleneck().out_keys
        (['pixels'], ['concepts_logits', 'concepts', 'logits'])
    """
    head = nn.Linear(SEGMENTS.size, 10)
    if not memory:
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, SEGMENTS.size))
        return ConceptBottleneck(encoder, head, SEGMENTS, in_keys="pixels")
    selected = TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), ["pixels"], ["latent"]),
        SelectorZU(in_features=64, memory_size=10, exogenous_size=32, out_features=SEGMENTS.size),
        TensorDictModule(nn.Sequential(nn.Linear(32, 1), nn.Flatten(-2)), ["exogenous"], ["concepts_logits"]),
    )
    return ConceptBottleneck(selected, head, SEGMENTS)


def train_bottleneck(model: ConceptBottleneck, data: TensorDictBase, seed: int = 0, steps: int = STEPS) -> float:
    """Train concepts and task jointly on all of ``data`` at once, and return the last loss.

    Σ over segments of the binary cross-entropy + the cross-entropy of the digit, by Adam with a step size of 1e-2. For
    the second term half of the segments are the true ones, drawn anew in each step (RandInt, Espinosa Zarlenga et al.
    2022), so that the head learns to read corrected concepts too.
    """
    policy = RandomPolicy(generator=torch.Generator().manual_seed(seed))
    training = intervene(model, at="concepts", policy=policy, strategy=GroundTruth("segments"), fraction=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    truth = data["segments"].float()
    loss = torch.zeros(())
    for _ in range(steps):
        out = training(data.copy())
        concepts = F.binary_cross_entropy_with_logits(out["concepts_logits"], truth) * SEGMENTS.size
        loss = concepts + F.cross_entropy(out["logits"], data["digit"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def accuracy_by_corrections(model: ConceptBottleneck, data: TensorDictBase, policy: TensorDictModuleBase) -> Tensor:
    """The share of digits that are right as 0, 1, ... 7 concepts of each image are corrected, ``[8]``."""
    hits = []
    for k in range(SEGMENTS.size + 1):
        corrected = intervene(model, at="concepts", policy=policy, strategy=GroundTruth("segments"), k=k)
        with torch.no_grad():
            out = corrected(data.copy())
        hits.append((out["logits"].argmax(-1) == data["digit"]).double().mean())
    return torch.stack(hits)


def _split(data: TensorDict, seed: int) -> tuple[TensorDictBase, TensorDictBase]:
    """15 images of each digit to train on, and the others."""
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    digit = data["digit"][shuffled]
    train = torch.cat([(digit == d).nonzero().flatten()[:PER_DIGIT] for d in range(10)])
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[train] = False
    return data[shuffled[train]], data[shuffled[rest]]


def _trained(name: str, data: TensorDictBase, seed: int) -> ConceptBottleneck:
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn from the global generator
        torch.manual_seed(seed)
        model = digits_bottleneck(memory=name == MEMORY)
    train_bottleneck(model, data, seed)
    return model


def _contestants(seed: int) -> Mapping[str, tuple[str, TensorDictModuleBase]]:
    """Name of a curve -> the model and the policy."""
    return {
        "random": (PLAIN, RandomPolicy(generator=torch.Generator().manual_seed(seed))),
        "uncertainty": (PLAIN, UncertaintyPolicy()),
        "gradient": (PLAIN, GradientPolicy(Target("logits", "argmax"))),
        "uncertainty, memory": (MEMORY, UncertaintyPolicy()),
    }


def _concept_accuracy(model: ConceptBottleneck, data: TensorDictBase) -> Tensor:
    with torch.no_grad():
        concepts = model(data.copy())["concepts"]
    return ((concepts > 0.5) == data["segments"].bool()).double().mean(0)


def _written(curves: dict[str, Tensor], concept_hits: Mapping[str, Sequence[Tensor]], tested: int) -> Section:
    """The section; every sentence is computed from the numbers. Curves are ``[splits, 8]``."""
    mean = {name: curve.mean(0) for name, curve in curves.items()}
    by_concept = {kind: torch.stack(list(hits)).mean(0) for kind, hits in concept_hits.items()}
    counts = list(range(SEGMENTS.size + 1))
    splits = len(curves["random"])
    order = sorted(("random", "uncertainty", "gradient"), key=lambda name: -mean[name][2].item())
    above = [name for name in ("uncertainty", "gradient") if bool((mean[name][1:-1] > mean["random"][1:-1]).all())]
    reached = _listed([f"{name} reaches {_percent(mean[name][2])}" for name in order])
    all_corrected = min(mean[name][-1] for name in order)
    opening = (
        f"A digit on a calculator is seven segments. A concept bottleneck learns from {10 * PER_DIGIT} handwritten "
        "digits (scikit-learn's 8×8 images) which segments each would light up, and names the digit from these seven "
        "numbers alone; in training half of them are the true ones, so that the head learns to read corrected "
        f"concepts. On {tested} other digits it gets {_percent(by_concept[PLAIN].mean())} of the segments right and "
        f"{_percent(mean['random'][0])} of the digits."
    )
    comparison = (
        "Then some of the segments are replaced by the true ones, image by image, and the head reads again. Which "
        "ones, is what a policy decides: any (random), those nearest to undecided (uncertainty), or those that the "
        f"winning digit's score depends on most (gradient). With two of seven corrected, {reached}."
    )
    if above:
        comparison += f" At every number from 1 to 6, {_listed(above)} did better than random."
    effort = (
        f"To read 95% of the digits, {_listed([_enough(name, mean[name]) for name in order])}. With all seven "
        f"corrected, {_percent(all_corrected)} are right"
        + (": what is wrong is in the concepts, not in the head." if all_corrected > 0.99 else ".")
    )
    variant = (
        "The variant with memory reads each segment's embedding from ten learned slots (SelectorZU): "
        f"{_percent(mean['uncertainty, memory'][0])} of the digits uncorrected, "
        f"{_percent(mean['uncertainty, memory'][2])} with two segments corrected by uncertainty."
    )
    drawn = {name: (counts, mean[name], curve.amin(0), curve.amax(0)) for name, curve in curves.items()}
    figure = intervention_curve(drawn, xlabel="segments corrected (of 7)", ylabel="digits right, test split")
    caption = f"Mean over {splits} splits, each with its own training; bands go from the worst split to the best."
    rows = [[name, *(f"{value:.3f}" for value in mean[name].tolist())] for name in curves]
    segment_rows = [[kind, *(f"{value:.3f}" for value in hits.tolist())] for kind, hits in by_concept.items()]
    return Section(
        title="Concepts: correct the segments that matter",
        paragraphs=[opening, comparison, effort, variant],
        figures=[(figure, caption)],
        tables=[
            (
                ["policy", *map(str, counts)],
                rows,
                "Share of test digits that are right, by the number of corrected segments",
            ),
            (
                ["model", *SEGMENTS.names],
                segment_rows,
                "Share of test digits whose segment is right, before any correction",
            ),
        ],
        summary=[
            ("digits right, no concept corrected", _percent(mean["random"][0])),
            *((f"digits right, 2 of 7 corrected: {name}", _percent(mean[name][2])) for name in order),
        ],
    )


def _percent(value: Tensor) -> str:
    return f"{100 * value.item():.1f}%"


def _enough(name: str, curve: Tensor) -> str:
    count = next((k for k, value in enumerate(curve.tolist()) if value >= 0.95), None)
    return f"{name} never corrects enough" if count is None else f"{name} has to correct {count}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
