"""What the agent's numbers say: sentences, tables and figures, each computed from the measurements alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.interventions import RemoveDirection
from tdconcepts.report import Section, interval_plot, over_time
from tdconcepts.representations import RidgeProbe
from tdconcepts.rl import Returns, TrainedAgent
from tdconcepts.rl.rollouts import EXPLANATION, MASK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Direction", "Measured", "beyond", "tell_story"]

FEATURES = ("cart position, m", "cart velocity, m/s", "pole angle, rad", "pole velocity, rad/s")
NAMES = tuple(feature.partition(",")[0] for feature in FEATURES)
SHOWN_STEPS = 200
METHODS = {
    "gradient": "gradient",
    "input_x_gradient": "input × gradient",
    "integrated_gradients": "integrated gradients",
    "smoothgrad": "SmoothGrad",
    "vargrad": "√VarGrad",
}
PROBE, LOGITS, RANDOM = "pole-angle probe", "logit difference", "random direction"

Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Direction:
    """A direction of ``concept`` and the edit that removes it.

    ``cosine``: its absolute cosine with the logit-difference direction; ``variance``: the share of the stage's variance
    that lies along it.
    """

    edit: RemoveDirection
    cosine: float
    variance: float


@dataclass(frozen=True)
class Measured:
    """All numbers of the agent part.

    ``seconds``: of training and of explaining; ``explained``: the rollout with its attributions and mask; ``probes``:
    by horizon; ``left``: the R^2 of a new probe after the first one's direction was removed.
    """

    agent: TrainedAgent
    seconds: tuple[float, float]
    explained: TensorDictBase
    probes: Mapping[int, RidgeProbe]
    left: float
    directions: Mapping[str, Direction]
    returns: Returns


def tell_story(measured: Measured) -> Section:
    """The section: text, figures, tables and summary rows."""
    returns, explained = measured.returns, measured.explained
    changes = [f"{_signed(returns.difference(name))}" for name in (PROBE, LOGITS)]
    chance = [returns.difference(name)[0] for name in _controls(returns)]
    return Section(
        "What drives a CartPole agent, and what it needs",
        [_trained(measured), *_attributed(measured), _probed(measured), *_tested(measured)],
        figures=[
            _contributions(explained),
            _sensitivities(explained),
            _dots(returns),
        ],
        tables=[_sizes(explained), _scores(measured), _effects(measured)],
        summary=[
            ("agent: mean return, unpatched", f"{returns.mean(returns.names[0])[0]:.1f}"),
            ("agent: R² of the pole angle from concept, held-out episodes", f"{measured.probes[0].r2:.3f}"),
            ("agent: return without the pole-angle probe's direction", changes[0]),
            ("agent: return without the logit-difference direction", changes[1]),
            (f"agent: return without {len(chance)} random directions", f"{min(chance):+.1f} to {max(chance):+.1f}"),
        ],
    )


def beyond(effect: Interval, widest: float) -> bool:
    """Whether an effect's whole interval lies outside what the controls did: ``low > widest`` or ``high < -widest``.

    Examples:
        >>> beyond((-490.0, -491.0, -489.0), 3.0), beyond((-4.0, -7.0, -1.0), 3.0), beyond((0.0, 0.0, 0.0), 0.0)
        (True, False, False)
    """
    _, low, high = effect
    return low > widest or high < -widest


# ------------------------------------------------------------------------------------------------------------- text


def _trained(measured: Measured) -> str:
    agent, frames = measured.agent, measured.agent.history[-1]["frames"]
    goal = "reaches" if agent.mean_return >= 475 else "misses"
    return (
        f"A PPO policy was trained on CartPole-v1 with seed {agent.seed} for {frames:,.0f} environment steps in "
        f"{measured.seconds[0]:.0f} s. Its stages are entries with names: observation → hidden → concept → logits → "
        f"action. The checkpoint that was kept returns {agent.mean_return:.0f} on average over 16 greedy evaluation "
        f"episodes; 500 is the most that is possible, and this {goal} the goal of 475."
    )


def _attributed(measured: Measured) -> list[str]:
    explained, sizes = measured.explained, _mean_sizes(measured.explained)
    lengths, kind = explained[MASK].sum(-1), explained[EXPLANATION, "exploration_type"]
    shortest, longest = int(lengths.min()), int(lengths.max())
    steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    path = sizes["integrated_gradients"] / sizes["integrated_gradients"].sum()
    first, second = path.argsort(descending=True)[:2].tolist()
    largest = {METHODS[name]: NAMES[int(size.argmax())] for name, size in sizes.items() if name != "vargrad"}
    if len(set(largest.values())) == 1:
        places = f"Gradient, input × gradient and SmoothGrad put the {NAMES[first]} first as well."
    else:
        places = "The methods differ in what they put first: "
        places += ", ".join(f"{method} the {place}" for method, place in largest.items()) + "."
    played = (
        f"It then played {len(lengths)} greedy episodes of {steps} steps. The logit of each of the "
        f"{int(lengths.sum()):,} logged actions was explained with respect to the observation by {len(METHODS)} "
        f"methods, in one batched call that took {measured.seconds[1]:.1f} s, under the exploration type {kind!r}."
    )
    found = (
        f"By integrated gradients, from a baseline of zeros, the {NAMES[first]} moves the taken action's logit most, "
        f"with {_percent(path[first])} of the total size, then the {NAMES[second]} with {_percent(path[second])}. "
        f"{places} Gradient and SmoothGrad are sensitivities per unit, so they compare a metre with a radian; input "
        "× gradient and integrated gradients are contributions, in units of the logit."
    )
    return [played, found]


def _probed(measured: Measured) -> str:
    now, far = measured.probes[0], max(measured.probes)
    how = "almost exactly" if now.r2 > 0.95 else "in part" if now.r2 > 0.3 else "hardly"
    return (
        f"A linear ridge probe reads the pole angle from the concept stage {how}: R² = {now.r2:.3f} on held-out "
        f"episodes ({now.rows:,} steps, none of them explained above), and {measured.probes[far].r2:.2f} for the "
        f"angle {far} steps later. That says what can be read there, not what the agent uses. So directions are "
        "removed from the stage while the agent plays, z ← z − ((z − μ)·u) u with μ the stage's mean, in episodes "
        "that start from the same states."
    )


def _tested(measured: Measured) -> list[str]:
    returns, direction = measured.returns, measured.directions[PROBE]
    probe, logits = returns.difference(PROBE), returns.difference(LOGITS)
    chance = [returns.difference(name)[0] for name in _controls(returns)]
    widest = max(abs(change) for change in chance)
    flips = {name: float(returns.of(name)["flips"].mean()) for name in (PROBE, LOGITS)}
    numbers = (
        f"Over {returns.episodes.shape[1]} paired seeds the unpatched policy returns "
        f"{returns.mean(returns.names[0])[0]:.1f}. Removing the logit-difference direction changes that by "
        f"{_signed(logits)}, removing the probe's direction by {_signed(probe)}, and removing one of {len(chance)} "
        f"random directions by {min(chance):+.1f} to {max(chance):+.1f} (in brackets: {100 * returns.confidence:g}% "
        "intervals of the paired mean difference)."
    )
    needs, uses = beyond(logits, widest), beyond(probe, widest)
    verdict = [
        "The agent needs the logit-difference direction: the change is beyond that of every random direction."
        if needs
        else "That the agent needs the logit-difference direction does not show beyond the random controls.",
        "It uses the probe's direction too: the change is beyond that of every random direction."
        if uses
        else "Removing the probe's direction does no more than removing a random one.",
    ]
    if not uses and measured.probes[0].r2 > 0.9:
        verdict.append("So the pole angle can be read along that direction, and still no need of the direction shows.")
    verdict.append(
        "This is about one direction, not about the angle: after the removal a new probe still reads the angle with "
        f"R² = {measured.left:.2f}. The probe's direction carries {_percent(direction.variance)} of the stage's "
        f"variance and has a cosine of {direction.cosine:.2f} with the logit difference. On the states of the "
        f"unpatched policy the removal of the logit difference flips {_percent(flips[LOGITS])} of the actions, that "
        f"of the probe's direction {_percent(flips[PROBE])}; only the closed loop tells what a flip costs."
    )
    return [numbers, " ".join(verdict)]


# ------------------------------------------------------------------------------------------------- tables and figures


def _sizes(explained: TensorDictBase) -> tuple[list[str], list[list[str]], str]:
    rows = [
        [METHODS[name], *(f"{size:.3f}" for size in sizes.tolist())] for name, sizes in _mean_sizes(explained).items()
    ]
    caption = "Mean absolute attribution of the taken action's logit, over all steps of the 8 episodes."
    return ["method", *NAMES], rows, caption


def _scores(measured: Measured) -> tuple[list[str], list[list[str]], str]:
    rows = [[str(horizon), f"{probe.r2:.3f}", f"{probe.rows:,}"] for horizon, probe in measured.probes.items()]
    return (
        ["steps ahead", "R²", "steps"],
        rows,
        "Linear probe of the pole angle from concept, scored on held-out episodes.",
    )


def _effects(measured: Measured) -> tuple[list[str], list[list[str]], str]:
    headers, rows = measured.returns.rows()
    headers = ["removed", "return", *headers[2:4], "flips", *headers[5:], "cosine", "variance"]
    table = [[*rows[0], "", ""]]
    for row in rows[1:]:
        direction = measured.directions[row[0]]
        table.append([*row, f"{direction.cosine:.2f}", _percent(direction.variance)])
    caption = (
        f"Closed loop: mean return over {measured.returns.episodes.shape[1]} paired seeds when a direction is "
        "removed from the concept stage. Flips: the share of the unpatched policy's steps at which the patched one "
        "would act otherwise (open loop). Cosine: with the logit difference. Variance: the share of the stage's "
        "variance along the direction."
    )
    return headers, table, caption


def _contributions(explained: TensorDictBase) -> tuple[Figure, str]:
    columns: dict[str, tuple[str, ...]] = {"state": ("observation",)}
    columns |= {METHODS[name]: _key(name) for name in ("input_x_gradient", "integrated_gradients")}
    return _series(explained, columns, "the state, and what it adds to the logit of the action that was taken")


def _sensitivities(explained: TensorDictBase) -> tuple[Figure, str]:
    columns = {METHODS[name]: _key(name) for name in ("gradient", "smoothgrad", "vargrad")}
    return _series(explained, columns, "how the taken action's logit reacts to each entry of the state, per unit")


def _series(explained: TensorDictBase, columns: Mapping[str, tuple[str, ...]], what: str) -> tuple[Figure, str]:
    steps = min(SHOWN_STEPS, int(explained[MASK][0].sum()))
    episode = explained[0, :steps]
    pushes = {"pushed left": episode["action"] == 0, "pushed right": episode["action"] == 1}
    values = {title: episode[key] for title, key in columns.items()}
    values = {title: value.sqrt() if title == METHODS["vargrad"] else value for title, value in values.items()}
    caption = f"The first {steps} steps of the first episode: {what}. One mark for each step."
    return over_time(FEATURES, values, groups=pushes), caption


def _dots(returns: Returns) -> tuple[Figure, str]:
    means = {name: returns.mean(name) for name in returns.names}
    points = {name: returns.of(name)["return"] for name in returns.names}
    labels = {name: name if number == 0 else f"without {name}" for number, name in enumerate(returns.names)}
    figure = interval_plot(
        {labels[name]: mean for name, mean in means.items()},
        {labels[name]: value for name, value in points.items()},
        xlabel="return (steps balanced)",
        reference=means[returns.names[0]][0],
    )
    caption = (
        f"Mean return with its {100 * returns.confidence:g}% interval; each grey mark is one of "
        f"{returns.episodes.shape[1]} paired episodes. Dashed: the unpatched mean."
    )
    return figure, caption


# ------------------------------------------------------------------------------------------------------------ numbers


def _mean_sizes(explained: TensorDictBase) -> dict[str, Tensor]:
    """For each method the mean size of each feature's attribution, over the steps that count."""
    mask, sizes = explained[MASK], {}
    for name in METHODS:
        value = explained[_key(name)][mask].double()
        sizes[name] = (value.sqrt() if name == "vargrad" else value.abs()).mean(0)
    return sizes


def _key(method: str) -> tuple[str, ...]:
    return ("attribution", method, "observation")


def _controls(returns: Returns) -> list[str]:
    return [name for name in returns.names if name.startswith(RANDOM)]


def _signed(effect: Interval) -> str:
    mean, low, high = effect
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _percent(share: float | Tensor) -> str:
    percent = 100 * float(share)
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.1f}%" if percent >= 0.1 else f"{percent:.1g}%"
