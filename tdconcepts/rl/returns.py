"""The closed-loop test: what a change of the policy does to the return, over paired episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import MatchedNorm, patch
from tdconcepts.rl.episodes import Policy, Visited, interaction, run_episodes

__all__ = ["Returns", "compare_returns", "student_t"]

BASELINE = "unpatched"


@dataclass(frozen=True)
class Returns:
    """What :func:`compare_returns` measured: one episode for each variant and seed; the first variant is the baseline.

    Args:
        names: of the V variants.
        episodes: a TensorDict of batch ``[V, S]`` (S seeds) with ``"return"`` (float64, undiscounted), ``"length"``
            (steps), ``"finished"`` (False where the step limit cut the episode) and, where it was asked for, what the
            variant would have done on the baseline's own steps (open loop): ``"flips"``, the share of them at which it
            would have acted differently, and ``"total_variation"``, half the sum over the actions of the absolute
            differences of their probabilities, averaged over the steps (for policies that draw from finitely many
            actions).
        confidence: of the intervals.
        controls: variant -> the names of its matched-norm controls.

    Examples:
        >>> from tensordict import TensorDict
        >>> returns = torch.tensor([[10.0, 12.0, 8.0], [9.0, 12.0, 6.0]], dtype=torch.float64)
        >>> result = Returns(("unpatched", "half"), TensorDict({"return": returns}, batch_size=[2, 3]))
        >>> mean, low, high = result.difference("half")
        >>> f"{mean:.2f} [{low:.2f}, {high:.2f}]"
        '-1.00 [-3.48, 1.48]'
    """

    names: tuple[str, ...]
    episodes: TensorDictBase
    confidence: float = 0.95
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, name: str) -> TensorDictBase:
        """The episodes of one variant, batch ``[S]``."""
        if name not in self.names:
            raise BadValue(f"no variant {name!r}", got=name, needed=f"one of {', '.join(map(repr, self.names))}")
        return self.episodes[self.names.index(name)]

    def mean(self, name: str) -> tuple[float, float, float]:
        """Mean return over the seeds and its confidence interval ``(mean, low, high)``."""
        return _interval(self.of(name).get("return"), self.confidence)

    def difference(self, name: str) -> tuple[float, float, float]:
        """Mean over the seeds of ``return[name] - return[baseline]``, and its confidence interval.

        Paired by seed; the interval is Student's t, ``mean +- t * sd / sqrt(S)`` with S - 1 degrees of freedom. One
        seed gives NaN ends.
        """
        return _interval(self.of(name).get("return") - self.episodes[0].get("return"), self.confidence)

    def against_controls(self, name: str) -> tuple[float, float, float]:
        """Mean over the seeds of ``return[name] -`` the mean of its controls' returns, and its confidence interval.

        What is left of the effect when a change of the same size in another direction is taken off.

        Raises:
            BadValue: the variant has no controls.
        """
        others = self.controls.get(name, ())
        if not others:
            raise BadValue(f"the variant {name!r} has no controls", fix="compare_returns(..., controls=5)")
        mean = torch.stack([self.of(other).get("return") for other in others]).mean(0)
        return _interval(self.of(name).get("return") - mean, self.confidence)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of the table, as text."""
        shares = {"open-loop flips": "flips", "total variation": "total_variation"}
        measured = list(self.episodes.keys())
        open_loop = {title: self.episodes.get(key) for title, key in shares.items() if key in measured}
        finished = self.episodes.get("finished", None)
        cut = None if finished is None or bool(finished.all()) else ~finished
        headers = ["variant", "mean return", "difference", f"{100 * self.confidence:g}% interval"]
        headers += [*open_loop, *["cut episodes"] * (cut is not None)]
        rows = []
        for number, name in enumerate(self.names):
            mean, low, high = self.difference(name)
            row = [name, f"{self.mean(name)[0]:.1f}"]
            row += [f"{mean:+.1f}", f"[{low:+.1f}, {high:+.1f}]"] if number else ["", ""]
            row += [f"{100 * float(share[number].mean()):.1f}%" if number else "" for share in open_loop.values()]
            if cut is not None:
                row.append(str(int(cut[number].sum())))
            rows.append(row)
        return headers, rows

    def table(self) -> str:
        """The table as aligned text."""
        headers, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        lines = []
        for first, *others in [headers, *rows]:
            cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)


def compare_returns(
    env: Any,
    policy: TensorDictModuleBase,
    variants: Mapping[str, Any],
    seeds: Sequence[int] = range(64),
    *,
    max_steps: int = 1000,
    greedy: bool = True,
    flip_rate: bool = False,
    controls: int = 0,
    confidence: float = 0.95,
    progress: Callable[[str, float, str], None] | None = None,
) -> Returns:
    r"""Returns of a policy and of each variant of it from the same start states, with paired confidence intervals.

    :math:`\Delta J = \frac{1}{S} \sum_s \left( G_\mathrm{variant}(s) - G_\mathrm{policy}(s) \right)`, with G the
    undiscounted return of the first episode of seed s.

    A variant is one of

    * a policy: any TensorDictModule (or callable on TensorDicts) that writes the action;
    * a context manager that gives one: ``patch(policy, {"concept": Ablate([3])})``;
    * a program: ``Patch({...})``, bound to ``policy`` here;
    * a mapping ``{key or Site: edit}``, bound to ``policy`` here.

    Args:
        env: a torchrl environment; how it is seeded: :func:`~tdconcepts.rl.episode_returns`.
        policy: the baseline, named "unpatched" in the result.
        variants: name -> variant.
        seeds: the paired seeds; default 0 to 63.
        max_steps: an episode is cut after so many steps, 1000 by default (the result tells which were).
        greedy: act deterministically (the default). ``False`` samples, with the same torch seed for each variant.
        flip_rate: also replay each variant on the states that the baseline visited, and record how often it would
            have acted differently, and how far its action probabilities are from the baseline's (total variation).
        controls: for each variant that is a mapping, so many variants more whose edits move every row as far, in
            another direction (:class:`~tdconcepts.hooks.MatchedNorm`); 0 by default.
        confidence: of the intervals; 0.95 by default.
        progress: called as ``progress(stage, done in [0, 1], note)``.

    Raises:
        BadValue: no seeds, a variant named as the baseline, an environment that doesn't repeat its start states for a
            seed, a reward that is not one number for each environment.
        BadType: a variant of another kind; ``flip_rate`` with a policy that has no ``in_keys``; ``controls`` of a
            variant that is no mapping.

    Source: saliency turned into a closed-loop counterfactual after Atrey et al. 2020, "Exploratory not explanatory".

    Examples:
        >>> from tdconcepts import Ablate, rl
        >>> env, policy = rl.cartpole_env(4), rl.cartpole_policy(8)
        >>> result = compare_returns(env, policy, {"without 3": {"concept": Ablate([3])}}, range(4))
        >>> result.names, result.episodes.batch_size
        (('unpatched', 'without 3'), torch.Size([2, 4]))
    """
    if not isinstance(variants, Mapping):
        raise BadType("not variants by name", got=type(variants).__name__, needed="a mapping name -> variant")
    if BASELINE in variants:
        raise BadValue(f"a variant is named {BASELINE!r}", needed="another name: this one is the baseline's")
    if type(confidence) is not float or not 0.0 < confidence < 1.0:
        raise BadValue("confidence is out of range", got=confidence, needed="a number in (0, 1)", fix="confidence=0.95")
    named, controlled = _with_controls({BASELINE: policy, **variants}, controls)
    written = _written(policy) if flip_rate else None
    results: list[TensorDictBase] = []
    reference, probabilities = Visited(), None
    for number, (name, variant) in enumerate(named.items()):
        if progress is not None:
            progress("closed-loop test", number / len(named), name)
        with _bound(name, variant, policy) as acting:
            without = None if results else written
            episodes, seen = run_episodes(env, acting, seeds, max_steps=max_steps, greedy=greedy, without=without)
            if not results:
                reference = seen
            elif not _same_starts(seen, reference):
                raise BadValue(
                    "the environment does not start from the same states when it is seeded again",
                    got=f"other start states for the variant {name!r}",
                    needed="an environment whose reset is a function of the seed",
                    fix="seed every source of randomness in its _set_seed",
                )
            if flip_rate:
                replayed = _replayed(acting, reference, env.action_key, greedy)
                probabilities = probabilities if results else replayed.probabilities
                episodes.set("flips", replayed.flips[: len(seeds)])
                if probabilities is not None and replayed.probabilities is not None:
                    moved = _total_variation(probabilities, replayed.probabilities, reference)
                    episodes.set("total_variation", moved[: len(seeds)])
        results.append(episodes)
    if progress is not None:
        progress("closed-loop test", 1.0, "")
    return Returns(tuple(named), torch.stack(results), confidence, controlled)


def student_t(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: ``P(|T| <= t) = confidence``; NaN below one degree of freedom.

    With ``T = sqrt(v) tan(a)`` the density of the angle a is proportional to ``cos(a)^(v - 1)``, smooth on a finite
    interval: it is integrated by the trapezoid rule on 200 001 points and inverted. (SciPy is no run-time dependency.)

    Examples:
        >>> round(student_t(0.95, 63), 4), round(student_t(0.95, 1), 3)
        (1.9983, 12.706)
    """
    if degrees < 1:
        return math.nan
    angle = torch.linspace(0.0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos().clamp(min=0.0) ** (degrees - 1), angle)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])
    right = int(torch.searchsorted(mass, confidence).clamp(1, len(mass) - 1))
    part = (confidence - mass[right - 1]) / (mass[right] - mass[right - 1])
    return float(math.sqrt(degrees) * torch.tan(angle[right - 1] + part * (angle[right] - angle[right - 1])))


@contextmanager
def _bound(name: str, variant: Any, policy: TensorDictModuleBase) -> Iterator[Policy]:
    """The policy that a variant stands for, for the time of its episodes."""
    if isinstance(variant, Mapping):
        variant = patch(policy, variant)
    elif hasattr(variant, "bind") and hasattr(variant, "on"):
        variant = variant.on(policy)
    if isinstance(variant, AbstractContextManager):
        with variant as acting:
            yield acting
    elif callable(variant):
        yield variant
    else:
        raise BadType(
            f"the variant {name!r} is no policy",
            got=type(variant).__name__,
            needed="a policy, a context manager that gives one, a program, or a mapping {key or Site: edit}",
            fix="{'no concept 3': {'concept': Ablate([3])}}",
        )


def _written(policy: Any) -> list[Any]:
    """What the policy itself brings to a state: the rest is the environment's, and may be read by a variant."""
    keys = getattr(policy, "in_keys", None)
    if not keys:
        kind = type(policy).__name__
        raise BadType("flip_rate needs to know what the policy reads", got=kind, needed="a policy with in_keys")
    return [key for key in policy.out_keys if key not in keys]


class _Replayed(NamedTuple):
    """What a variant does on states that were visited: by episode, and its action probabilities by state."""

    flips: Tensor
    probabilities: list[Tensor] | None


def _replayed(acting: Policy, visited: Visited, action_key: Any, greedy: bool) -> _Replayed:
    shares, found = [], []
    for states, alive, logged in zip(visited.states, visited.alive, visited.actions, strict=True):
        with torch.no_grad(), interaction(greedy), torch.random.fork_rng(devices=[]):
            out = acting(states.reshape(-1).copy())
        action = out.get(action_key).reshape(logged.shape)
        same = torch.isclose(action, logged) if logged.is_floating_point() else action == logged
        other = (~same).reshape(*alive.shape, -1).any(-1).cpu()
        shares.append((other & alive).sum(0) / alive.sum(0))
        found.append(_probabilities(acting, out))
    kept = [one.cpu() for one in found if one is not None]
    return _Replayed(torch.cat(shares), kept if len(kept) == len(found) else None)


def _probabilities(acting: Policy, out: TensorDictBase) -> Tensor | None:
    """Of all actions, ``[n, A]``, where the policy draws one of them by a distribution that has them."""
    inside = acting.modules() if isinstance(acting, torch.nn.Module) else ()
    drawing = [module for module in inside if isinstance(module, ProbabilisticTensorDictModule)]
    probabilities = getattr(drawing[-1].get_dist(out), "probs", None) if drawing else None
    return probabilities if isinstance(probabilities, Tensor) and probabilities.ndim == out.ndim + 1 else None


def _total_variation(base: list[Tensor], other: list[Tensor], visited: Visited) -> Tensor:
    """Half the sum of absolute differences, averaged over each episode's steps."""
    means = []
    for one, two, alive in zip(base, other, visited.alive, strict=True):
        far = 0.5 * (one - two).abs().sum(-1).reshape(alive.shape)
        means.append((far * alive).sum(0) / alive.sum(0))
    return torch.cat(means)


def _with_controls(named: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """The variants, each followed by its controls, and which are whose."""
    if type(count) is not int or count < 0:
        raise BadValue("not a number of controls", got=repr(count), needed="an int, 0 or more")
    found: dict[str, Any] = {}
    whose: dict[str, tuple[str, ...]] = {}
    for name, variant in named.items():
        found[name] = variant
        if not count or name == BASELINE:
            continue
        if not isinstance(variant, Mapping):
            raise BadType(
                f"no controls of the variant {name!r}",
                got=type(variant).__name__,
                needed="a mapping {key or Site: edit}",
                fix="variants of another kind in a call of their own, with controls=0",
            )
        whose[name] = tuple(f"{name}: control {seed}" for seed in range(count))
        for seed, other in enumerate(whose[name]):
            found[other] = {where: MatchedNorm(edit, seed) for where, edit in variant.items()}
    return found, whose


def _same_starts(left: Visited, right: Visited) -> bool:
    return all(bool((a == b).all()) for a, b in zip(left.starts, right.starts, strict=True))


def _interval(values: Tensor, confidence: float) -> tuple[float, float, float]:
    mean = float(values.double().mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = student_t(confidence, len(values) - 1) * float(values.double().std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half
