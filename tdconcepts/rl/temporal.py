"""What a latent says about now and about later, on episodes that were held out, and whether the agent uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import RemoveDirection, check_td, dispatch_rows
from tdconcepts.keys import NestedKey, as_key, check_writable, join, key_text
from tdconcepts.representations import LinearProbe, RidgeProbe, ridge_direction
from tdconcepts.rl.returns import Returns, compare_returns
from tdconcepts.rl.rollouts import MASK

__all__ = ["TemporalProbe", "episodes_of"]

PROBE = "probe"


class TemporalProbe(TensorDictModuleBase):
    r"""Linear probes from a latent to a label now and h steps later: :math:`\hat y_{t+h} = w_h \cdot z_t + b_h`.

    ======  =====================  ==================================================
    reads   ``key``                ``[*B, C]``
    writes  ``("probe", name)``    ``[*B, H]``: the label at each horizon, predicted
    ======  =====================  ==================================================

    :meth:`fit` takes a rollout ``[*B, T]``. Steps whose label lies beyond the end of their episode don't count, and the
    score is that of whole episodes held out, because neighbouring steps are near copies. ``scores`` then holds, a row
    for each horizon: ``"horizon"``, ``"r2"``, ``"control"`` (the same with each episode's labels taken from another
    episode: what the passing of time alone explains), ``"rows"``, and ``"by_step"`` ``[H, T']``, R^2 over the episodes
    at each step t (NaN where fewer than three count).

    What can be read need not be used: :meth:`causal_test` takes the direction away and looks at the return.

    Args:
        key: the entry of the latent.
        label: an entry ``[*B, T]`` or ``[*B, T, 1]``, or a callable of the rollout that gives it:
            ``lambda td: td["observation"][..., 2]``.
        horizons: steps ahead, 0 for now.
        name: what the label is called; default: the entry's name.
        ridge: lambda of the regression, 1e-3 by default.
        folds: groups of episodes that are held out in turn, 4 by default.

    Raises:
        BadValue: no horizons, or negative ones; at the fit: fewer than two episodes with a label at that horizon.
        BadKey: at the fit, for a missing entry. BadType: for what is no label.

    Source: McGrath et al. 2022 for probes of agents; Hewitt and Liang 2019 for control tasks.

    Examples:
        >>> z = torch.randn(8, 30, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> rollout = TensorDict({"z": z, "x": z[..., 1]}, batch_size=[8, 30])
        >>> probe = TemporalProbe("z", "x", horizons=[0, 5]).fit(rollout)
        >>> [round(r2, 1) for r2 in probe.scores["r2"].tolist()][0], bool(probe.scores["r2"][1] < 0.99)
        (1.0, True)
    """

    def __init__(
        self,
        key: NestedKey,
        label: NestedKey | Callable[[TensorDictBase], Tensor],
        horizons: Sequence[int] = (0,),
        *,
        name: str | None = None,
        ridge: float = 1e-3,
        folds: int = 4,
    ) -> None:
        super().__init__()
        self.key, self.horizons = as_key(key), tuple(horizons)
        if not self.horizons or not all(type(h) is int and h >= 0 for h in self.horizons):
            raise BadValue("not horizons", got=f"{self.horizons}", needed="steps ahead: 0, 1, ...")
        if isinstance(label, (str, tuple)):
            self.label: Any = as_key(label)
            name = join(label)[-1] if name is None else name
        elif callable(label):
            self.label = label
        else:
            raise BadType("not a label", got=repr(label), needed="a key, or a callable of the rollout")
        self.name = "label" if name is None else name
        self.ridge, self.folds = float(ridge), int(folds)
        self.in_keys, self.out_keys = [self.key], [(PROBE, self.name)]
        check_writable(self.out_keys, self.in_keys)
        self.probes: list[RidgeProbe] = []
        self.scores: TensorDict | None = None

    def fit(self, rollout: TensorDictBase) -> TemporalProbe:
        """Fit and score the probes on the episodes of a rollout ``[*B, T]``; gives itself back."""
        check_rollout(rollout)
        at, counts = episodes_of(rollout)
        z = _entry(rollout, self.key).detach()
        y = self.label(rollout) if callable(self.label) else _entry(rollout, self.label)
        if not isinstance(y, Tensor):
            raise BadType("the label is no tensor", got=type(y).__name__, needed="a number for each step")
        y = y.squeeze(-1) if y.shape == (*rollout.batch_size, 1) else y
        if y.shape != rollout.batch_size or z.ndim != rollout.ndim + 1:
            raise BadValue(
                "a probe needs a vector and a number for each step",
                got=f"latent {list(z.shape)}, label {list(y.shape)}",
                needed=f"{[*rollout.batch_size, 'C']} and {list(rollout.batch_size)}",
            )
        z, y = z.flatten(0, -2)[at], y.detach().to(z.dtype).flatten()[at]
        found = [self._horizon(z, y, counts, h) for h in self.horizons]
        self.probes = [probe for probe, _ in found]
        self.scores = torch.stack([scores for _, scores in found])
        return self

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Predict the label at each horizon."""
        check_td(tensordict)
        self._check_fitted()
        z = tensordict.get(self.key)
        if z is None:
            raise BadKey(f"no entry {key_text(self.key)} to read", got=f"entries {list(tensordict.keys(True, True))}")
        with torch.no_grad():
            return tensordict.set(self.out_keys[0], torch.stack([probe(z) for probe in self.probes], -1))

    def edit(self, horizon: int | None = None) -> RemoveDirection:
        """The edit that takes the direction of one horizon (default: the first) out of the latent."""
        self._check_fitted()
        horizon = self.horizons[0] if horizon is None else horizon
        if horizon not in self.horizons:
            raise BadValue("no probe of that horizon", got=horizon, needed=f"one of {list(self.horizons)}")
        probe = self.probes[self.horizons.index(horizon)]
        return RemoveDirection(probe.direction, probe.mean)

    def causal_test(
        self,
        env: Any,
        policy: TensorDictModuleBase,
        seeds: Sequence[int] = range(64),
        *,
        horizon: int | None = None,
        controls: int = 5,
        **options: Any,
    ) -> Returns:
        """Does the agent use what the probe reads? The return without the direction, beside matched-norm controls.

        Args:
            env, policy, seeds, controls, options: as for :func:`~tdconcepts.rl.compare_returns`.
            horizon: whose direction; default: the first.

        Returns:
            The comparison, with the variant ``"without <name>"``: ``result.difference("without x")``.
        """
        variant = {f"without {self.name}": {self.key: self.edit(horizon)}}
        return compare_returns(env, policy, variant, seeds, controls=controls, **options)

    def _horizon(self, z: Tensor, y: Tensor, counts: Tensor, h: int) -> tuple[RidgeProbe, TensorDict]:
        steps = z.shape[1]
        later = torch.cat([y[:, h:], y.new_zeros(len(y), min(h, steps))], 1)[:, :steps]
        mask = torch.zeros_like(counts)
        mask[:, : max(0, steps - h)] = counts[:, : max(0, steps - h)] & counts[:, h:]
        if int(mask.any(1).sum()) < 2:
            raise BadValue(
                f"too few episodes have a label {h} steps later",
                got=f"{int(mask.any(1).sum())} of {len(y)}",
                needed="2 or more",
                fix="shorter horizons, or more episodes",
            )
        other = later.roll(1, 0)
        both = mask & mask.roll(1, 0)
        r2, by_step = self._held_out(z, later, mask)
        control, _ = self._held_out(z, other, both) if int(both.any(1).sum()) > 1 else (torch.tensor(torch.nan), None)
        probe = ridge_direction(z, later, self.ridge, mask=mask, folds=2)
        numbers = {"horizon": torch.tensor(h), "r2": r2, "control": control, "rows": mask.sum(), "by_step": by_step}
        return probe, TensorDict(numbers, batch_size=[])

    def _held_out(self, z: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """R^2 on episodes held out: of all steps, and step by step."""
        episodes = mask.any(1).nonzero().squeeze(1)
        folds = min(self.folds, len(episodes))
        error, spread = torch.zeros_like(y, dtype=torch.float64), torch.zeros_like(y, dtype=torch.float64)
        for fold in range(folds):
            out = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            out[episodes[fold::folds]] = True
            seen = mask & ~out[:, None]
            rows = TensorDict(z=z, y=y, seen=seen, batch_size=y.shape)
            predicted = LinearProbe("z", "y", self.ridge).fit(rows, mask="seen")(z[out])
            error[out] = (y[out] - predicted).double().square()
            spread[out] = (y[out].double() - y[seen].double().mean()).square()
        error, spread = error * mask, spread * mask
        enough = mask.sum(0) > 2
        by_step = torch.where(enough, 1 - error.sum(0) / spread.sum(0), torch.nan)
        return 1 - error.sum() / spread.sum(), by_step

    def _check_fitted(self) -> None:
        if not self.probes:
            raise BadValue("the probe is not fitted", needed="probe.fit(rollout) first")


def check_rollout(rollout: object) -> None:
    """Raise for what has no batch and time."""
    if not isinstance(rollout, TensorDictBase) or rollout.ndim < 1:
        got = (
            f"batch size {list(rollout.batch_size)}" if isinstance(rollout, TensorDictBase) else type(rollout).__name__
        )
        raise BadValue("not a rollout", got=got, needed="a TensorDict [*B, T], time last", fix="env.rollout(...)")


def episodes_of(rollout: TensorDictBase) -> tuple[Tensor, Tensor]:
    """The steps of each episode of a rollout ``[*B, T]``, as places in the flat batch, and which of them are steps.

    An episode ends where ``("next", "done")`` is True, or where its slot ends; steps that torchrl's mask
    (``("collector", "mask")``) leaves out don't count.

    Returns:
        places ``[E, T']`` into ``rollout.reshape(-1)`` (0 where there is no step), and ``[E, T']``, True for a step.

    Examples:
        >>> done = torch.tensor([[False, True, False], [False, False, False]])
        >>> rollout = TensorDict({("next", "done"): done.unsqueeze(-1)}, batch_size=[2, 3])
        >>> episodes_of(rollout)[0]
        tensor([[0, 1, 0],
                [2, 0, 0],
                [3, 4, 5]])
    """
    steps = rollout.batch_size[-1]
    shape = (rollout.numel() // max(1, steps), steps)
    done = rollout.get(("next", "done"))
    ends = torch.zeros(shape, dtype=torch.bool) if done is None else done.reshape(shape).bool()
    mask = rollout.get(MASK)
    counts = torch.ones_like(ends) if mask is None else mask.reshape(shape).bool()
    ends = ends.clone()
    ends[:, -1:] = True
    number = ends.flatten().cumsum(0) - ends.flatten().long()  # of the episode that each step belongs to
    kept = counts.flatten().nonzero().squeeze(1)
    if not len(kept):
        raise BadValue("the rollout has no steps", got=f"batch size {list(rollout.batch_size)}")
    _, which, length = number[kept].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(kept), device=kept.device) - (length.cumsum(0) - length)[which]
    at = torch.zeros(len(length), int(length.max()), dtype=torch.long, device=kept.device)
    at[which, place] = kept
    return at, torch.arange(at.shape[1], device=kept.device) < length[:, None]


def _entry(td: TensorDictBase, key: NestedKey) -> Tensor:
    value = td.get(key)
    if value is None:
        raise BadKey(f"the rollout has no entry {key_text(key)}", got=f"entries {list(td.keys(True, True))}")
    return value
