"""Explanations under noise: their mean (SmoothGrad) and their variance (VarGrad), around any explainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_module, check_td, dispatch_rows
from tdconcepts.hooks.batching import (
    dense,
    expand,
    gather,
    groups,
    joined,
    pieces_of,
    rows_of,
    slices,
    spread,
    tracked,
    widths,
)
from tdconcepts.hooks.calling import check_norms, norms_of
from tdconcepts.hooks.explaining import HELD, Running, check_options, check_running, finite
from tdconcepts.keys import CONVERGENCE_DELTA, NestedKey, as_key, join, key_text
from tdconcepts.tunables import Replaceable, Tunable, constructor

__all__ = ["NoiseTunnel", "SmoothGrad", "SmoothGradSquared", "VarGrad"]


class SmoothGrad(Replaceable, TensorDictModuleBase):
    r"""The mean of an explanation over noisy copies of the input: :math:`\frac1n\sum_i A(x + \sigma\epsilon_i)`.

    | reads | writes |
    |---|---|
    | what the explainer reads; for ``noise=`` a key, ``(noise, *k)`` ``[*B, n, ...]`` | what the explainer writes |

    The entries that are explained get the noise (where only sites are, all floating entries that the explained module
    reads). All draws are rows of one batch, within ``chunk_size``. The index of an ``"argmax"`` target is chosen at the
    clean input. :math:`\sigma` is ``noise_level`` times the range (max - min) of each row of each entry.

    Args:
        explainer: any module that writes attributions.
        noise_level: the size of the noise; 0.1 by default, in units of the row's range.
        n_iter: the number of draws.
        relative: False makes ``noise_level`` the standard deviation itself, in the units of the entry.
        include_clean: take the clean input as the first of the draws.
        noise: where the noise comes from: a ``torch.Generator`` (the same state, the same answer, whatever the chunks),
            the first part of the keys that hold standard-normal draws, or None for torch's own generator.
        options: ``chunk_size``, ``progress``, ``check_finite``; see :class:`~tdconcepts.hooks.explaining.Running`.

    Raises:
        BadValue: a negative level, no draws, or a relative level for rows of one number.
        BadKey: noise that is not there. BadType: integer entries only, so that there is nothing to add noise to.

    Source: Smilkov et al., *SmoothGrad: removing noise by adding noise*, 2017.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> smooth = SmoothGrad(Gradient(net, Target("y", 0)), noise=torch.Generator().manual_seed(0))
        >>> td = smooth(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> torch.allclose(td["attribution", "x"], net.module.weight[0].expand(3, 4))
        True
    """

    tunables = (Tunable("noise_level", 0.0, 0.95, 0.05), Tunable("n_iter", 10, 100, 10))

    def __init__(
        self,
        explainer: TensorDictModuleBase,
        noise_level: float = 0.1,
        n_iter: int = 20,
        *,
        relative: bool = True,
        include_clean: bool = False,
        noise: torch.Generator | NestedKey | None = None,
        **options: Unpack[Running],
    ) -> None:
        super().__init__()
        self.explainer = check_module(explainer, "explainer")
        if not _is_level(noise_level):
            raise BadValue("not a noise level", got=f"noise_level={noise_level!r}", needed="a finite number >= 0")
        if type(n_iter) is not int or n_iter < 1:
            raise BadValue("not a number of draws", got=f"n_iter={n_iter!r}", needed="an int >= 1")
        if not (noise is None or isinstance(noise, (torch.Generator, str, tuple))):
            raise BadType("not a source of noise", got=repr(noise), needed="a torch.Generator, a key, or None")
        explained = getattr(explainer, "module", None)
        also = [key for key in explainer.out_keys if key in getattr(explained, "out_keys", ())]
        if also:
            raise BadValue("an explainer under noise writes no outputs", got=f"outputs {also}", fix="outputs=False")
        self.noise_level, self.n_iter, self.relative = float(noise_level), n_iter, relative
        check_options(options, Running.__annotations__)
        self.include_clean, self._widths, self._norms = include_clean, widths(explainer), norms_of(explainer)
        self.chunk_size, self.progress, self.check_finite = check_running(options)
        self.noise = as_key(noise) if isinstance(noise, (str, tuple)) else noise
        self.out_keys = [key for key in explainer.out_keys if join(key)[0] != CONVERGENCE_DELTA]
        ends = {join(key) for key in self.out_keys}
        self._noisy = [key for key in explainer.in_keys if any(end[1:] == join(key) for end in ends)]
        if not self._noisy:
            self._noisy = [key for key in explainer.in_keys if key in getattr(explained, "in_keys", explainer.in_keys)]
        keyed = [as_key(join(self.noise, key)) for key in self._noisy] if isinstance(self.noise, (str, tuple)) else []
        self.in_keys = [*explainer.in_keys, *keyed]
        self.optional_keys = list(getattr(explainer, "optional_keys", ()))

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict`` under noise."""
        check_td(tensordict)
        check_norms(self._norms, "draws")
        finite(tensordict, self._noisy, self.check_finite)
        keys = [*self.explainer.in_keys, *self.optional_keys]
        inputs = dense(tensordict, keys)
        held = self.hold(inputs) if tensordict.get(HELD) is None else tensordict.get(HELD)
        if held is not None:
            inputs.set(HELD, held)
        scales = self._scales(inputs)
        others = [key for key in (*keys, HELD) if key not in scales]
        rows = rows_of(inputs, self.chunk_size, self._noisy, wide=self._widths)
        most = pieces_of(inputs, self.chunk_size, self._noisy, self.explainer, self._widths)
        pieces = [(index, part, _Moments(self._squares)) for index, part in slices(inputs, most)]
        for group in tracked(groups(self.n_iter, rows, inputs.numel()), self.progress, "draws"):
            noisy = self._noisy_values(tensordict, scales, group)
            for index, part, moments in pieces:
                n, batch = len(group), part.batch_size
                many = expand(part, n, others)
                for key, moved in noisy.items():
                    many.set(key, spread(moved if index is ... else moved[(slice(None), *index)], n, batch))
                many = self.explainer(many)
                for key in self.out_keys:
                    moments.add(key, gather(many.get(key), n, batch))
        for key in self.out_keys:
            found = [self._summary(moments, key) for _, _, moments in pieces]
            tensordict.set(key, joined(found, inputs.batch_size, most))
        return tensordict

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the explained target's ``"argmax"`` chooses here."""
        hold = getattr(self.explainer, "hold", None)
        return None if hold is None else hold(tensordict)

    _squares = False  # whether the variance is needed

    def _summary(self, moments: _Moments, key: NestedKey) -> Tensor:
        return moments.mean(key)

    def _scales(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What the noise level is in units of: the range of each row, or one."""
        scales: dict[NestedKey, Tensor] = {}
        for key in self._noisy:
            value = td.get(key)
            if value is None:
                raise BadKey(f"no entry {key_text(key)} to add noise to", got=f"entries {list(td.keys(True, True))}")
            if not value.is_floating_point():
                continue
            if not self.relative or not value.numel():
                scales[key] = value.new_ones(())
                continue
            row = value.flatten(td.batch_dims) if value.ndim > td.batch_dims else value.unsqueeze(-1)
            if row.shape[-1] == 1 and self.noise_level:
                raise BadValue(
                    f"a row of {key_text(key)} is one number, so it has no range",
                    got=f"shape {list(value.shape)}",
                    needed="a noise level in the units of the entry",
                    fix="relative=False",
                )
            low, high = row.detach().aminmax(dim=-1)
            scales[key] = (high - low).reshape(high.shape + (1,) * (value.ndim - td.batch_dims))
        if not scales:
            raise BadType(
                "there is nothing to add noise to",
                got=f"{', '.join(map(key_text, self._noisy))}, without a floating-point entry among them",
                needed="a floating-point entry",
                fix="make the embedding a stage of its own, and explain the stages after it by its entry",
            )
        return scales

    def _noisy_values(
        self, td: TensorDictBase, scales: Mapping[NestedKey, Tensor], group: range
    ) -> dict[NestedKey, Tensor]:
        """The entries with the noise of the draws in ``group``, ``[n, *B, ...]``, for the whole batch at once."""
        values = {key: td.get(key) for key in scales}
        drawn = self._draw(td, values, group)
        noisy = {
            key: torch.addcmul(value, drawn[key].to(value.device), scales[key], value=self.noise_level)
            for key, value in values.items()
        }
        if self.include_clean and group.start == 0:
            noisy = {key: torch.cat([values[key].unsqueeze(0), each[1:]]) for key, each in noisy.items()}
        return noisy

    def _draw(self, td: TensorDictBase, values: Mapping[NestedKey, Tensor], group: range) -> dict[NestedKey, Tensor]:
        if isinstance(self.noise, torch.Generator):
            shapes = {key: (len(group), *value.shape) for key, value in values.items()}
            home = self.noise.device
            drawn = {key: torch.empty(shapes[key], dtype=v.dtype, device=home) for key, v in values.items()}
            for one in zip(*(many.unbind(0) for many in drawn.values()), strict=True):
                for tensor in one:
                    tensor.normal_(generator=self.noise)
            return drawn
        if self.noise is None:
            return {key: torch.randn_like(v.expand(len(group), *v.shape)) for key, v in values.items()}
        return {key: self._given(td, key, v)[group.start : group.stop] for key, v in values.items()}

    def _given(self, td: TensorDictBase, key: NestedKey, value: Tensor) -> Tensor:
        group = td.get(self.noise)
        given = group.get(key) if isinstance(group, TensorDictBase) else None
        lead = td.batch_dims
        need = (*td.batch_size, self.n_iter, *value.shape[lead:])
        if given is None or given.shape != need:
            what = f"noise for {key_text(key)}"
            raise (BadKey if given is None else BadValue)(
                f"no {what}" if given is None else f"the {what} has another shape",
                got=f"no entry {join(self.noise, key)}" if given is None else f"{list(given.shape)}",
                needed=f"{join(self.noise, key)} of shape {list(need)}",
            )
        return given.movedim(lead, 0).to(value.dtype)


class VarGrad(SmoothGrad):
    r"""The variance of an explanation over noisy copies of the input: :math:`\frac1n\sum_i (A_i - \bar A)^2`.

    | reads | writes |
    |---|---|
    | what the explainer reads; for ``noise=`` a key, ``(noise, *k)`` ``[*B, n, ...]`` | what the explainer writes |

    It is a variance: the population one, zero for a linear model, never negative. Noise and draws are those of
    :class:`SmoothGrad`.

    Args:
        explainer: any module that writes attributions.
        noise_level: the size of the noise; 0.1 by default, in units of the row's range.
        n_iter: the number of draws.
        relative, include_clean, noise: see :class:`SmoothGrad`.
        options: ``chunk_size``, ``progress``, ``check_finite``; see :class:`~tdconcepts.hooks.explaining.Running`.

    Raises:
        BadValue: a negative level, no draws, or a relative level for rows of one number.
        BadKey: noise that is not there. BadType: integer entries only, so that there is nothing to add noise to.

    Source: Adebayo et al., *Local explanation methods for deep neural networks lack sensitivity to parameter values*,
    2018; updated pairwise as in Chan, Golub and LeVeque, 1979.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> td = VarGrad(Gradient(net, Target("y", 0)), n_iter=5)(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> td["attribution", "x"].abs().max().item()
        0.0
    """

    _squares = True

    def _summary(self, moments: _Moments, key: NestedKey) -> Tensor:
        return moments.variance(key)


class SmoothGradSquared(SmoothGrad):
    r"""The mean square of an explanation over noisy copies: :math:`\frac1n\sum_i A(x + \sigma\epsilon_i)^2`.

    | reads | writes |
    |---|---|
    | what the explainer reads; for ``noise=`` a key, ``(noise, *k)`` ``[*B, n, ...]`` | what the explainer writes |

    Noise and draws are those of :class:`SmoothGrad`.

    Args:
        explainer: any module that writes attributions.
        noise_level: the size of the noise; 0.1 by default, in units of the row's range.
        n_iter: the number of draws.
        relative, include_clean, noise: see :class:`SmoothGrad`.
        options: ``chunk_size``, ``progress``, ``check_finite``; see :class:`~tdconcepts.hooks.explaining.Running`.

    Raises:
        BadValue: a negative level, no draws, or a relative level for rows of one number.
        BadKey: noise that is not there. BadType: integer entries only, so that there is nothing to add noise to.

    Source: Hooker et al., *A benchmark for interpretability methods in deep neural networks*, 2019 (section 3).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> td = SmoothGradSquared(Gradient(net, Target("y", 0)))(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> torch.allclose(td["attribution", "x"], net.module.weight[0].square().expand(3, 4))
        True
    """

    _squares = True

    def _summary(self, moments: _Moments, key: NestedKey) -> Tensor:
        return moments.mean(key).square() + moments.variance(key)


@constructor()
def NoiseTunnel(  # noqa: N802 (a constructor, under Captum's name)
    explainer: TensorDictModuleBase,
    kind: Literal["smoothgrad", "smoothgrad_sq", "vargrad"] = "smoothgrad",
    n_iter: int = 20,
    noise_level: float = 0.1,
    **options: Any,
) -> SmoothGrad:
    """An explainer under noise, by Captum's name: :class:`SmoothGrad`, :class:`SmoothGradSquared`, :class:`VarGrad`.

    Captum's noise is absolute: its ``stdevs=1.0`` is ``noise_level=1.0, relative=False``.

    Args:
        explainer: any module that writes attributions.
        kind: the mean, the mean square, or the variance.
        n_iter, noise_level: see :class:`SmoothGrad`.
        options: the other arguments of :class:`SmoothGrad`.

    Raises:
        BadValue: for another kind.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> type(NoiseTunnel(Gradient(net, Target("y", 0)), "vargrad")).__name__
        'VarGrad'
    """
    kinds = {"smoothgrad": SmoothGrad, "smoothgrad_sq": SmoothGradSquared, "vargrad": VarGrad}
    if kind not in kinds:
        raise BadValue("no such kind of noise tunnel", got=repr(kind), needed=f"one of {list(kinds)}")
    return kinds[kind](explainer, noise_level, n_iter, **options)


def _is_level(noise_level: object) -> bool:
    return isinstance(noise_level, (int, float)) and not isinstance(noise_level, bool) and 0 <= noise_level < math.inf


class _Moments:
    """Running mean and variance of each entry, in groups, around the first draw (so equal draws give zero)."""

    def __init__(self, squares: bool) -> None:
        self.squares = squares
        self.state: dict[NestedKey, tuple[int, Tensor, Tensor, Tensor]] = {}

    def add(self, key: NestedKey, group: Tensor) -> None:
        m, known = len(group), self.state.get(key)
        pivot = group[0] if known is None else known[1]
        wide = torch.promote_types(pivot.dtype, torch.float32)
        moved = group.to(wide) - pivot.to(wide)
        mean = moved[0] if m == 1 else moved.mean(0)
        if not self.squares or m == 1 or not moved.numel():
            variance = mean.new_zeros(())
        else:  # two passes: as exact as torch.var_mean, and much faster for few draws of many numbers
            away = moved - mean if moved.requires_grad else moved.sub_(mean)
            variance = away.square().mean(0)
        if known is not None:
            n, _, before, spread = known
            m, share, delta = n + m, m / (n + m), mean - before
            mean = before + share * delta
            if self.squares:
                variance = (1 - share) * spread + share * variance + share * (1 - share) * delta.square()
        self.state[key] = (m, pivot, mean, variance)

    def mean(self, key: NestedKey) -> Tensor:
        _, pivot, mean, _ = self.state[key]
        return (pivot + mean).to(pivot.dtype)

    def variance(self, key: NestedKey) -> Tensor:
        _, pivot, _, variance = self.state[key]
        return variance.to(pivot.dtype).expand_as(pivot).clone() if not variance.ndim else variance.to(pivot.dtype)
