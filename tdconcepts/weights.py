"""Other weights for a while: pruning, task vectors and low-rank adapters, on a model that stays as it is.

The parameters are never written. While a context is entered, torch functions that the model calls are given the changed
tensor in place of the parameter, on this thread only. So contexts nest (the inner one changes what the outer one made),
end in any order, and gradients flow to the parameters and to what changes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Self, TypeAlias

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import Hooked, Weights, check_module
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.sites import parameter_paths
from tdconcepts.hooks.swaps import Change, matching

__all__ = ["LoRA", "LowRank", "Masked", "Shifted", "TaskVector", "prune"]

Score: TypeAlias = Callable[[str, Tensor], Tensor] | Mapping[str, Tensor] | Literal["magnitude"]


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """A parameter with zeros where ``mask`` is False.

    Args:
        mask: truth values in the parameter's shape (or what broadcasts to it).

    Examples:
        >>> Masked(torch.tensor([True, False]))(torch.tensor([3.0, 4.0]))
        tensor([3., 0.])
    """

    mask: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.mask,)

    def __call__(self, parameter: Tensor) -> Tensor:
        return torch.where(self.mask.to(parameter.device), parameter, torch.zeros_like(parameter))


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted:
    """A parameter plus ``scale * delta``.

    Args:
        delta: in the parameter's shape.
        scale: how much of it.

    Examples:
        >>> Shifted(torch.ones(2), -0.5)(torch.tensor([3.0, 4.0]))
        tensor([2.5000, 3.5000])
    """

    delta: Tensor
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.delta,)

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter + self.scale * self.delta.to(parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A parameter plus ``scale * left @ right``, in its shape.

    Args:
        left: ``[out, r]``.
        right: ``[r, in]``; for a convolution ``in`` is all but its first dim.
        scale: how much of the product.

    Examples:
        >>> LowRank(torch.ones(2, 1), torch.ones(1, 3))(torch.zeros(2, 3)).sum()
        tensor(6.)
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.left, self.right)

    def __call__(self, parameter: Tensor) -> Tensor:
        delta = self.left.to(parameter) @ self.right.to(parameter)
        return parameter + self.scale * delta.reshape(parameter.shape)


def prune(
    model: TensorDictModuleBase,
    fraction: float,
    *,
    score: Score = "magnitude",
    only: str | Iterable[str] | None = None,
    scope: Literal["global", "each"] = "global",
    dim: int | None = None,
) -> Hooked:
    """A context in which the weights of the lowest score are zero: exactly ``round(fraction * n)`` of them.

    Args:
        model: a TensorDictModule.
        fraction: how much is taken away, in [0, 1].
        score: ``"magnitude"``; or a tensor for each parameter (a mapping by name, or ``score(name, parameter)``), high
            for what is kept. Ties are broken by position: the first goes first.
        only: names of parameters, globs among them; default: all with two dims or more (weights, not biases).
        scope: whether the lowest are looked for among all parameters together, or in each.
        dim: take away whole slices along this dim (0: units of a layer), by the Euclidean norm of their scores.

    Raises:
        BadKey: a name that matches nothing. BadValue: a fraction out of range, scores of another shape or not finite, a
            dim that is not there.

    Source: Han et al., *Learning both weights and connections*, 2015; Li et al., *Pruning filters*, 2017 (slices).

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Linear(4, 2), ["x"], ["y"])
        >>> with prune(net, 0.5) as m:
        ...     kept = m.program.changes["weight"].mask.sum()
        >>> int(kept), int((net.module.weight == 0).sum())
        (4, 0)
    """
    if not isinstance(fraction, (int, float)) or not 0.0 <= fraction <= 1.0:
        raise BadValue("fraction is out of range", got=fraction, needed="a number in [0, 1]")
    if scope not in ("global", "each"):
        raise BadValue("no such scope", got=repr(scope), needed='"global" or "each"')
    table = parameter_paths(check_module(model))
    names = _chosen(table, only)
    scores = {name: _scored(name, table[name].detach(), score, dim) for name in names}
    groups = [names] if scope == "global" else [[name] for name in names]
    changes: dict[str, Change] = {}
    for group in groups:
        flat = torch.cat([scores[name].flatten() for name in group])
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[flat.argsort(stable=True)[: round(fraction * len(flat))]] = False
        for name, part in zip(group, kept.split([scores[name].numel() for name in group]), strict=True):
            mask = part.view(scores[name].shape).to(table[name].device)
            changes[name] = Masked(mask.expand(table[name].shape).clone() if dim is not None else mask)
    return Weights(changes).on(model)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskVector:
    r"""What fine-tuning did: :math:`\tau = \theta_\mathrm{tuned} - \theta_\mathrm{base}`, and arithmetic on it.

    ``a + b``, ``a - b``, ``-a`` (forgetting), ``0.5 * a``; :meth:`merge`; :meth:`on` for a model that has it.

    Args:
        deltas: for each parameter's name the difference.

    Raises:
        BadKey: vectors of different parameters, from arithmetic. BadValue: of different shapes.

    Source: Ilharco et al., *Editing models with task arithmetic*, 2023.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> base, tuned = (TensorDictModule(nn.Linear(2, 1), ["x"], ["y"]) for _ in range(2))
        >>> task = TaskVector.between(base, tuned)
        >>> with task.on(base) as m, torch.no_grad():
        ...     torch.allclose(m(x=torch.ones(3, 2)), tuned(x=torch.ones(3, 2)))
        True
    """

    deltas: Mapping[str, Tensor]

    @classmethod
    def between(cls, base: nn.Module, tuned: nn.Module) -> TaskVector:
        """From ``base`` to ``tuned``: floating-point parameters, by name.

        Raises:
            BadKey: parameters that only one of them has. BadValue: other shapes.
        """
        for model in (base, tuned):
            if not isinstance(model, nn.Module):
                raise BadType("not a model", got=type(model).__name__, needed="an nn.Module")
        ones, others = parameter_paths(base), parameter_paths(tuned)
        _check_same(ones, others)
        return cls({k: (others[k] - p).detach() for k, p in ones.items() if p.is_floating_point()})

    @staticmethod
    def merge(
        vectors: Iterable[TaskVector], how: Literal["sum", "mean", "ties"] = "sum", keep: float = 0.2
    ) -> TaskVector:
        """Several tasks in one vector.

        Args:
            vectors: one or more.
            how: ``"sum"``, ``"mean"``, or ``"ties"``: of each vector the ``keep`` share of largest size, of these for
                each weight the sign that weighs more, and the mean of those with that sign.
            keep: for ``"ties"``, in (0, 1].

        Raises:
            BadValue: no vectors, or a share out of range.

        Source: Yadav et al., *TIES-merging*, 2023.
        """
        vectors = list(vectors)
        if not vectors or how not in ("sum", "mean", "ties") or not 0.0 < keep <= 1.0:
            got = f"{len(vectors)} vectors, how={how!r}, keep={keep}"
            raise BadValue("these can't be merged", got=got, needed='one or more; "sum", "mean" or "ties"; (0, 1]')
        if how != "ties":
            total = vectors[0]
            for vector in vectors[1:]:
                total = total + vector
            return total if how == "sum" else total * (1.0 / len(vectors))
        cut = [vector._trimmed(keep) for vector in vectors]
        for other in cut[1:]:
            _check_same(cut[0].deltas, other.deltas)
        merged = {}
        for name in cut[0].deltas:
            each = torch.stack([vector.deltas[name] for vector in cut])
            agrees = (each.sign() == each.sum(0).sign()) & (each != 0)
            merged[name] = torch.where(agrees, each, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
        return TaskVector(merged)

    def on(self, model: TensorDictModuleBase, scale: float = 1.0) -> Hooked:
        """A context in which ``model`` has ``scale`` times this vector added."""
        return Weights({name: Shifted(delta, scale) for name, delta in self.deltas.items()}).on(model)

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        _check_same(self.deltas, other.deltas)
        return TaskVector({name: delta + other.deltas[name] for name, delta in self.deltas.items()})

    def __mul__(self, scale: float) -> TaskVector:
        return TaskVector({name: delta * scale for name, delta in self.deltas.items()})

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def norm(self) -> float:
        """The Euclidean length over all parameters."""
        return float(torch.stack([delta.double().square().sum() for delta in self.deltas.values()]).sum().sqrt())

    def _trimmed(self, keep: float) -> TaskVector:
        size = torch.cat([delta.abs().flatten() for delta in self.deltas.values()])
        kept = torch.zeros_like(size, dtype=torch.bool)
        kept[size.argsort(descending=True, stable=True)[: max(1, round(keep * len(size)))]] = True
        parts = kept.split([delta.numel() for delta in self.deltas.values()])
        found = zip(self.deltas.items(), parts, strict=True)
        return TaskVector({name: torch.where(part.view(delta.shape), delta, 0.0) for (name, delta), part in found})


class LoRA(nn.Module):
    r"""Low-rank adapters of a model's weights: :math:`W + \frac{\alpha}{r} B A`, trainable, without touching the model.

    ``B`` begins as zeros, so the model begins as it is. Train it inside :meth:`on`; its own parameters are ``A`` and
    ``B``: freeze the model's with ``requires_grad_(False)``.

    Args:
        model: a TensorDictModule; it is only looked at.
        rank: r.
        only: names of parameters, globs among them; default: all with two dims or more. Further dims of a weight
            (kernels) count as inputs.
        alpha: the scale of the product is ``alpha / rank``; default: ``rank``.
        generator: draws ``A``; default: torch's own.

    Raises:
        BadKey: a name that matches nothing. BadValue: a rank below 1, or a parameter of one dim.

    Source: Hu et al., *LoRA*, 2021.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Linear(4, 2), ["x"], ["y"]).requires_grad_(False)
        >>> lora = LoRA(net, rank=1)
        >>> with lora.on(net) as m:
        ...     m(x=torch.ones(3, 4)).sum().backward()
        >>> sorted(name for name, p in lora.named_parameters() if p.grad.abs().sum() > 0), net.module.weight.grad
        (['left.0'], None)
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        only: str | Iterable[str] | None = None,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise BadValue("not a rank", got=repr(rank), needed="1 or more")
        table, source = parameter_paths(model), Source(generator)
        self.names = _chosen(table, only)
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            p = table[name]
            if p.ndim < 2:
                raise BadValue(f"{name!r} has no low rank", got=f"shape {list(p.shape)}", needed="two dims or more")
            wide = p[0].numel()
            self.left.append(nn.Parameter(torch.zeros(len(p), rank, dtype=p.dtype, device=p.device)))
            self.right.append(nn.Parameter((source.normal(rank, wide) / wide**0.5).to(p)))

    @classmethod
    def of(cls, task: TaskVector, model: nn.Module, rank: int) -> Self:
        """The adapters nearest to a task vector, by the singular value decomposition of each difference.

        Source: Eckart and Young 1936. Parameters of one dim are left out.
        """
        names = [name for name, delta in task.deltas.items() if delta.ndim > 1]
        made = cls(model, rank, names, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, left, right in zip(made.names, made.left, made.right, strict=True):
                u, s, vh = torch.linalg.svd(task.deltas[name].flatten(1).double(), full_matrices=False)
                root, k = s[:rank].sqrt(), min(rank, len(s))
                left.zero_()[:, :k] = (u[:, :rank] * root).to(left)
                right.zero_()[:k] = (root.unsqueeze(-1) * vh[:rank]).to(right)
        return made

    def on(self, model: TensorDictModuleBase) -> Hooked:
        """A context in which ``model`` has the adapters; gradients reach them."""
        parts = zip(self.names, self.left, self.right, strict=True)
        return Weights({name: LowRank(left, right, self.scale) for name, left, right in parts}).on(model)

    def task_vector(self, model: nn.Module) -> TaskVector:
        """What the adapters add to the weights of ``model``."""
        table = parameter_paths(model)
        parts = zip(self.names, self.left, self.right, strict=True)
        return TaskVector({n: (self.scale * (a @ b)).detach().reshape(table[n].shape) for n, a, b in parts})


def _chosen(table: Mapping[str, nn.Parameter], only: str | Iterable[str] | None) -> list[str]:
    if only is None:
        names: Iterator[str] = (name for name, parameter in table.items() if parameter.ndim > 1)
    else:
        names = (n for pattern in ([only] if isinstance(only, str) else only) for n in matching(pattern, table))
    once = {table[name]: name for name in reversed(list(dict.fromkeys(names)))}
    if not once:
        raise BadKey("no parameters", got=f"only={only!r}", needed=nearest("weight", table))
    return list(once.values())[::-1]


def _scored(name: str, parameter: Tensor, score: Score, dim: int | None) -> Tensor:
    if callable(score):
        found = score(name, parameter)
    elif isinstance(score, Mapping):
        if name not in score:
            raise BadKey(f"no score for {name!r}", got=list(score), needed=name)
        found = score[name]
    elif score == "magnitude":
        found = parameter.abs()
    else:
        raise BadValue("no such score", got=repr(score), needed='"magnitude", a mapping or score(name, parameter)')
    if not isinstance(found, Tensor) or found.shape != parameter.shape or not bool(torch.isfinite(found).all()):
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BadValue(f"no score for {name!r}", got=got, needed=f"finite numbers of shape {list(parameter.shape)}")
    if dim is None:
        return found.detach().float().cpu() if found.dtype != torch.float64 else found.detach().cpu()
    if not -parameter.ndim <= dim < parameter.ndim:
        raise BadValue(f"{name!r} has no such dim", got=f"dim={dim}", needed=f"below {parameter.ndim}")
    others = [d for d in range(parameter.ndim) if d != dim % parameter.ndim]
    square = found.detach().double().cpu().square()
    return (square.sum(others, keepdim=True) if others else square).sqrt()


def _check_same(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    apart = sorted(set(ones) ^ set(others))
    if apart:
        raise BadKey("the parameters are not the same", got=f"only one has {apart[:4]}", needed="the same names")
    for name, one in ones.items():
        if one.shape != others[name].shape:
            got = f"{name!r}: {list(one.shape)} and {list(others[name].shape)}"
            raise BadValue("the parameters have different shapes", got=got, needed="the same")
