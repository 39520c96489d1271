"""Integrated gradients: the gradient averaged along a straight path from a baseline."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, Unpack

import numpy
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Options, Site, Target, dispatch_rows
from tdconcepts.hooks.batching import expand, gather, groups, spread
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.hooks.leaves import pick
from tdconcepts.hooks.pullback import Pullback, Wrt
from tdconcepts.hooks.sums import PathSum, traced
from tdconcepts.keys import BASELINE, CONVERGENCE_DELTA, NestedKey, as_key, join, key_text
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["IntegratedGradients", "Quadrature", "quadrature"]

Quadrature: TypeAlias = Literal["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
_METHODS = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")


def quadrature(method: Quadrature, n_steps: int) -> tuple[list[float], list[float]]:
    """Points in [0, 1] and weights that sum to one, for any method and number of steps.

    Args:
        method: ``"gausslegendre"`` (exact for polynomials of degree ``2 n - 1``), ``"riemann_left"`` (at ``i / n``),
            ``"riemann_right"`` (``(i + 1) / n``), ``"riemann_middle"`` (``(i + 1/2) / n``), or ``"riemann_trapezoid"``
            (``i / (n - 1)``, the ends at half weight; one step is the middle).
        n_steps: how many points.

    Raises:
        BadValue: for another method or no step.

    Examples:
        >>> quadrature("riemann_trapezoid", 3)
        ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    if method not in _METHODS:
        known = "one of " + ", ".join(map(repr, _METHODS))
        raise BadValue("no such quadrature", got=f"method={method!r}", needed=known)
    if type(n_steps) is not int or n_steps < 1:
        raise BadValue("not a number of steps", got=f"n_steps={n_steps!r}", needed="an int >= 1")
    n = n_steps
    if method == "gausslegendre":
        points, weights = numpy.polynomial.legendre.leggauss(n)
        return (0.5 * (points + 1)).tolist(), (0.5 * weights).tolist()
    if method == "riemann_trapezoid" and n > 1:
        return [i / (n - 1) for i in range(n)], [(0.5 if i in (0, n - 1) else 1.0) / (n - 1) for i in range(n)]
    shift = {"riemann_left": 0.0, "riemann_right": 1.0}.get(method, 0.5)
    return [(i + shift) / n for i in range(n)], [1 / n] * n


class IntegratedGradients(Replaceable, TensorDictModuleBase):
    r"""The gradient, integrated from a baseline: :math:`(w - w_0)\int_0^1 \partial y(w_\alpha) / \partial w\, d\alpha`.

    The path is straight: :math:`w_\alpha = w_0 + \alpha (w - w_0)`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |
    | | ``("convergence_delta", *k)`` ``[*B]``, on request |

    Entries are moved together, as one input (their delta is one number, under ``("convergence_delta", "joint")`` where
    there are several); each site, and each entry between stages, is a path of its own, from ``("baseline", *k)`` or
    else from its value at the baseline of the inputs. ``"argmax"`` is chosen once, at the input. With several targets
    one more dim of size T follows the batch.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        n_steps: points on the path.
        method: see :func:`quadrature`; the weights sum to one.
        baseline: where the path begins: a number; the first part of the keys that hold it (then it must be there); or
            None (default): ``("baseline", *k)`` where the TensorDict has it, else zero. It broadcasts to ``k``, row by
            row. Integer entries keep their values, unless ``("baseline", *k)`` has others.
        convergence_delta: also write :math:`\sum_i a_i - (y(w) - y(w_0))`, zero for an exact integral.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: no such method, no steps, a baseline of another shape, a site with one value along the whole path.
        BadType: a baseline that is no number and no key. BadKey: a baseline that is not there.

    Source: Sundararajan et al., *Axiomatic attribution for deep networks*, 2017 (equation 1; proposition 1).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> net = TensorDictModule(net, ["x"], ["y"])
        >>> explain = IntegratedGradients(net, Target("y", 0), n_steps=20, convergence_delta=True)
        >>> td = explain(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> td["attribution", "x"].shape, bool(td["convergence_delta", "x"].abs().max() < 1e-4)
        (torch.Size([3, 4]), True)
    """

    tunables: tuple[Tunable, ...] = (Tunable("n_steps", 10, 100, 10), Tunable("method", choices=_METHODS))

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        n_steps: int = 50,
        method: Quadrature = "gausslegendre",
        baseline: float | NestedKey | None = None,
        convergence_delta: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._delta = bool(convergence_delta)
        self._explaining = this = Explaining(module, target, wrt, options, extra=self._delta_keys)
        self.module = module
        self.n_steps, self.method = n_steps, method
        self._rule = quadrature(method, n_steps)
        self._rules: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self.baseline = _checked(baseline)
        whole = this.pullback
        self._paths = [Pullback(module, target, list(group)) for group in self._groups(whole)]
        self._baseline_at = BASELINE if self.baseline is None or isinstance(self.baseline, float) else self.baseline
        at = [as_key(join(self._baseline_at, key)) for key in dict.fromkeys([*whole.names, *module.in_keys])]
        needs = at[: len(whole.names)] if self.baseline is self._baseline_at else []
        self.optional_keys = [key for key in at if key not in needs]  # read where they are there
        self._written = dict(zip(whole.wrt, this.attribution_keys, strict=True))
        self.in_keys, self.out_keys = [*this.in_keys, *needs], this.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._paths[0].hold(tensordict)  # which runs no more of the module than the target needs

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        td, outputs = self._explaining.ran(td)
        held = self.hold(td) if held is None else held
        results: dict[NestedKey, Tensor] = {}
        for path in self._paths:
            results |= self._along(path, td, held)
        return results | outputs

    def _along(self, path: Pullback, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        """One path: the points on it as rows of one batch, within the chunk, and their weighted sum."""
        this, lead = self._explaining, td.batch_dims
        ends, starts = self._ends(path, td)
        steps = {w: ends[w] if start is None else ends[w] - start for w, start in starts.items()}
        rows = this.rows(td, path.in_keys, ends.values(), kept=1 + isinstance(path.target.select, (list, range, slice)))
        behind = not (path.is_inner or this.create_graph or traced())
        total = PathSum(self.module, [ends[w].shape for w in path.wrt], rows) if behind else None
        sums: list[Tensor] = []
        pieces = groups(self.n_steps, rows, td.numel())
        width = this.width(td, len(pieces[0]))  # for the last piece too, which may be smaller
        for group in this.tracked(pieces, "path"):
            parts = self._some(path, td, slice(group.start, group.stop), starts, steps, held, total, width)
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        totals = dict(zip(path.wrt, sums if total is None else total.result(lead), strict=True))
        steps = {w: pick(step, w.index, lead) if isinstance(w, Site) else step for w, step in steps.items()}
        several = any(totals[w].ndim > steps[w].ndim for w in path.wrt)
        found = {
            w: (total * (steps[w].unsqueeze(lead) if several else steps[w])).to(steps[w].dtype)
            for w, total in totals.items()
        }
        results = {self._written[w]: a if this.create_graph else a.detach() for w, a in found.items()}
        if self._delta:
            results[_delta_key(path.wrt)] = self._convergence(path, td, ends, starts, found, held)
        return results

    def _some(
        self,
        path: Pullback,
        td: TensorDictBase,
        some: slice,
        starts: dict[Wrt, Tensor | None],
        steps: dict[Wrt, Tensor],
        held: Tensor | None,
        total: PathSum | None,
        width: int,
    ) -> list[Tensor]:
        """What some points of the path add to the sums: given back, or added to ``total``. Nothing else remains."""
        n, batch = some.stop - some.start, td.batch_size
        many = expand(td, n, [key for key in path.reads(td) if key not in path.wrt])
        points = {w: spread(self._points(starts[w], steps[w], some), n, batch) for w in path.wrt}
        kept = None if held is None else spread(held.expand(n, *held.shape), n, batch)
        if total is not None:
            total.of(lambda dtype, device: _cut(self._rule_as(dtype, device)[1], some))
        pulled = path(many, points, create_graph=self._explaining.create_graph, held=kept, width=width, onto=total)
        parts = []
        for gradient in pulled.gradients:
            weights = _cut(self._rule_as(gradient.dtype, gradient.device)[1], some)
            parts.append(torch.tensordot(weights, gather(gradient, n, batch).to(weights.dtype), 1))
        return parts

    def _rule_as(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The points as tensors of a dtype, and the weights in float32 at least."""
        found = self._rules.get((dtype, device))
        if found is None:
            if torch.compiler.is_compiling():
                return _as_tensors(self._rule, dtype, device)
            with torch.inference_mode(False):  # what is kept must serve a later call outside too
                found = self._rules[dtype, device] = _as_tensors(self._rule, dtype, device)
        return found

    def _points(self, start: Tensor | None, step: Tensor, some: slice) -> Tensor:
        alphas = _cut(self._rule_as(step.dtype, step.device)[0], some)
        alphas = alphas.view(-1, *[1] * step.ndim)
        return alphas * step if start is None else torch.addcmul(start, alphas, step)

    def _convergence(
        self,
        path: Pullback,
        td: TensorDictBase,
        ends: dict[Wrt, Tensor],
        starts: dict[Wrt, Tensor | None],
        found: dict[Wrt, Tensor],
        held: Tensor | None,
    ) -> Tensor:
        after, _ = path.evaluate(td, ends, held)
        zeros = {w: torch.zeros_like(ends[w]) if start is None else start for w, start in starts.items()}
        before, _ = path.evaluate(td, zeros, held)
        total = sum(a.flatten(after.ndim).sum(-1) if a.ndim > after.ndim else a for a in found.values())
        return (total - (after - before)).detach()

    def _ends(self, path: Pullback, td: TensorDictBase) -> tuple[dict[Wrt, Tensor], dict[Wrt, Tensor | None]]:
        """Where the path ends and where it starts (None for zero), for each of its *wrt*."""
        if not path.is_inner:
            ends: dict[Wrt, Tensor] = {w: td.get(w) for w in path.wrt}
            path.check_inputs(td, {})
            return ends, {w: self._baseline(td, w, end) for w, end in ends.items()}
        (w,) = path.wrt
        _, ends = path.evaluate(td, create_graph=self._explaining.create_graph)
        given = None if isinstance(self.baseline, float) else self._given_baseline(td, w)
        if given is not None:
            return ends, {w: _fit(given, ends[w], _name(w))}
        base, unmoved = self._at_baseline(td, path)
        starts = path.evaluate(base, create_graph=self._explaining.create_graph)[1]
        if unmoved and not torch.compiler.is_compiling() and ends[w].numel() and torch.equal(starts[w], ends[w]):
            raise BadValue(
                f"{key_text(_name(w))} has one value along the whole path",
                got=f"integer inputs {unmoved}, which stay as they are",
                needed="a baseline",
                fix=f"td[{join(BASELINE, _name(w))}], its value there, or td[{join(BASELINE, unmoved[0])}]",
            )
        return ends, dict(starts)

    def _at_baseline(self, td: TensorDictBase, path: Pullback) -> tuple[TensorDictBase, list[NestedKey]]:
        """What ``path`` reads, with the inputs at their baseline; and the integer inputs that stay as they are."""
        base, unmoved = td.select(*path.in_keys, strict=False), []
        for key in self.module.in_keys:
            value = base.get(key)
            if not isinstance(value, Tensor):
                continue
            if value.is_floating_point():
                start = self._baseline(td, key, value)
                base.set(key, torch.zeros_like(value) if start is None else start)
            elif (given := self._given_baseline(td, key)) is not None:
                base.set(key, _fit(given, value, key))
            else:
                unmoved.append(key)
        return base, unmoved

    def _baseline(self, td: TensorDictBase, w: Wrt, end: Tensor) -> Tensor | None:
        if isinstance(self.baseline, float):
            return torch.full_like(end, self.baseline) if self.baseline else None
        given = self._given_baseline(td, w)
        if given is not None:
            return _fit(given, end, _name(w))
        if self.baseline is not None and w in self._explaining.pullback.wrt:
            raise BadKey(f"no baseline for {_name(w)!r}", got=f"no entry {key_text(join(self.baseline, _name(w)))}")
        return None

    def _given_baseline(self, td: TensorDictBase, w: Wrt) -> Tensor | None:
        held = td.get(self._baseline_at)  # in two steps: a missing nested key is slow
        if isinstance(held, Tensor):
            raise BadKey(
                f"{key_text(self._baseline_at)} is an entry, not a group of baselines",
                got=f"shape {list(held.shape)}",
                needed=key_text(join(self._baseline_at, _name(w))),
                fix='baseline=0.0, or baseline="another group"',
            )
        return None if held is None else held.get(_name(w))

    def _delta_keys(self, this: Explaining) -> list[NestedKey]:
        return [_delta_key(group) for group in self._groups(this.pullback)] if self._delta else []

    def _groups(self, whole: Pullback) -> list[tuple[Wrt, ...]]:
        """The paths: entries that the module reads together, every other place for itself."""
        entries = tuple(w for w in whole.wrt if not isinstance(w, Site) and w in whole.module.in_keys)
        return ([entries] if entries else []) + [(w,) for w in whole.wrt if w not in entries]


def _as_tensors(
    rule: tuple[list[float], list[float]], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    points, weights = rule
    wide = torch.promote_types(dtype, torch.float32)
    return torch.tensor(points, dtype=dtype, device=device), torch.tensor(weights, dtype=wide, device=device)


def _cut(values: Tensor, some: slice) -> Tensor:
    return values if some.stop - some.start == len(values) else values[some]  # most paths are one piece


def _name(w: Wrt) -> NestedKey:
    return w.key if isinstance(w, Site) else w


def _delta_key(group: tuple[Wrt, ...]) -> NestedKey:
    return join(CONVERGENCE_DELTA, _name(group[0]) if len(group) == 1 else "joint")


def _checked(baseline: object) -> NestedKey | float | None:
    if baseline is None:
        return None
    if isinstance(baseline, (str, tuple)):
        return as_key(baseline)
    if isinstance(baseline, (int, float)) and not isinstance(baseline, bool) and math.isfinite(baseline):
        return float(baseline)
    raise BadType(
        "not a baseline",
        got=repr(baseline) if isinstance(baseline, float) else f"a {type(baseline).__name__}",
        needed="a finite number, the first part of the keys that hold it, or None",
        fix='td["baseline", "observation"] = ..., a value for each row, and baseline=None',
    )


def _fit(given: Tensor, end: Tensor, name: NestedKey) -> Tensor:
    """A baseline ``[*B, ...]`` in the shape of ``end``: its dims are the first ones, as an entry's are the batch."""
    try:
        rows = given.reshape(*given.shape, *[1] * (end.ndim - given.ndim))
        return rows.to(dtype=end.dtype, device=end.device).expand(end.shape)
    except RuntimeError:
        raise BadValue(
            f"the baseline of {key_text(name)} has another shape",
            got=f"{list(given.shape)}",
            needed=f"a shape that broadcasts to {list(end.shape)}, row by row",
        ) from None
