"""Testing with concept activation vectors: does a target rise where an activation moves towards a concept?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, Unpack

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Capture, Hooked, Options, Site, Target, dispatch_rows
from tdconcepts.hooks.batching import align
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import ACTIVATION, NestedKey, key_text
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.logistic import Weighed, logistic
from tdconcepts.representations.reading import Data, batches, finite

__all__ = ["TCAV", "TCAVScores", "welch"]


@dataclasses.dataclass(frozen=True, eq=False)
class TCAVScores:
    """What :meth:`TCAV.test` found. Each field is a TensorDict whose keys are those of the sites.

    Args:
        score: the share of rows whose target rises towards the concept, mean over the runs: ``[C]`` or ``[T, C]``.
        magnitude: the mean directional derivative: the same shape.
        spread: the standard deviation of the score over the runs: the same shape.
        random: the mean score of random vectors: ``[]`` or ``[T]``.
        p_value: of Welch's two-sided test of the runs' scores against those of random vectors: ``[C]`` or ``[T, C]``.
        concepts: the names, in the order of the last dim.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 1), ["x"], ["y"])
        >>> draw = lambda shift: TensorDict(x=torch.randn(30, 4) + shift, batch_size=[30])
        >>> tcav = TCAV(net, Target("y"), "x", runs=3).fit({"large": draw(3.0), "small": draw(-3.0)}, random=draw(0.0))
        >>> scores = tcav.test(draw(0.0))
        >>> scores.concepts, scores.p_value["x"].shape
        (('large', 'small'), torch.Size([2]))
    """

    score: TensorDictBase
    magnitude: TensorDictBase
    spread: TensorDictBase
    random: TensorDictBase
    p_value: TensorDictBase
    concepts: tuple[str, ...]

    def __repr__(self) -> str:
        found = []
        for key in self.score.keys(True, True):
            for i, name in enumerate(self.concepts):
                score, p = self.score.get(key)[..., i].tolist(), self.p_value.get(key)[..., i].tolist()
                found.append(f"{key_text(key)} {name}: {_text(score)} (p={_text(p)})")
        return f"TCAVScores({'; '.join(found)})"


class TCAV(Learned, TensorDictModuleBase):
    r"""The derivative of a target along concept activation vectors: :math:`S = \nabla_w y \cdot v_c`.

    A concept's vector :math:`v_c` is the weight, at length one, of a logistic probe that tells activations of the
    concept's examples from those of random ones; it points to the concept. :meth:`fit` trains ``runs`` of them, each
    against other random examples, and as many that tell random examples from others, all in one batched solve.

    ======  =========================  ==========================================================================
    reads   the target's ``in_keys``
    writes  ``("tcav", *k)``           ``[*B, C]``, the derivative along each concept's mean vector; with several
                                       targets ``[*B, T, C]``
    ======  =========================  ==========================================================================

    :meth:`test` gives the TCAV score, the share of rows with :math:`S > 0`, and whether it differs from that of random
    vectors. A concept that matters has a score far from theirs *and* a small p; with many concepts divide the level by
    their number.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: sites and entries, one or a list; rows of any shape are flattened.
        runs: vectors of each concept, 2 or more.
        ridge: of the probes; see :class:`~tdconcepts.representations.LogisticProbe`.
        generator: draws the random examples; default: torch's own.
        options: ``chunk_size``, ``outputs``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: before the fit; at the fit: too few examples.

    Source: Kim et al., *Interpretability beyond feature attribution: TCAV*, 2018 (eqs. 1 and 2, and the test of 3.3).

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), ["x"], ["y"])
        >>> draw = lambda shift: TensorDict(x=torch.randn(30, 4) + shift, batch_size=[30])
        >>> tcav = TCAV(net, Target("y", 1), Site("0"), runs=5).fit({"large": draw(3.0)}, random=draw(0.0))
        >>> tcav(draw(0.0))["tcav", "0"].shape, tcav.test(draw(0.0)).score["0"].shape
        (torch.Size([30, 1]), torch.Size([1]))
    """

    learns: ClassVar[tuple[str, ...]] = ("vectors", "random")

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt],
        runs: int = 20,
        ridge: float = 1.0,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if options.get("create_graph"):
            raise BadType("TCAV keeps no graph", got="create_graph=True", fix="a probe's output as the target")
        if type(runs) is not int or runs < 2 or not ridge > 0:
            got = f"runs={runs!r}, ridge={ridge!r}"
            raise BadValue("a setting is out of range", got=got, needed="runs of 2 or more, a ridge above 0")
        given: dict[str, Any] = {"out_key": "tcav", **options}
        self._explaining = this = Explaining(module, target, wrt, given)
        self.module, self.runs, self.ridge = module, runs, float(ridge)
        self._source = Source(generator)
        self.concepts: tuple[str, ...] = ()
        self.in_keys, self.out_keys = this.in_keys, this.out_keys

    def fit(self, concepts: Mapping[str, Data], random: Data) -> Self:
        """Learn the vectors; returns the stage.

        Args:
            concepts: for each name the examples: a TensorDict that the module reads, or an iterable of them.
            random: random examples, at least as many as each concept has are best.

        Raises:
            BadValue: no concepts, fewer than two examples of one, fewer than four random ones.
        """
        if not concepts:
            raise BadValue("no concepts", got="{}", needed='{"striped": td, ...}')
        examples = {name: self._activations(data) for name, data in concepts.items()}
        others = self._activations(random)
        n = len(others[0])
        few = {name: len(x[0]) for name, x in examples.items() if len(x[0]) < 2}
        if few or n < 4:
            raise BadValue("too few examples", got=f"{few or n}", needed="2 of each concept, and 4 random ones")
        counts = {name: len(x[0]) for name, x in examples.items()}
        drawn = {name: self._source.permutations(self.runs, n)[:, : min(k, n)] for name, k in counts.items()}
        halves = self._source.permutations(self.runs, n)[:, : n // 2]
        for i, rest in enumerate(others):
            found = [self._vectors(x[i], rest, drawn[name].to(rest.device)) for name, x in examples.items()]
            y = rest.new_zeros(n, self.runs).scatter_(0, halves.T.to(rest.device), 1.0)
            blind = self._solved(Weighed(rest.unsqueeze(0), y, rest.new_ones(n, 1)))
            dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
            self.keep(i, (torch.stack(found).to(dtype), blind.to(dtype)))
        self.concepts = tuple(examples)
        return self

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the derivative along each concept."""
        self.check_fitted()
        return self._explaining.run(tensordict, self._attribute)

    def test(self, data: Data) -> TCAVScores:
        """Score the concepts on rows, such as the examples of one class.

        Args:
            data: a TensorDict that the module reads, or an iterable of them.

        Raises:
            BadValue: before the fit, or without rows.
        """
        self.check_fitted()
        this, count = self._explaining, 0
        totals: list[list[Tensor]] = []
        for td in batches(data):
            pulled = this.pullback(td, width=this.width(td))
            several = pulled.values.ndim > td.batch_dims
            count += td.numel()
            new = []
            for i, gradient in enumerate(pulled.gradients):
                slopes = self._rows(gradient, td, several)  # [N, F] or [N, T, F]
                vectors, random = (v.to(slopes) for v in self.kept(i))
                along = torch.einsum("n...f,crf->n...cr", slopes, vectors)
                blind = torch.einsum("n...f,rf->n...r", slopes, random)
                new.append([(along > 0).double().sum(0), along.double().sum(0), (blind > 0).double().sum(0)])
            both = zip(totals, new, strict=True) if totals else ()
            totals = [[a + b for a, b in zip(*pair, strict=True)] for pair in both] or new
        if not count:
            raise BadValue("no rows", got="0", needed="one or more")
        fields: list[dict[NestedKey, Tensor]] = [{} for _ in range(5)]
        for key, parts in zip(this.pullback.names, totals, strict=True):
            score, size, random = (part / count for part in parts)
            p = welch(score, random.unsqueeze(-2))
            values = (score.mean(-1), size.mean(-1), score.std(-1), random.mean(-1), p)
            for field, value in zip(fields, values, strict=True):
                field[key] = value
        found = [_entries(field) for field in fields]
        concepts = self.concepts or tuple(map(str, range(score.shape[-2])))
        return TCAVScores(found[0], found[1], found[2], found[3], found[4], concepts)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this = self._explaining
        pulled = this.pullback(td, held=held, width=this.width(td))
        several = pulled.values.ndim > td.batch_dims
        found = {}
        for i, (key, gradient) in enumerate(zip(this.attribution_keys, pulled.gradients, strict=True)):
            slopes = gradient.flatten(td.batch_dims + several)
            mean = self.kept(i)[0].mean(1)
            mean = mean / mean.norm(dim=-1, keepdim=True)
            if slopes.shape[-1] != mean.shape[-1]:
                got, needed = f"{slopes.shape[-1]} units", f"{mean.shape[-1]}"
                raise BadValue(f"{key_text(key)} has another width than was fitted", got=got, needed=needed)
            found[key] = slopes @ mean.to(slopes).mT
        return found | this.written(pulled.outputs)

    def _rows(self, gradient: Tensor, td: TensorDictBase, several: bool) -> Tensor:
        kept = [td.numel(), gradient.shape[td.batch_dims]] if several else [td.numel()]
        return gradient.reshape(*kept, math.prod(gradient.shape[td.batch_dims + several :]))

    _dtype = torch.float32

    def _activations(self, data: Data) -> list[Tensor]:
        """For each place the rows ``[N, F]`` of all the data, in float64."""
        pull = self._explaining.pullback
        sites = [w for w in pull.wrt if isinstance(w, Site)]
        model = Hooked(self.module, Capture(*sites)) if sites else self.module
        rows: list[list[Tensor]] = [[] for _ in pull.wrt]
        for td in batches(data):
            with torch.no_grad():
                out = model(td.copy())
            for held, w in zip(rows, pull.wrt, strict=True):
                key = (ACTIVATION, w.key) if isinstance(w, Site) else w
                value = align(out.get(key), td.batch_size, str(w))
                self._dtype = value.dtype
                held.append(finite(value.reshape(td.numel(), math.prod(value.shape[td.batch_dims :])), key).double())
        if not rows[0]:
            raise BadValue("no examples", got="an empty stream", needed="one TensorDict or more")
        return [torch.cat(held) for held in rows]

    def _vectors(self, x: Tensor, rest: Tensor, drawn: Tensor) -> Tensor:
        """The vectors of one concept, ``[runs, F]``: its examples against those drawn for each run."""
        weight = torch.cat([x.new_ones(len(x), self.runs), x.new_zeros(len(rest), self.runs).scatter_(0, drawn.T, 1.0)])
        y = torch.cat([x.new_ones(len(x), 1), x.new_zeros(len(rest), 1)])
        return self._solved(Weighed(torch.cat([x, rest]).unsqueeze(0), y, weight))

    def _solved(self, rows: Weighed) -> Tensor:
        x = rows.x[0]
        basis = torch.linalg.qr(x.T).Q if x.shape[1] > x.shape[0] else None  # the weights lie in the span of the rows
        x = x if basis is None else x @ basis
        weight = logistic([Weighed(x.unsqueeze(0), rows.y, rows.weight)].__iter__, self.ridge)[0][0].flatten(1)
        weight = (weight if basis is None else basis @ weight).T
        return weight / weight.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def welch(a: Tensor, b: Tensor) -> Tensor:
    """The p-value of Welch's two-sided test that two samples, along the last dim, have one mean.

    Samples without any spread differ surely (0) or not at all (1).

    Examples:
        >>> round(float(welch(torch.tensor([1.0, 2, 3, 4]), torch.tensor([3.0, 4, 5, 6]))), 4)
        0.071
    """
    a, b = a.double(), b.double()
    each = [x.var(-1) / x.shape[-1] for x in (a, b)]
    total = each[0] + each[1]
    t = (a.mean(-1) - b.mean(-1)).abs()
    df = total.square() / (each[0].square() / (a.shape[-1] - 1) + each[1].square() / (b.shape[-1] - 1))
    shape = total.expand(torch.broadcast_shapes(t.shape, total.shape)).shape
    flat = [x.expand(shape).reshape(-1).tolist() for x in (t, total, df)]
    found = [_two_sided(*row) for row in zip(*flat, strict=True)]
    return a.new_tensor(found).reshape(shape)


def _two_sided(distance: float, variance: float, df: float) -> float:
    if variance <= 0.0:
        return 0.0 if distance > 0.0 else 1.0
    return _beta(df / (df + distance**2 / variance), df / 2, 0.5)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for i in range(300):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / _away(1.0 + term * d)
        c = _away(1.0 + term / c)
        value *= c * d
        if i and abs(1.0 - c * d) < 1e-14:
            break
    return front * (value - 1.0)


def _away(x: float) -> float:
    return x if abs(x) > 1e-300 else 1e-300


def _entries(field: Mapping[NestedKey, Tensor]) -> TensorDict:
    td = TensorDict({}, batch_size=[])
    for key, value in field.items():
        td.set(key, value)
    return td


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"[{', '.join(map(_text, value))}]"
