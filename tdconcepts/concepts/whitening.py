"""Concept whitening: a latent without correlations, turned so that each concept has an axis of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from tdconcepts.concepts.encoders import one_pair
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_size, as_spec, check_block
from tdconcepts.errors import BadType, BadValue
from tdconcepts.keys import NestedKey

__all__ = ["ConceptWhitening", "cayley_step", "zca"]


class ConceptWhitening(BlockStage):
    r"""Whitens a latent and turns it: column c of the result is the axis of concept c.

    :math:`\hat z = R^T W (z - \mu),\ W = \Sigma^{-1/2}` (ZCA), R orthogonal. In training the mean and covariance
    are those of the batch, with running means kept for evaluation; W comes from Newton's iteration, which can be
    differentiated. :meth:`align` turns R so that rows with a concept are far along its axis:
    :math:`\max_R \sum_c r_c \cdot \bar z_c` over orthogonal R, with :math:`\bar z_c` the mean of the whitened rows that
    have concept c. Numbers of half precision are whitened in single precision, under autocast too.

    =======  =======================  ====================
    reads    ``"latent"``             ``[*B, in_features]``
    writes   ``"whitened"``           ``[*B, in_features]``
    =======  =======================  ====================

    Args:
        in_features: width of the latent, F.
        concepts: what the first C columns mean; none continuous, C at most F.
        iterations: of Newton's method in training; more are nearer to :math:`\Sigma^{-1/2}`.
        eps: added to the variances.
        momentum: of the running mean and covariance.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, more columns than features; in training, for fewer than two rows, and under
            ``torch.vmap``, whose rows are not known together.

    Source: Chen, Bei and Rudin, Concept Whitening for Interpretable Image Recognition, Nature Machine Intelligence
    2020; Huang et al., Iterative Normalization, CVPR 2019 (Newton's iteration).

    Examples:
        >>> z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 4)
        >>> stage = ConceptWhitening(4, ["a"], iterations=12)
        >>> out = stage(latent=z)
        >>> bool((out.T.cov(correction=0) - torch.eye(4)).abs().max() < 1e-2)
        True
    """

    mean: Tensor
    covariance: Tensor
    rotation: Tensor
    directions: Tensor

    def __init__(
        self,
        in_features: int,
        concepts: ConceptSpec | Sequence[str],
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.05,
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        as_size(in_features=in_features, iterations=iterations)
        if not eps >= 0 or not 0 < momentum <= 1:
            got = f"eps={eps!r}, momentum={momentum!r}"
            raise BadValue("not an option", got=got, needed="eps of 0 or more, momentum in (0, 1]")
        in_key, out_key = one_pair(keys or {"latent": "whitened"})
        super().__init__([in_key], [out_key])
        self.concepts, self.in_features = as_spec(concepts), in_features
        if self.concepts.size > in_features or any(run.kind == "continuous" for run in self.concepts.runs):
            got = f"{self.concepts.size} columns, kinds {sorted(set(self.concepts.kinds))}"
            needed = f"{in_features} columns or fewer, binary or categorical"
            raise BadValue("there is not an axis for each concept", got=got, needed=needed)
        self.iterations, self.eps, self.momentum = iterations, float(eps), float(momentum)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("covariance", torch.eye(in_features))
        self.register_buffer("rotation", torch.eye(in_features))
        self.register_buffer("directions", torch.zeros(in_features, self.concepts.size))

    def compute(self, *entries: Tensor) -> Tensor:
        latent = check_block(entries[0], (self.in_features,), self._read[0])
        if torch.is_autocast_enabled(latent.device.type):
            with torch.autocast(latent.device.type, enabled=False):
                return self.compute(latent)
        dtype = torch.promote_types(torch.promote_types(latent.dtype, self.mean.dtype), torch.float32)
        wide, rotation = latent.to(dtype), self.rotation.to(dtype)
        if self.training:
            mean, covariance = self._moments(wide)
            white = (wide - mean) @ zca(covariance, self.eps, self.iterations) @ rotation
        else:
            white = (wide - self.mean.to(dtype)) @ (zca(self.covariance.to(dtype), self.eps) @ rotation)
        return white.to(latent.dtype)

    def _moments(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and covariance of a batch, which the running ones are moved to."""
        rows = latent.reshape(-1, self.in_features)
        if len(rows) < 2:
            needed = "two rows or more; the running means are used after .eval()"
            raise BadValue("whitening in training needs a batch", got=f"{len(rows)} rows", needed=needed)
        if not torch.compiler.is_compiling() and not _levels(rows) <= _levels(self.mean):
            fix = "stage.eval(), or all rows in one batch, without vmap"
            raise BadValue("whitening in training would keep running means of each row", got="torch.vmap", fix=fix)
        mean = rows.mean(0)
        centred = rows - mean
        covariance = centred.mT @ centred / len(rows)
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be loaded into
            self.mean = _plain(torch.lerp(self.mean, mean.to(self.mean), self.momentum))
            self.covariance = _plain(torch.lerp(self.covariance, covariance.to(self.covariance), self.momentum))
        return mean, covariance

    @torch.inference_mode(False)
    @torch.no_grad()
    def align(
        self,
        latent: Tensor,
        labels: Tensor,
        *,
        steps: int = 2,
        momentum: float = 0.0,
        method: Literal["cayley", "exact"] = "cayley",
    ) -> float:
        """Turn the axes towards the concepts, and return the objective: the mean of concept c along axis c, summed.

        Args:
            latent: ``[*B, in_features]``; it is whitened with the running means.
            labels: ``[*B, K]`` or ``[*B, C]``, NaN where there is none.
            steps: of the curvilinear search, each of which keeps R orthogonal and never lowers the objective.
            momentum: how much of the means of former calls is kept; concepts that this batch lacks keep theirs.
            method: ``"cayley"``, the paper's, or ``"exact"``: the optimum in closed form (orthogonal Procrustes).

        Raises:
            BadValue: for another shape, method or momentum. BadType: for a latent that is not float32 or float64.
        """
        if latent.dtype not in (torch.float32, torch.float64):
            raise BadType("aligning needs single or double precision", got=str(latent.dtype), fix="latent.float()")
        if method not in ("cayley", "exact") or not 0 <= momentum < 1:
            got = f"method={method!r}, momentum={momentum!r}"
            raise BadValue("not a way to align", got=got, needed='"cayley" or "exact", momentum in [0, 1)')
        check_block(latent, (self.in_features,), self._read[0])
        like = latent[..., :1].expand(*latent.shape[:-1], self.concepts.size)
        has = (self.concepts.targets(labels, like) > 0.5).reshape(-1, self.concepts.size).to(latent.dtype)
        count = has.sum(0)
        with torch.autocast(latent.device.type, enabled=False):
            rows = latent.reshape(-1, self.in_features) - self.mean.to(latent)
            white = rows @ zca(self.covariance.to(latent), self.eps)
            means = (white.mT @ has) / count.clamp(min=1)
        kept = torch.where(count > 0, momentum, 1.0)
        self.directions = kept.to(self.directions) * self.directions + (1 - kept).to(self.directions) * means.to(
            self.directions
        )
        wanted = torch.zeros_like(self.rotation, dtype=torch.float64)
        wanted[:, : self.concepts.size] = self.directions.double()
        turned = self.rotation.double()
        if method == "exact":
            left, _, right = torch.linalg.svd(wanted)
            turned = left @ right
        else:
            for _ in range(steps):
                turned = cayley_step(turned, wanted)
        self.rotation = turned.to(self.rotation)
        return float((turned * wanted).sum())


def _levels(value: Tensor) -> set[int]:
    """Of which calls of ``torch.vmap`` a tensor is a row."""
    functorch, found = torch._C._functorch, set()
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            found.add(functorch.maybe_get_level(value))
        value = functorch.get_unwrapped(value)
    return found


def _plain(value: Tensor) -> Tensor:
    """What is below the wrappers of ``torch.func.grad``, which can't be copied or pickled."""
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and functorch.is_gradtrackingtensor(value):
        value = functorch.get_unwrapped(value)
    return value


def zca(covariance: Tensor, eps: float = 0.0, iterations: int | None = None) -> Tensor:
    r""":math:`(\Sigma + \epsilon I)^{-1/2}`, symmetric: by eigenvectors, or by Newton's iteration.

    Newton: :math:`P_0 = I,\ P_{k+1} = \frac{1}{2} (3 P_k - P_k^3 \Sigma / \mathrm{tr} \Sigma),\
    W = P / \sqrt{\mathrm{tr} \Sigma}`. It is run in the coupled form (Higham 1997), whose iterates are the same but
    stay stable; as it is written it explodes after some twenty iterations.

    Args:
        covariance: ``[F, F]``.
        eps: added to the diagonal.
        iterations: of Newton's method; None for eigenvectors, whose gradient is not defined where two of them agree.

    Examples:
        >>> zca(torch.diag(torch.tensor([4.0, 0.25]))).diagonal().tolist()
        [0.5, 2.0]
    """
    eye = torch.eye(len(covariance)).to(covariance)
    covariance = covariance + eps * eye
    if iterations is None:
        values, vectors = torch.linalg.eigh(covariance.double())
        return ((vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.mT).to(covariance)
    trace = covariance.diagonal().sum()
    root, p = covariance / trace, eye
    for _ in range(iterations):
        factor = 1.5 * eye - 0.5 * p @ root
        root, p = root @ factor, factor @ p
    return p / trace.sqrt()


def cayley_step(rotation: Tensor, wanted: Tensor, step: float = 1.0) -> Tensor:
    r"""One ascent step on :math:`\langle R, M \rangle` that stays orthogonal, with a step size that is good enough.

    :math:`A = G R^T - R G^T,\ G = -M,\ R(\tau) = (I + \frac{\tau}{2} A)^{-1} (I - \frac{\tau}{2} A) R`; :math:`\tau` is
    doubled or halved until the Armijo and curvature conditions (1e-4, 0.9) hold.

    Args:
        rotation: R, ``[F, F]``.
        wanted: M, ``[F, F]``.
        step: where :math:`\tau` starts.

    Source: Wen and Yin, A feasible method for optimization with orthogonality constraints, 2013; Chen et al. 2020,
    algorithm 2.

    Examples:
        >>> turned = cayley_step(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> bool((turned @ turned.T - torch.eye(2)).abs().max() < 1e-6), (turned[1, 0] > 0.5).item()
        (True, True)
    """
    eye = torch.eye(len(rotation)).to(rotation)
    a = rotation @ wanted.mT - wanted @ rotation.mT
    slope = -0.5 * a.square().sum()  # of minus the objective, at 0
    if not slope < 0:
        return rotation
    here, low, high, best = (rotation * wanted).sum(), 0.0, float("inf"), rotation
    for _ in range(60):
        turned = torch.linalg.solve(eye + step / 2 * a, (eye - step / 2 * a) @ rotation)
        rise = (turned * wanted).sum() - here
        if rise < -1e-4 * step * slope:
            high = step
        else:
            best = turned
            inner = torch.linalg.solve(eye + step / 2 * a, a @ (rotation + turned) / 2)
            if -(inner * -wanted).sum() >= 0.9 * slope:
                break
            low = step
        step = (low + high) / 2 if high < float("inf") else 2 * step
    return best
