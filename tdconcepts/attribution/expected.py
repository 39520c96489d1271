"""Expected gradients: integrated gradients, averaged over the rows of a data set as baselines."""

from __future__ import annotations

from typing import Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Options, Site, Target, dispatch_rows
from tdconcepts.hooks.batching import expand, gather, groups, spread
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.hooks.leaves import pick
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey, key_text
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["ExpectedGradients"]


class ExpectedGradients(Replaceable, TensorDictModuleBase):
    r"""The mean of :math:`(w - w_0)\, \partial y(w_0 + u (w - w_0)) / \partial w` over baselines :math:`w_0` and
    :math:`u \sim U(0, 1)`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    Each draw takes one row of ``baselines`` for all entries together, so that what belongs together stays together, and
    one :math:`u`. All rows share the draws, so a row gets what it gets alone. ``"argmax"`` is chosen once, at the
    input. With several targets one more dim of size T follows the batch. At a site it is its difference from its value
    at the row of the baselines, times its gradient at the drawn point of the inputs.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        baselines: rows of a data set: a TensorDict of batch size [M] with these entries.
        n_samples: the number of draws.
        generator: where they come from: the same state, the same answer, whatever the chunks. Default: torch's own.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: baselines that are no TensorDict. BadKey: an entry that they lack. BadValue: another shape, no rows, or
            no samples.

    Source: Erion et al., *Improving performance of deep learning models with axiomatic attribution priors and expected
    gradients*, 2021 (equation 4); GradientSHAP in Lundberg's ``shap``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> rows = TensorDict(x=torch.zeros(1, 4), batch_size=[1])
        >>> td = ExpectedGradients(net, Target("y", 0), baselines=rows)(TensorDict(x=torch.ones(3, 4), batch_size=[3]))
        >>> torch.allclose(td["attribution", "x"], net.module.weight[0].expand(3, 4))
        True
    """

    tunables = (Tunable("n_samples", 10, 200, 10),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        baselines: TensorDictBase,
        n_samples: int = 50,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._explaining = this = Explaining(module, target, wrt, options)
        if not isinstance(baselines, TensorDictBase):
            fix = "TensorDict(observation=rows, batch_size=[len(rows)])"
            raise BadType("not rows of baselines", got=type(baselines).__name__, needed="a TensorDict", fix=fix)
        if baselines.batch_dims != 1 or not baselines.batch_size.numel():
            got = f"batch size {list(baselines.batch_size)}"
            raise BadValue("not rows of baselines", got=got, needed="batch size [M], M >= 1")
        have = [key for key in module.in_keys if baselines.get(key) is not None]
        for key in this.entries or [key for key in module.in_keys if not have]:
            if key not in have:
                got = f"entries {list(baselines.keys(True, True))}"
                raise BadKey(f"no entry {key_text(key)} in the baselines", got=got)
        if type(n_samples) is not int or n_samples < 1:
            raise BadValue("not a number of samples", got=f"n_samples={n_samples!r}", needed="an int >= 1")
        self.module, self.n_samples, self._source = module, n_samples, Source(generator)
        self._moved = [key for key in have if key in this.pullback.in_keys] if this.pullback.is_inner else this.entries
        self.baselines = baselines.select(*self._moved)
        self.in_keys, self.out_keys = this.in_keys, this.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        rows = self._source.choices(torch.ones(len(self.baselines)), self.n_samples)
        places = self._source.uniform(self.n_samples)
        return self._explaining.run(tensordict, lambda td, held: self._attribute(td, held, rows, places))

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(
        self, td: TensorDictBase, held: Tensor | None, rows: Tensor, places: Tensor
    ) -> dict[NestedKey, Tensor]:
        this, lead, batch = self._explaining, td.batch_dims, td.batch_size
        pullback = this.pullback
        td, outputs = this.ran(td)
        held = self.hold(td) if held is None else held
        pullback.check_inputs(td, {})
        moved, inner = self._moved, [w for w in pullback.wrt if w not in this.entries]
        ends: dict[Wrt, Tensor] = {key: td.get(key) for key in moved}
        starts = {key: self._rows(key, ends[key], lead) for key in moved}
        if inner:
            ends |= pullback.evaluate(td, create_graph=this.create_graph)[1]
        others = [key for key in pullback.reads(td) if key not in pullback.wrt and key not in moved]
        totals: dict[Wrt, Tensor] = {}
        for group in this.tracked(groups(self.n_samples, this.rows(td, pullback.in_keys), td.numel()), "samples"):
            n, some = len(group), slice(group.start, group.stop)
            steps: dict[Wrt, Tensor] = {}
            points: dict[Wrt, Tensor] = {}
            many, base = expand(td, n, others), expand(td, n, others) if inner else None
            for key in moved:
                end = ends[key]
                start = starts[key][rows[some].to(end.device)]
                start = start.reshape(n, *[1] * lead, *start.shape[1:])
                steps[key] = end - start
                at = places[some].to(end.device, end.dtype)
                point = spread(start + at.view(-1, *[1] * end.ndim) * steps[key], n, batch)
                if key in this.entries:
                    points[key] = point
                else:
                    many.set(key, point)
                if base is not None:
                    base.set(key, spread(start.expand(n, *end.shape), n, batch))
            if base is not None:
                before = pullback.evaluate(base, create_graph=this.create_graph)[1]
                for w in inner:
                    step = ends[w] - gather(before[w], n, batch)
                    steps[w] = pick(step, w.index, 1 + lead) if isinstance(w, Site) else step
            kept = None if held is None else spread(held.expand(n, *held.shape), n, batch)
            pulled = pullback(many, points, create_graph=this.create_graph, held=kept, width=this.width(td, n))
            several = pulled.values.ndim > many.batch_dims
            for w, gradient in zip(pullback.wrt, pulled.gradients, strict=True):
                step = steps[w].unsqueeze(1 + lead) if several else steps[w]
                each = gather(gradient, n, batch) * step
                part = each.to(torch.promote_types(each.dtype, torch.float32)).sum(0)
                totals[w] = part if w not in totals else totals[w] + part
        found = {w: (total / self.n_samples).to(ends[w].dtype) for w, total in totals.items()}
        keys = dict(zip(pullback.wrt, this.attribution_keys, strict=True))
        return {keys[w]: a if this.create_graph else a.detach() for w, a in found.items()} | outputs

    def _rows(self, w: Wrt, end: Tensor, lead: int) -> Tensor:
        rows = self.baselines.get(w)
        if rows.shape[1:] != end.shape[lead:]:
            got, needed = f"{list(rows.shape)}", f"[{len(rows)}, *{list(end.shape[lead:])}]"
            raise BadValue(f"the baselines of {key_text(w)} have another shape", got=got, needed=needed)
        return rows.to(device=end.device, dtype=end.dtype)
