"""Do small changes of the input change the explanation much? Relative input stability."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_module, check_td, dispatch_rows
from tdconcepts.hooks.batching import check_chunk_size, expand, gather, groups, rows_of, spread
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import ATTRIBUTION, METRIC, NestedKey, as_key, join, key_text

__all__ = ["RIS"]


class RIS(TensorDictModuleBase):
    r"""Relative input stability: how far the explanation moves for how little.

    .. math::
        \max_{s'} \lVert (A - A') / A \rVert \,/\, \max(\lVert (s - s') / s \rVert, \epsilon)

    The largest relative change of the explanation over small random changes of the state, each compared with the
    relative change of the state itself; *lower* is better. The logged action is held.

    | reads | writes |
    |---|---|
    | what the explainer reads | ``("metric", "ris")`` ``[*B]`` |

    Args:
        explainer: writes ``("attribution", wrt)``.
        wrt: the entry that is perturbed, and explained.
        noise_level: the standard deviation of the Gaussian noise, in the units of the entry.
        n_samples: how many draws.
        generator: where they come from; all rows share them. Default: torch's own.
        floor: what a division goes by at least: :math:`\epsilon`, and the size of s and of A in it.
        chunk_size: rows in flight; default: chosen from the size of a row.

    Raises:
        BadKey: the explainer does not read or explain ``wrt``. BadValue: no noise to draw.

    Source: Agarwal et al. 2022, "Rethinking stability for attribution-based explanations", equation 2; Xiong et al.
    2024, "XRL-Bench", section 4.2.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])
        >>> td = TensorDict(observation=torch.ones(2, 3), batch_size=[2])
        >>> RIS(Gradient(net, Target("state_value")), "observation")(td)["metric", "ris"]  # a constant explanation
        tensor([0., 0.])
    """

    def __init__(
        self,
        explainer: TensorDictModuleBase,
        wrt: NestedKey,
        *,
        noise_level: float = 0.05,
        n_samples: int = 10,
        generator: torch.Generator | None = None,
        floor: float = 1e-4,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.explainer, self.wrt = check_module(explainer, "the explainer"), as_key(wrt)
        self._score = as_key(join(ATTRIBUTION, self.wrt))
        if self.wrt not in explainer.in_keys or self._score not in explainer.out_keys:
            raise BadKey(
                f"the explainer does not explain {key_text(wrt)}",
                got=f"in_keys {list(explainer.in_keys)}, out_keys {list(explainer.out_keys)}",
                needed=f"one that reads {key_text(wrt)} and writes {key_text(self._score)}",
            )
        if not noise_level > 0 or type(n_samples) is not int or n_samples < 1 or not floor > 0:
            got = f"noise_level={noise_level}, n_samples={n_samples}, floor={floor}"
            raise BadValue("no noise to draw", got=got, needed="a positive level and floor, one draw or more")
        self.noise_level, self.n_samples, self.floor = noise_level, n_samples, floor
        self._source, self._chunk = Source(generator), check_chunk_size(chunk_size)
        self.in_keys, self.out_keys = list(explainer.in_keys), [as_key(join(METRIC, "ris"))]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Measure every row of ``tensordict``."""
        check_td(tensordict)
        td, lead = tensordict, tensordict.batch_dims
        state = td.get(self.wrt)
        if state is None:
            raise BadKey(f"no entry {key_text(self.wrt)} in the TensorDict", got=f"{list(td.keys(True, True))}")
        if not state.is_floating_point():
            got = str(state.dtype).removeprefix("torch.")
            raise BadType(f"noise on the entry {key_text(self.wrt)}", got=got, needed="a floating-point entry")
        state = state.detach()
        noise = self._source.normal(self.n_samples, *state.shape[lead:])
        before = self._explained(td.select(*self.in_keys, strict=False))
        others = [key for key in self.in_keys if key != self.wrt]
        worst = torch.zeros(td.batch_size, dtype=state.dtype, device=state.device)
        for some in groups(self.n_samples, rows_of(td, self._chunk, [self.wrt]), td.numel()):
            m = len(some)
            draw = noise[some.start : some.stop].to(state).reshape(m, *[1] * lead, *state.shape[lead:])
            moved = state + self.noise_level * draw
            rows = expand(td, m, others).set(self.wrt, spread(moved, m, td.batch_size))
            after = gather(self._explained(rows), m, td.batch_size)
            change, step = self._size(before, before - after, lead), self._size(state, state - moved, lead)
            worst = torch.maximum(worst, (change / step.clamp(min=self.floor)).amax(0).to(worst.dtype))
        return td.set(self.out_keys[0], worst)

    def _explained(self, td: TensorDictBase) -> Tensor:
        found: Tensor = self.explainer(td).get(self._score).detach()
        return found

    def _size(self, value: Tensor, change: Tensor, lead: int) -> Tensor:
        """The norm of a change relative to the value, element by element; ``change`` has one dim more in front."""
        scale = torch.where(value.abs() < self.floor, torch.full_like(value, self.floor), value)
        return (change / scale).flatten(1 + lead).norm(dim=-1) if value.ndim > lead else (change / scale).abs()
