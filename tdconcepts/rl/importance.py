"""Which states to look at: the importance of a state, and the highlights of a rollout."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.keys import NestedKey, as_key, key_text
from tdconcepts.rl.rollouts import MASK

__all__ = ["Highlight", "StateImportance", "highlights"]

IMPORTANCE = "importance"


class StateImportance(TensorDictModuleBase):
    r"""How much the choice of the action matters in a state: :math:`I(s) = \max_a Q(s, a) - \min_a Q(s, a)`.

    | reads | writes |
    |---|---|
    | ``of`` ``[*B, A]`` | ``"importance"`` ``[*B]`` |

    Args:
        of: the entry with a value (or logit) for each action.
        kind: ``"range"``, as above: what the worst choice would cost (HIGHLIGHTS); ``"second"``: best minus second
            best; ``"entropy"``: :math:`\log A - H(\mathrm{softmax}(Q))`, how decided the agent is (critical states).
        out_key: where it is written.

    Raises:
        BadKey: no such entry. BadValue: a kind that is none, fewer than two actions.

    Source: Amir and Amir 2018, "HIGHLIGHTS: summarizing agent behavior to people", equation 1; Torrey and Taylor 2013;
    Huang et al. 2018, "Establishing appropriate trust via critical states", for the entropy.

    Examples:
        >>> StateImportance()(action_value=torch.tensor([[1.0, 4.0, 3.0]]))
        tensor([3.])
    """

    def __init__(
        self,
        of: NestedKey = "action_value",
        kind: Literal["range", "second", "entropy"] = "range",
        out_key: NestedKey = IMPORTANCE,
    ) -> None:
        super().__init__()
        if kind not in ("range", "second", "entropy"):
            raise BadValue("not a kind of importance", got=repr(kind), needed='"range", "second" or "entropy"')
        self.kind, self.in_keys, self.out_keys = kind, [as_key(of)], [as_key(out_key)]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Judge every row of ``tensordict``."""
        check_td(tensordict)
        key = self.in_keys[0]
        value = tensordict.get(key)
        if value is None:
            raise BadKey(f"no entry {key_text(key)} with the values", got=f"{list(tensordict.keys(True, True))}")
        if value.ndim != tensordict.batch_dims + 1 or value.shape[-1] < 2 or not value.is_floating_point():
            raise BadValue(
                f"the entry {key_text(key)} has no values of actions",
                got=f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}",
                needed=f"{[*tensordict.batch_size, 'A']}, two actions or more",
            )
        value = value.detach()
        if self.kind == "range":
            found = value.amax(-1) - value.amin(-1)
        elif self.kind == "second":
            best = value.topk(2, -1).values
            found = best[..., 0] - best[..., 1]
        else:
            log_p = value.log_softmax(-1)
            found = (log_p.exp() * log_p).sum(-1) + torch.log(torch.tensor(float(value.shape[-1]))).to(value)
        return tensordict.set(self.out_keys[0], found)


class Highlight(NamedTuple):
    """One highlight of a rollout; a page shows it as a ``Shown`` of :mod:`tdconcepts.report`.

    Args:
        trajectory: an index for each batch dim but time.
        step: the important one.
        start: the first step to show.
        stop: the step after the last to show.
        importance: of the step.

    Examples:
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict({"importance": torch.tensor([[0.0, 1.0], [7.0, 0.0]])}, [2, 2])
        >>> highlights(rollout, 1, context=1)
        [Highlight(trajectory=(1,), step=0, start=0, stop=2, importance=7.0)]
    """

    trajectory: tuple[int, ...]
    step: int
    start: int
    stop: int
    importance: float


def highlights(
    rollout: TensorDictBase,
    k: int = 5,
    *,
    importance: NestedKey = IMPORTANCE,
    context: int = 5,
    state: NestedKey | None = None,
    distance: float | None = None,
    mask: NestedKey | None = None,
) -> list[Highlight]:
    """The k steps of a rollout that say most about an agent, each with the steps around it.

    The most important step first; then always the most important one that is far enough: its window does not overlap
    one that was taken in the same trajectory (HIGHLIGHTS), and, with ``state``, it is further than ``distance`` from
    every state that was taken (HIGHLIGHTS-DIV). There may be fewer than k.

    Args:
        rollout: ``[*B, T]`` with the importance of each step, as :class:`StateImportance` writes it.
        k: how many.
        importance: the entry, ``[*B, T]``.
        context: how many steps to show before and after.
        state: an entry ``[*B, T, ...]`` by which states are compared (Euclidean); default: none.
        distance: how far states have to be from each other; default: a tenth of the largest distance between any two
            steps (of at most 1000, evenly spaced).
        mask: the entry of the steps that count; default: ``("collector", "mask")``, where it is there.

    Raises:
        BadKey: an entry that is not there. BadValue: k or context out of range, a rollout without time.

    Source: Amir and Amir 2018, "HIGHLIGHTS", algorithms 1 and 2.

    Examples:
        >>> from tensordict import TensorDict
        >>> rollout = TensorDict({"importance": torch.tensor([[0.0, 9.0, 8.0, 0.0, 0.0, 5.0]])}, [1, 6])
        >>> [(one.step, one.start, one.stop) for one in highlights(rollout, 2, context=1)]
        [(1, 0, 3), (5, 4, 6)]
    """
    if type(k) is not int or k < 1 or type(context) is not int or context < 0:
        raise BadValue("no highlights", got=f"k={k!r}, context={context!r}", needed="k >= 1, context >= 0")
    if not isinstance(rollout, TensorDictBase) or not rollout.batch_dims:
        got = "batch_size []" if isinstance(rollout, TensorDictBase) else type(rollout).__name__
        raise BadValue("a rollout is a TensorDict with batch dims, the last of them time", got=got)
    scores = _entry(rollout, importance).detach().double().cpu()
    if scores.shape != rollout.batch_size:
        raise BadValue(f"the importance {key_text(importance)}", got=f"shape {list(scores.shape)}", needed="[*B, T]")
    length = rollout.batch_size[-1]
    flat = scores.reshape(-1, length).clone()
    counted = _entry(rollout, mask) if mask is not None else rollout.get(MASK, None)
    if counted is not None:
        flat[~counted.reshape(-1, length).bool().cpu()] = -torch.inf
    seen = None if state is None else _entry(rollout, state).detach().double().cpu().reshape(*flat.shape, -1)
    if seen is not None and distance is None:
        some = seen[flat > -torch.inf]
        some = some[:: max(1, len(some) // 1000)]
        distance = 0.1 * float(torch.cdist(some, some).max()) if len(some) else 0.0
    found: list[Highlight] = []
    while len(found) < k and bool((flat > -torch.inf).any()):
        place, step = divmod(int(flat.argmax()), length)
        start, stop = max(0, step - context), min(length, step + context + 1)
        if counted is not None:
            alive = counted.reshape(-1, length).bool()[place].nonzero().flatten()
            stop = min(stop, int(alive[-1]) + 1)
        trajectory = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), rollout.batch_size[:-1]))
        found.append(Highlight(trajectory, step, start, stop, float(flat[place, step])))
        flat[place, max(0, step - 2 * context) : step + 2 * context + 1] = -torch.inf
        if seen is not None and distance is not None:
            flat[(seen - seen[place, step]).norm(dim=-1) <= distance] = -torch.inf
    return found


def _entry(rollout: TensorDictBase, key: NestedKey) -> Tensor:
    value = rollout.get(as_key(key), None)
    if value is None:
        raise BadKey(f"the rollout has no entry {key_text(key)}", got=f"entries {list(rollout.keys(True, True))}")
    if not isinstance(value, Tensor):
        raise BadType(f"the entry {key_text(key)} is no tensor", got=type(value).__name__)
    return value
