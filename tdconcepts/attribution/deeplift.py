"""DeepLIFT: the difference of each value from its baseline, times what the model makes of it; also for many of them."""

from __future__ import annotations

import functools
from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.attribution.paths import IntegratedGradients, _delta_key
from tdconcepts.attribution.products import choice, product, quotient, unfollowed
from tdconcepts.attribution.rescale import (
    ELEMENTWISE,
    Formula,
    elementwise,
    log_softmax,
    logsumexp,
    max_pool,
    maximum,
    softmax,
)
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Options, Pullback, Site, Target, dispatch_rows
from tdconcepts.hooks.batching import expand, gather, groups, spread
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.leaves import pick
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.hooks.references import Comparison, References
from tdconcepts.keys import BASELINE, NestedKey, join, key_text
from tdconcepts.tunables import Tunable

__all__ = ["DeepLift", "DeepLiftShap"]

OnMissing = Literal["raise", "gradient"]


class _Lifting:
    """What methods that lift have on top of the ends of a path: pull-backs that compare them."""

    module: Any
    _explaining: Any
    _paths: Any
    _written: Any
    _delta: Any
    _ends: Any
    _convergence: Any

    def _lift(self, epsilon: float, on_missing: OnMissing) -> None:
        if not (isinstance(epsilon, (int, float)) and 0 <= epsilon < float("inf")):
            raise BadValue("not an epsilon", got=f"epsilon={epsilon!r}", needed="a finite number >= 0")
        if on_missing not in ("raise", "gradient"):
            raise BadValue("no such choice", got=f"on_missing={on_missing!r}", needed='"raise" or "gradient"')
        self.epsilon, self.on_missing = float(epsilon), on_missing
        refuse = _raise if on_missing == "raise" else _let_go
        self._program = References(_formulas(self.epsilon, on_missing), unfollowed, refuse)
        whole = self._explaining.pullback
        self._paths = [Pullback(self.module, whole.target, list(path.wrt), rules=self._program) for path in self._paths]

    def _along(self, path: Pullback, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, lead = self._explaining, td.batch_dims
        ends, found_starts = self._ends(path, td)
        starts = {w: torch.zeros_like(ends[w]) if start is None else start for w, start in found_starts.items()}
        how = {"create_graph": this.create_graph, "held": held, "width": this.width(td)}
        pulled = self._program.compared(path, td, starts, **how)
        found = {}
        for w, gradient in zip(path.wrt, pulled.gradients, strict=True):
            step = ends[w] - starts[w]
            step = pick(step, w.index, lead) if isinstance(w, Site) else step
            found[w] = gradient * (step.unsqueeze(lead) if gradient.ndim > step.ndim else step)
        results = {self._written[w]: a if this.create_graph else a.detach() for w, a in found.items()}
        if self._delta:
            results[_delta_key(path.wrt)] = self._convergence(path, td, ends, found_starts, found, held)
        return results


class DeepLift(_Lifting, IntegratedGradients):
    r"""DeepLIFT by the rescale rule: :math:`(w - w_0) \cdot m`, where :math:`m` is a gradient in which each operation
    that is not linear has :math:`\Delta y / \Delta x` in the place of its derivative.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |
    | | ``("convergence_delta", *k)`` ``[*B]``, on request |

    What it writes sums to ``y(w) - y(w_0)``, for every operation that it follows: elementwise functions, softmax (as
    :math:`\exp(x - \log\sum e^x)`), max pooling and maxima (all to the larger maximum), products, quotients and matrix
    products of two values that both change (each at the mean of the other, the Shapley value of the two), layer, group
    and RMS norms, ``nn.MultiheadAttention`` and ``scaled_dot_product_attention``, LSTM and GRU. As modules or
    functions, in place or not, as often as the model likes. A row gets what it gets alone.

    Baselines, joint entries, sites, ``"argmax"`` and several targets are as in :class:`IntegratedGradients`.

    Args:
        module: a TensorDictModule; in evaluation mode, if it has dropout or batch norm.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        baseline: see :class:`IntegratedGradients`.
        convergence_delta: also write :math:`\sum_i a_i - (y(w) - y(w_0))`, zero but for rounding.
        epsilon: below this :math:`|\Delta x|` the derivative is taken; it is as well where rounding would decide.
        on_missing: what to do about an operation that it can't follow: ``"raise"``, or take its ``"gradient"``.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: a model that torch.jit has compiled. BadValue: at the call: an operation that it can't follow, or a
            model that takes another way at the baseline; else as :class:`IntegratedGradients`.

    Source: Shrikumar et al., *Learning important features through propagating activation differences*, 2017 (rescale
    rule, section 3.5.1); products as in Lundberg's ``shap``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> td = TensorDict(x=torch.randn(3, 4), batch_size=[3])
        >>> td = DeepLift(TensorDictModule(net, ["x"], ["y"]), Target("y", 0))(td)
        >>> change = net(td["x"]) - net(torch.zeros(4))
        >>> torch.allclose(td["attribution", "x"].sum(-1), change[:, 0], atol=1e-5)
        True
    """

    tunables: tuple[Tunable, ...] = ()

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        baseline: float | NestedKey | None = None,
        convergence_delta: bool = False,
        epsilon: float = 1e-10,
        on_missing: OnMissing = "raise",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            module, target, wrt, n_steps=1, baseline=baseline, convergence_delta=convergence_delta, **options
        )
        self._lift(epsilon, on_missing)


class DeepLiftShap(_Lifting, IntegratedGradients):
    r"""The mean of DeepLIFT over a distribution of baselines: :math:`\frac1M\sum_j (w - w_j) \cdot m(w, w_j)`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on | ``("attribution", *k)`` for each ``k`` in ``wrt`` |
    | | ``("convergence_delta", *k)`` ``[*B]``, on request |

    A row of ``baselines`` is one baseline for all entries together, and all rows that are explained share them. It sums
    to ``y(w)`` less the mean of ``y`` over the baselines.

    Args:
        module, target, wrt: as for :class:`DeepLift`; a site's baselines are its values at the rows.
        baselines: rows of a data set: a TensorDict of batch size [M] with entries that the module reads.
        n_samples: draw so many of the rows, with replacement; default: each row once.
        generator: where the draws come from; default: torch's own.
        convergence_delta: also write how far the sum is from that.
        options: those of every explainer, and ``epsilon`` and ``on_missing`` of :class:`DeepLift`.

    Raises:
        BadType: baselines that are no TensorDict. BadKey: an entry that they lack. BadValue: another shape, no rows.

    Source: Lundberg and Lee, *A unified approach to interpreting model predictions*, 2017 (section 4.2, Deep SHAP).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> rows = TensorDict(x=torch.tensor([[0.0], [2.0]]).expand(2, 4), batch_size=[2])
        >>> explain = DeepLiftShap(net, Target("y", 0), baselines=rows)
        >>> td = explain(TensorDict(x=torch.full((3, 4), 2.0), batch_size=[3]))
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
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
        convergence_delta: bool = False,
        **options: Unpack[_DeepLiftOptions],
    ) -> None:
        given: Any = dict(options)
        epsilon, on_missing = given.pop("epsilon", 1e-10), given.pop("on_missing", "raise")
        super().__init__(module, target, wrt, n_steps=1, convergence_delta=convergence_delta, **given)
        self._lift(epsilon, on_missing)
        if not isinstance(baselines, TensorDictBase):
            fix = "TensorDict(observation=rows, batch_size=[len(rows)])"
            raise BadType("not rows of baselines", got=type(baselines).__name__, needed="a TensorDict", fix=fix)
        if baselines.batch_dims != 1 or not baselines.batch_size.numel():
            got = f"batch size {list(baselines.batch_size)}"
            raise BadValue("not rows of baselines", got=got, needed="batch size [M], M >= 1")
        whole = self._explaining.pullback
        needed = [w for w in whole.wrt if not isinstance(w, Site) and w in module.in_keys]
        have = [key for key in module.in_keys if baselines.get(key) is not None]
        for key in needed if needed else [key for key in module.in_keys if not have]:
            if key not in have:
                got = f"entries {list(baselines.keys(True, True))}"
                raise BadKey(f"no entry {key_text(key)} in the baselines", got=got)
        if n_samples is not None and (type(n_samples) is not int or n_samples < 1):
            raise BadValue("not a number of samples", got=f"n_samples={n_samples!r}", needed="an int >= 1, or None")
        self.baselines, self.n_samples, self._source = baselines.select(*have), n_samples, Source(generator)
        self.optional_keys = []

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        count = len(self.baselines)
        rows = torch.arange(count)
        if self.n_samples is not None:
            rows = self._source.choices(torch.ones(count), self.n_samples)
        return self._explaining.run(tensordict, functools.partial(self._averaged, rows))

    def _averaged(self, rows: Tensor, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, batch = self._explaining, td.batch_size
        td, outputs = this.ran(td)
        held = self.hold(td) if held is None else held
        this.pullback.check_inputs(td, {})
        results: dict[NestedKey, Tensor] = {}
        kinds: dict[NestedKey, torch.dtype] = {}
        for path in self._paths:
            keys = list(dict.fromkeys([*path.reads(td), *path.in_keys]))
            pieces = list(groups(len(rows), this.rows(td, path.in_keys), td.numel()))
            for group in this.tracked(pieces, "baselines"):
                n, some = len(group), rows[group.start : group.stop]
                many = expand(td, n, keys)
                for key in self.baselines.keys(True, True):
                    base = self._row(key, td.get(key), some, td.batch_dims)
                    if base is not None:
                        many.set(join(BASELINE, key), spread(base, n, batch))
                kept = None if held is None else spread(held.expand(n, *held.shape), n, batch)
                for key, value in self._along(path, many, kept).items():
                    part, kinds[key] = gather(value, n, batch), value.dtype
                    part = part.to(torch.promote_types(part.dtype, torch.float32)).sum(0) / len(rows)
                    results[key] = results[key] + part if key in results else part
        return {key: value.to(kinds[key]) for key, value in results.items()} | outputs

    def _row(self, key: NestedKey, end: Tensor | None, some: Tensor, lead: int) -> Tensor | None:
        """Some rows of the baselines of an entry, ``[n, *B, ...]``."""
        if end is None:
            return None
        rows, row = self.baselines.get(key), end.shape[lead:]
        if rows.shape[1:] != row:
            got, needed = f"{list(rows.shape)}", f"[{len(rows)}, *{list(row)}]"
            raise BadValue(f"the baselines of {key_text(key)} have another shape", got=got, needed=needed)
        chosen = rows.to(device=end.device, dtype=end.dtype)[some.to(end.device)]
        return chosen.reshape(len(some), *[1] * lead, *row).expand(len(some), *end.shape)


class _DeepLiftOptions(Options, total=False):
    epsilon: float
    on_missing: OnMissing


def _formulas(epsilon: float, on_missing: OnMissing) -> dict[str, Formula]:
    change = functools.partial(elementwise, epsilon=epsilon)
    chosen = functools.partial(_chosen, on_missing)
    pools = [
        f"{kind}max_pool{n}d{end}" for kind in ("", "adaptive_") for n in (1, 2, 3) for end in ("", "_with_indices")
    ]
    return {
        **dict.fromkeys(ELEMENTWISE, change),
        **dict.fromkeys(pools, max_pool),
        **dict.fromkeys(["max", "amax", "min", "amin"], maximum),
        **dict.fromkeys(["mul", "matmul", "mv", "dot"], product),
        **dict.fromkeys(["where", "masked_fill"], chosen),
        **dict.fromkeys(["div", "rdiv"], quotient),
        "softmax": softmax,
        "log_softmax": log_softmax,
        "logsumexp": logsumexp,
    }


def _chosen(on_missing: OnMissing, call: Comparison) -> Tensor:
    reason = choice(call)
    if reason is not None and on_missing == "raise":
        _raise(call.name, reason)
    return call.output


def _raise(name: str, reason: str) -> None:
    raise BadValue(
        f"DeepLIFT can't follow the operation {name!r}",
        got=reason,
        needed="linear and elementwise functions, softmax, maxima, products, quotients, norms, attention, LSTM, GRU",
        fix='on_missing="gradient" takes its gradient; IntegratedGradients needs nothing but gradients',
    )


def _let_go(name: str, reason: str) -> None:
    """The gradient is taken."""
