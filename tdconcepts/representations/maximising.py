"""Activation maximisation: the input that a target likes best, by ascent from where the rows are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Options, Pullback, Target, dispatch_rows
from tdconcepts.hooks.batching import expand, gather, spread
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.keys import NestedKey
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["ActivationMaximisation", "Regularise"]


@dataclasses.dataclass(frozen=True)
class Regularise:
    r"""What keeps a maximised input natural.

    Args:
        l2: pulls to zero: :math:`-\frac{l_2}{2} x^2`.
        l1: pulls to zero, and leaves zeros: :math:`-l_1 |x|`.
        smooth: pulls neighbouring pixels together, over the last two dims of a row:
            :math:`-\frac{s}{2} \sum (x_{i+1} - x_i)^2`.
        jitter: the most pixels by which the input is shifted (around) before each step, over the last two dims.
        low, high: the values stay between these.
        generator: where the shifts come from; default: torch's own.

    Raises:
        BadValue: a weight below zero, bounds the wrong way round.

    Examples:
        >>> Regularise(l2=0.1, high=1.0).high
        1.0
    """

    l2: float = 0.0
    l1: float = 0.0
    smooth: float = 0.0
    jitter: int = 0
    low: float = -math.inf
    high: float = math.inf
    generator: torch.Generator | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        weights = {"l2": self.l2, "l1": self.l1, "smooth": self.smooth, "jitter": self.jitter}
        wrong = {name: value for name, value in weights.items() if not 0 <= value < math.inf}
        if wrong or type(self.jitter) is not int or not self.low < self.high:
            got = f"{wrong or repr(self)}"
            raise BadValue("not a regulariser", got=got, needed="weights of 0 or more, an int jitter, low < high")

    def pull(self, x: Tensor, lead: int) -> Tensor:
        """The gradient of the penalties at ``x``, whose first ``lead`` dims are the batch."""
        pulled = -self.l2 * x if self.l2 else torch.zeros_like(x)
        if self.l1:
            pulled = pulled - self.l1 * x.sign()
        if self.smooth:
            for dim in self.plane(x, lead):
                step = x.diff(dim=dim)
                edge = torch.zeros_like(x.narrow(dim, 0, 1))
                pulled = (
                    pulled + self.smooth * torch.cat([step, edge], dim) - self.smooth * torch.cat([edge, step], dim)
                )
        return pulled

    def plane(self, x: Tensor, lead: int) -> tuple[int, int]:
        """The last two dims, if rows have so many.

        Raises:
            BadValue: rows that are no images.
        """
        if x.ndim < lead + 2:
            got = f"rows of shape {list(x.shape[lead:])}"
            raise BadValue("smooth and jitter are for images", got=got, needed="rows of two dims or more")
        return -2, -1


class ActivationMaximisation(Replaceable, TensorDictModuleBase):
    r"""Ascend a target over the inputs: :math:`x \leftarrow \mathrm{clip}(x + \eta (g / \mathrm{rms}(g) - \nabla r))`.

    ======  ====================================  ==============================================================
    reads   the module's ``in_keys``              where the ascent starts (noise, zeros, an example)
    writes  ``("maximised", *k)``                 the input at its end, in the shape of ``k``; with several
                                                  targets ``[*B, T, ...]``, each target with an ascent of its own
    ======  ====================================  ==============================================================

    Targets are anything that a :class:`~tdconcepts.Target` names: logits, a neuron, a channel's mean (a callable).
    Several climb at once, in one batch.

    Args:
        module: a TensorDictModule.
        target: what is maximised.
        wrt: entries that the module reads, one or a list; default: all.
        steps: how many.
        rate: the length of a step, in units of the input.
        normalise: divide each row's gradient by its root mean square, so that steps don't vanish.
        regularise: what keeps the input natural; see :class:`Regularise`.
        options: ``chunk_size``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: settings out of range, a ``wrt`` inside the module. BadType: ``create_graph`` or ``outputs``.

    Source: Erhan et al., *Visualizing higher-layer features of a deep network*, 2009; Olah et al., *Feature
    visualization*, 2017 (jitter, regularisers).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(3, 2), ["x"], ["y"])
        >>> climb = ActivationMaximisation(net, Target("y", [0, 1]), steps=10, regularise=Regularise(low=-1, high=1))
        >>> found = climb(TensorDict(x=torch.zeros(1, 3), batch_size=[1]))["maximised", "x"]
        >>> torch.equal(found[0].sign(), net.module.weight.sign())
        True
    """

    tunables = (Tunable("steps", 10, 200, 10), Tunable("rate", choices=(0.01, 0.03, 0.1, 0.3)))

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: NestedKey | list[NestedKey] | None = None,
        steps: int = 100,
        rate: float = 0.1,
        normalise: bool = True,
        regularise: Regularise | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        refused = [name for name in ("outputs", "create_graph") if options.get(name)]
        if refused:
            raise BadType(
                f"an ascent has no {refused[0]}", got=f"{refused[0]}=True", fix="run the module on the result"
            )
        given: dict[str, Any] = {"out_key": "maximised", **options}
        self._explaining = Explaining(module, target, wrt, given)  # type: ignore[arg-type]
        if self._explaining.pullback.is_inner:
            raise BadValue("an ascent changes what the module reads", got=f"wrt={wrt!r}", needed="entries it reads")
        if type(steps) is not int or steps < 1 or not 0 < rate < math.inf:
            got = f"steps={steps!r}, rate={rate!r}"
            raise BadValue("a setting is out of range", got=got, needed="steps of 1 or more, a rate above 0")
        self.module, self.steps, self.rate, self.normalise = module, steps, float(rate), normalise
        self.regularise = Regularise() if regularise is None else regularise
        Source(self.regularise.generator)
        self._each = Pullback(module, Target(target.of, _Own(target)), list(self._explaining.pullback.wrt))
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Ascend from every row."""
        source, most = Source(self.regularise.generator), self.regularise.jitter
        shifts = []
        if most:
            drawn = source.uniform(self.steps, 2)
            shifts = ((2 * most + 1) * drawn).long().clamp(max=2 * most).sub(most).tolist()
        return self._explaining.run(tensordict, lambda td, held: self._ascend(td, held, shifts))

    def _ascend(self, td: TensorDictBase, held: Tensor | None, shifts: list[list[int]]) -> dict[NestedKey, Tensor]:
        this, batch = self._explaining, td.batch_size
        pull = this.pullback
        held = pull.hold(td) if held is None else held
        pull.check_inputs(td, {})
        values, _ = pull.evaluate(td, held=held)
        n = values.shape[-1] if values.ndim > td.batch_dims else 0  # several targets: copies of the batch
        pull = self._each if n else pull
        many = expand(td, n, this.pullback.reads(td)) if n > 1 else td
        lead = many.batch_dims
        starts = {key: td.get(key).detach() for key in pull.wrt}
        points = {key: spread(x.expand(n, *x.shape), n, batch) if n > 1 else x for key, x in starts.items()}
        points = {key: x.clamp(self.regularise.low, self.regularise.high) for key, x in points.items()}
        for step in range(self.steps):
            shift = shifts[step] if shifts else None
            moved = {key: self._shifted(x, shift, lead) for key, x in points.items()}
            found = pull(many, moved, held=None if n else held).gradients
            for key, gradient in zip(pull.wrt, found, strict=True):
                gradient = self._shifted(gradient, None if shift is None else [-s for s in shift], lead)
                if self.normalise:
                    dims = list(range(lead, gradient.ndim))
                    square = gradient.square().mean(dims, keepdim=True) if dims else gradient.square()
                    gradient = gradient * square.clamp(min=torch.finfo(gradient.dtype).tiny).rsqrt()
                x = points[key] + self.rate * (gradient + self.regularise.pull(points[key], lead))
                points[key] = x.clamp(self.regularise.low, self.regularise.high)
        results = {}
        for key, out_key in zip(pull.wrt, this.attribution_keys, strict=True):
            x = points[key]
            if n > 1:
                x = gather(x, n, batch).movedim(0, len(batch))
            elif n:
                x = x.unsqueeze(len(batch))
            results[out_key] = x
        return results

    def _shifted(self, x: Tensor, shift: list[int] | None, lead: int) -> Tensor:
        return x if shift is None else x.roll(shift, self.regularise.plane(x, lead))


class _Own:
    """Of several targets on as many copies of a batch, each copy's own."""

    def __init__(self, target: Target) -> None:
        self.target, self.in_keys, self.goals = target, target.in_keys, target.goals

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        lead = td.batch_dims
        found, several = self.target.read(value, td, lead)
        if not several or found.shape[-1] == 1:
            return found.squeeze(-1) if several else found
        n = found.shape[-1]
        own = found.reshape(n, -1, n).diagonal(dim1=0, dim2=2)  # [B, n]
        return own.mT.reshape(found.shape[:-1])
