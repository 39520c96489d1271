"""Fit a linear model to what a network does when features are taken away: KernelShap and Lime, in closed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target, dispatch_rows
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.perturbation.perturbing import Game, Perturbed, Perturbing
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["Fitted", "KernelShap", "Lime"]

_SWEEPS = 10_000


class Design(NamedTuple):
    """Subsets ``kept [E, G]``, and how the values ``[E, ...]`` there become scores ``[G, ...]``."""

    kept: Tensor
    solve: Callable[[Tensor], Tensor]


class KernelShap(Replaceable, TensorDictModuleBase):
    r"""Shapley values by regression: :math:`\min_\phi \sum_S \mu(S)\,(y(S) - y(\emptyset) - \sum_{g\in S}\phi_g)^2`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    :math:`\mu(S) = (G-1) / (\binom{G}{|S|}\,|S|\,(G-|S|))` for G features, and :math:`\sum_g \phi_g = y(w) -
    y(\emptyset)` holds exactly. Subsets are drawn in proportion to :math:`\mu`; where ``n_samples`` is enough for all
    of them (``2 ** G - 2``) each is taken once and the result is exact. All rows share the subsets: one linear solve
    serves the whole batch and all targets. Where there are fewer subsets than features the scores that differ least
    from each other are taken.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        n_samples: the number of subsets, besides none and all.
        generator: where they come from: the same state, the same answer, whatever the chunks. Default: torch's own.
        options: ``mask``, ``baseline``, ``progress``; see :class:`~tdconcepts.perturbation.Perturbed`; and
            ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: no samples. BadType: what is no generator, mask or baseline.

    Source: Lundberg and Lee, *A unified approach to interpreting model predictions*, 2017 (theorem 2).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x[..., 0] * x[..., 1] + x[..., 2], ["x"], ["y"])
        >>> td = KernelShap(net, Target("y"))(TensorDict(x=torch.tensor([[2.0, 3.0, 4.0]]), batch_size=[1]))
        >>> td["attribution", "x"].round(decimals=4)
        tensor([[3., 3., 4.]])
    """

    tunables = (Tunable("n_samples", 50, 500, 50),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module, self.n_samples, self._source = module, _checked(n_samples), Source(generator)
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys
        self.optional_keys = self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._perturbing.run(tensordict, _Player(self._design))

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)

    def _design(self, count: int) -> Design:
        sizes = torch.arange(1, count, dtype=torch.float64)
        if count == 1:
            kept, weights = torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)
        elif count <= 24 and 2**count - 2 <= self.n_samples:
            bits = torch.arange(count)
            kept = (torch.arange(1, 2**count - 1).unsqueeze(-1) >> bits) & 1 == 1
            each = [(count - 1) / (math.comb(count, k) * k * (count - k)) for k in range(1, count)]
            weights = torch.tensor(each, dtype=torch.float64)[kept.sum(-1) - 1]
        else:
            size = self._source.choices(1 / (sizes * (count - sizes)), self.n_samples).cpu() + 1
            kept = self._source.permutations(self.n_samples, count).cpu() < size.unsqueeze(-1)
            weights = torch.ones(self.n_samples, dtype=torch.float64)
        share = kept.double().mean(-1)
        centred = kept.double() - share.unsqueeze(-1)  # what a sum of zero leaves free
        root = weights.sqrt().unsqueeze(-1)
        matrix = torch.linalg.pinv(root * centred) * root.T

        def solve(values: Tensor) -> Tensor:
            whole = values[1] - values[0]
            rest = values[2:] - values[0] - torch.tensordot(share.to(values).unsqueeze(-1), whole.unsqueeze(0), 1)
            return whole / count + torch.tensordot(matrix.to(values), rest, 1)

        ends = torch.tensor([[False], [True]]).expand(2, count)
        return Design(torch.cat([ends, kept]), solve)


class Fitted(Perturbed, total=False):
    """The options of :class:`Lime`, besides those of every method of forward passes.

    Args:
        penalty: of the coefficients: ``"l2"`` (ridge regression, the default) or ``"l1"`` (the lasso: many are zero).

    Raises:
        BadValue: a penalty of no such kind; and what :class:`~tdconcepts.perturbation.Perturbed` raises.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x[..., 0] + 1e-3 * x[..., 1], ["x"], ["y"])
        >>> options: Fitted = {"penalty": "l1", "mask": torch.tensor([0, 1, 1])}
        >>> explain = Lime(net, Target("y"), generator=torch.Generator().manual_seed(0), **options)
        >>> (explain(TensorDict(x=torch.ones(1, 3), batch_size=[1]))["attribution", "x"] > 0).tolist()
        [[True, False, False]]
    """

    penalty: Literal["l1", "l2"]


class Lime(Replaceable, TensorDictModuleBase):
    r"""The coefficients of a local linear regression: :math:`\min_{\phi, c} \sum_S \pi(S)\,(y(S) - c - \sum_{g \in S}
    \phi_g)^2 + \alpha\|\phi\|^2`.

    | reads | writes |
    |---|---|
    | the entries that the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    Each feature stays with probability 1/2 in a subset S; :math:`\pi(S) =
    \exp(-d^2 / 2\sigma^2)` with the cosine distance :math:`d = 1 - \sqrt{|S| / G}` to the whole row. All rows share the
    subsets, so one linear solve serves the whole batch.

    With ``penalty="l1"`` it is the lasso, :math:`\frac{1}{2 \sum_S \pi(S)} \sum_S \pi(S) (\ldots)^2 + \alpha\|\phi\|_1`
    (as scikit-learn scales it, and so Captum, which measures the distance between the inputs themselves), solved for
    all rows at once by coordinate descent, to rounding.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        n_samples: the number of subsets; the first is the whole row.
        kernel_width: :math:`\sigma`, in units of the cosine distance.
        alpha: the weight of the penalty; 0 for none, then with as many samples as it takes.
        generator: where the subsets come from: the same state, the same answer, whatever the chunks.
        options: ``penalty``; see :class:`Fitted`; and those of :class:`KernelShap`.

    Raises:
        BadValue: no samples, a width that is not positive, a negative penalty, or one of no such kind.
        BadType: what is no generator, mask or baseline.

    Source: Ribeiro et al., *"Why should I trust you?" Explaining the predictions of any classifier*, 2016 (equation 2);
    Friedman et al., *Pathwise coordinate optimization*, 2007.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x @ torch.tensor([1.0, 2.0, 3.0]), ["x"], ["y"])
        >>> explain = Lime(net, Target("y"), alpha=0.0, generator=torch.Generator().manual_seed(0))
        >>> explain(TensorDict(x=torch.ones(1, 3), batch_size=[1]))["attribution", "x"].round(decimals=3)
        tensor([[1., 2., 3.]])
    """

    tunables = (
        Tunable("n_samples", 50, 500, 50),
        Tunable("kernel_width", 0.1, 1.0, 0.05),
        Tunable("alpha", 1e-4, 1.0, 10, log=True),
        Tunable("penalty", choices=("l2", "l1")),
    )

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        n_samples: int = 100,
        kernel_width: float = 0.25,
        alpha: float = 0.01,
        generator: torch.Generator | None = None,
        **options: Unpack[Fitted],
    ) -> None:
        super().__init__()
        self.penalty = options.get("penalty", "l2")
        if self.penalty not in ("l1", "l2"):
            raise BadValue("no such penalty", got=f"penalty={self.penalty!r}", needed='"l1" or "l2"')
        shared: Any = {name: value for name, value in options.items() if name != "penalty"}
        self._perturbing = Perturbing(module, target, wrt, shared)
        if not (isinstance(kernel_width, (int, float)) and 0 < kernel_width < math.inf):
            raise BadValue("not a width", got=f"kernel_width={kernel_width!r}", needed="a finite number > 0")
        if not (isinstance(alpha, (int, float)) and 0 <= alpha < math.inf):
            raise BadValue("not a penalty", got=f"alpha={alpha!r}", needed="a finite number >= 0")
        self.module, self.n_samples, self._source = module, _checked(n_samples), Source(generator)
        self.kernel_width, self.alpha = kernel_width, alpha
        self.in_keys, self.out_keys = self._perturbing.in_keys, self._perturbing.out_keys
        self.optional_keys = self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._perturbing.run(tensordict, _Player(self._design))

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._perturbing.hold(tensordict)

    def _design(self, count: int) -> Design:
        kept = (self._source.uniform(self.n_samples, count) < 0.5).cpu()
        kept[0] = True
        there = kept.double()
        distance = 1 - there.mean(-1).sqrt()
        weights = torch.exp(-0.5 * (distance / self.kernel_width) ** 2).unsqueeze(-1)
        centred = there - (weights * there).sum(0) / weights.sum()
        gram = centred.T @ (weights * centred)
        if self.penalty == "l1":
            share = weights.sum()
            lasso = functools.partial(_lasso, gram / share, (weights * centred).T / share, self.alpha)
            return Design(kept, lasso)
        gram = gram + self.alpha * torch.eye(count, dtype=torch.float64)
        matrix = torch.linalg.pinv(gram, hermitian=True) @ (weights * centred).T
        return Design(kept, lambda values: torch.tensordot(matrix.to(values), values, 1))


def _lasso(gram: Tensor, project: Tensor, alpha: float, values: Tensor) -> Tensor:
    r""":math:`\min_\phi \frac12 \phi^T G \phi - \phi^T P v + \alpha |\phi|_1` for values ``[E, ...]``: ``[G, ...]``.

    One coordinate after the other takes its best value, until none changes; then the ones that are not zero are those
    of a linear system, which also has a derivative.
    """
    shape = values.shape[1:]
    gram, flat = gram.to(values.device), values.reshape(len(values), shape.numel()).double()
    wanted = project.to(values.device) @ flat
    with torch.no_grad():
        found, size = torch.zeros_like(wanted), gram.diagonal().clone()
        size[size == 0] = 1.0  # a feature that is never away has no score
        scale = wanted.abs().amax().clamp(min=1e-300) if wanted.numel() else 1.0
        for _ in range(_SWEEPS):
            before = found.clone()
            for j in range(len(gram)):
                rest = wanted[j] - gram[j] @ found + gram[j, j] * found[j]
                found[j] = torch.nn.functional.softshrink(rest, alpha) / size[j]
            if not found.numel() or (found - before).abs().amax() <= 1e-12 * scale:
                break
        sign = found.sign()
    if values.requires_grad:
        there = sign.T.abs()  # [R, G]
        system = gram * there.unsqueeze(-1) * there.unsqueeze(-2) + torch.diag_embed(1 - there)
        found = torch.linalg.solve(system, there * (wanted - alpha * sign).T).T
    return found.to(values.dtype).reshape(len(gram), *shape)


class _Player:
    """Plays a design, made once for each game and used for all chunks of the batch."""

    def __init__(self, design: Callable[[int], Design]) -> None:
        self.design, self.made = design, dict[object, Design]()

    def __call__(self, game: Game) -> dict[Wrt, Tensor]:
        if game.path not in self.made:
            self.made[game.path] = self.design(game.count)
        kept, solve = self.made[game.path]
        there = kept.to(game.device)
        values = game.coalitions(len(kept), lambda at: there[at])
        return game.spread(solve(values.to(torch.promote_types(values.dtype, torch.float32))))


def _checked(n_samples: object) -> int:
    if type(n_samples) is not int or n_samples < 1:
        raise BadValue("not a number of samples", got=f"n_samples={n_samples!r}", needed="an int >= 1")
    return n_samples
