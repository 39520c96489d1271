"""Why this action rather than that, in terms of rewards: decomposed values, their differences, minimal reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import check_td, dispatch_rows
from tdconcepts.keys import NestedKey, as_key, join, key_text
from tdconcepts.rl.selections import one_hot

__all__ = ["RewardDifference", "minimal_reasons"]

RDX = "rdx"


class RewardDifference(TensorDictModuleBase):
    r"""Reward difference explanation: :math:`\Delta_c(s, a, a') = Q_c(s, a) - Q_c(s, a')`, with its minimal reasons.

    A critic that values each kind of reward apart, :math:`Q = \sum_c Q_c`, can say what an action is chosen *for*.

    | reads | writes |
    |---|---|
    | ``of`` ``[*B, C, A]``; ``action`` ``[*B]`` | ``("rdx", "difference")`` ``[*B, C]`` |
    | ``other`` ``[*B]``, where it is an entry | ``("rdx", "msx+")``, ``("rdx", "msx-")`` ``[*B, C]``: truth values |

    MSX+ is the smallest set of advantages that outweighs all disadvantages,
    :math:`\sum_{c \in MSX^+} \Delta_c > d,\ d = \sum_{\Delta_c < 0} |\Delta_c|`; MSX- the smallest set of
    disadvantages without which a smaller MSX+ would do:
    :math:`\sum_{c \in MSX^-} |\Delta_c| > v,\ v = \sum_{c \in MSX^+} \Delta_c - \min_{c \in MSX^+} \Delta_c`.
    Of equal differences the first counts. Where a is *worse* than a', no set of advantages is enough, and both are
    empty.

    Args:
        of: the entry with a value for each component and action.
        action: the action a that was taken: indices ``[*B]`` or one-hot rows ``[*B, A]``.
        other: the action a': an index; ``"second"``, the best of the others by the sum of the components; or an entry.
        components: the names of the components, in order; for :meth:`rows`.
        out_key: the first part of the keys that are written.

    Raises:
        BadKey: an entry that is not there. BadValue: values of another shape, an action that is none.

    Source: Juozapaitis et al. 2019, "Explainable reinforcement learning via reward decomposition", equations 3 to 6.

    Examples:
        >>> from tensordict import TensorDict
        >>> values = torch.tensor([[[5.0, 1.0], [2.0, 3.0], [1.0, 0.5]]])  # three components, two actions
        >>> td = TensorDict(values=values, action=torch.tensor([0]), batch_size=[1])
        >>> found = RewardDifference("values")(td)["rdx"]
        >>> found["difference"], found["msx+"], found["msx-"]
        (tensor([[ 4.0000, -1.0000,  0.5000]]), tensor([[ True, False, False]]), tensor([[False,  True, False]]))
    """

    def __init__(
        self,
        of: NestedKey = "component_value",
        action: NestedKey = "action",
        other: int | str | tuple[str, ...] = "second",
        *,
        components: Sequence[str] | None = None,
        out_key: NestedKey = RDX,
    ) -> None:
        super().__init__()
        self._of, self.action = as_key(of), as_key(action)
        self.other: Any = other if isinstance(other, int) or other == "second" else as_key(other)
        self.components = None if components is None else tuple(components)
        more = [] if isinstance(self.other, int) or self.other == "second" else [self.other]
        self.in_keys = list(dict.fromkeys([self._of, self.action, *more]))
        self._written = [as_key(join(out_key, name)) for name in ("difference", "msx+", "msx-")]
        self.out_keys = list(self._written)

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        check_td(tensordict)
        value = tensordict.get(self._of)
        if value is None:
            raise BadKey(f"no entry {key_text(self._of)}", got=f"entries {list(tensordict.keys(True, True))}")
        if value.ndim != tensordict.batch_dims + 2 or value.shape[-1] < 2:
            needed = f"{[*tensordict.batch_size, 'components', 'actions']}, two actions or more"
            raise BadValue(f"the entry {key_text(self._of)}", got=f"shape {list(value.shape)}", needed=needed)
        names = self.components
        if names is not None and len(names) != value.shape[-2]:
            raise BadValue("not a name for each component", got=f"{names}", needed=f"{value.shape[-2]} names")
        value = value.detach()
        total = value.sum(-2)
        mine = one_hot(total, tensordict, self.action)
        rival = self._rival(total, mine, tensordict)
        gap = torch.where(mine.unsqueeze(-2), value, 0.0).sum(-1) - torch.where(rival.unsqueeze(-2), value, 0.0).sum(-1)
        for key, found in zip(self._written, (gap, *minimal_reasons(gap)), strict=True):
            tensordict.set(key, found)
        return tensordict

    def rows(self, td: TensorDictBase) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of a table of one state's differences, the reasons marked."""
        gap, plus, minus = (td.get(key) for key in self._written)
        if gap.ndim != 1:
            raise BadValue("a table is of one state", got=f"batch_size {list(td.batch_size)}", fix="td[0]")
        names = self.components or tuple(f"component {i}" for i in range(len(gap)))
        marks = ["MSX+" if p else "MSX-" if m else "" for p, m in zip(plus.tolist(), minus.tolist(), strict=True)]
        cells = [[name, f"{float(x):+.3g}", mark] for name, x, mark in zip(names, gap, marks, strict=True)]
        return ["component", "difference", "reason"], cells

    def _rival(self, total: Tensor, mine: Tensor, td: TensorDictBase) -> Tensor:
        count = total.shape[-1]
        if self.other == "second":
            index = total.masked_fill(mine, -torch.inf).argmax(-1, keepdim=True)
        elif isinstance(self.other, int):
            if not -count <= self.other < count:
                raise BadValue("no such action", got=self.other, needed=f"an index in [0, {count})")
            index = torch.full_like(total[..., :1], self.other % count, dtype=torch.long)
        else:
            return one_hot(total, td, self.other)
        return index == torch.arange(count, device=total.device)


def minimal_reasons(difference: Tensor) -> tuple[Tensor, Tensor]:
    """MSX+ and MSX- of differences ``[*B, C]``, as truth values ``[*B, C]``; see :class:`RewardDifference`."""
    cost = difference.clamp(max=0.0).neg().sum(-1, keepdim=True)
    plus = _smallest(difference.clamp(min=0.0), cost)
    inside = torch.where(plus, difference, 0.0)
    least = torch.where(plus, difference, torch.inf).amin(-1, keepdim=True)
    enough = inside.sum(-1, keepdim=True) - torch.where(least.isinf(), 0.0, least)
    minus = _smallest(difference.clamp(max=0.0).neg(), enough) & plus.any(-1, keepdim=True)
    return plus, minus


def _smallest(size: Tensor, bar: Tensor) -> Tensor:
    """The fewest elements, the largest first, whose sum exceeds the bar; none where all together do not."""
    order = size.argsort(dim=-1, descending=True, stable=True)
    ranked = size.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    chosen = (before <= bar) & (ranked > 0) & (size.sum(-1, keepdim=True) > bar)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
