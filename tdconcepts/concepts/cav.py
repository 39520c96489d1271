"""Concept activation vectors: a linear classifier for each concept on a latent, all fitted in one batched solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tdconcepts.concepts.encoders import one_pair
from tdconcepts.concepts.solve import known_labels, linear_fit
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_size, as_spec, check_block
from tdconcepts.errors import BadType, BadValue
from tdconcepts.keys import NestedKey

__all__ = ["CavFit", "ConceptActivationVectors"]


class CavFit(NamedTuple):
    """How a fit went.

    Args:
        score: ``[C]``, the accuracy on the rows that were fitted; R^2 for a continuous column.
        iterations: of the slowest column.
        gradient: the largest entry of the gradient of the mean loss that was left, with the mean of each feature taken
            off.

    Examples:
        >>> z = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> fit = ConceptActivationVectors(1, ["positive"]).fit(z, z > 0)
        >>> fit.score.tolist(), fit.gradient < 1e-4
        ([1.0], True)
    """

    score: Tensor
    iterations: int
    gradient: float


class ConceptActivationVectors(BlockStage):
    r"""Reads concepts off a latent by fitted hyperplanes: :math:`\ell_c = w_c \cdot z + b_c`.

    :meth:`fit` solves :math:`\min \sum_i m_{ic} \log(1 + e^{-y_{ic} \ell_c(z_i)}) + \frac{\lambda}{2} \|w_c\|^2` for
    all columns at once (y is +1 or -1, m is 0 where the label is missing); continuous columns are fitted by least
    squares instead. A column of a categorical concept is its state against the others. ``vectors`` are the concept
    activation vectors, :math:`w_c / \|w_c\|`. Where all weights of a column are 0 there is no hyperplane: its vector
    and its distances are 0.

    =======  =======================  ====================
    reads    ``"latent"``             ``[*B, in_features]``
    writes   ``"concepts_logits"``    ``[*B, C]``
    =======  =======================  ====================

    Args:
        in_features: width of the latent.
        concepts: what the columns mean: a spec, or the names of binary concepts.
        distance: whether the signed distance to the hyperplane is written, in place of the logit.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, a latent of another width, and when it is run before it is fitted.

    Source: Kim et al., Interpretability Beyond Feature Attribution (TCAV), ICML 2018, section 3.1.

    Examples:
        >>> z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> cavs = ConceptActivationVectors(4, ["first", "sum"])
        >>> fit = cavs.fit(z, torch.stack([z[:, 0] > 0, z.sum(1) > 0], 1))
        >>> bool(fit.score.min() > 0.95), cavs.vectors[0].argmax().item()
        (True, 0)
    """

    weight: Tensor
    bias: Tensor
    fitted: Tensor

    def __init__(
        self,
        in_features: int,
        concepts: ConceptSpec | Sequence[str],
        distance: bool = False,
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        as_size(in_features=in_features)
        in_key, out_key = one_pair(keys or {"latent": "concepts_logits"})
        super().__init__([in_key], [out_key])
        self.concepts, self.in_features, self.distance = as_spec(concepts), in_features, distance
        self.register_buffer("weight", torch.zeros(self.concepts.size, in_features))
        self.register_buffer("bias", torch.zeros(self.concepts.size))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def vectors(self) -> Tensor:
        """The concept activation vectors, ``[C, in_features]``, each of length one (zeros where the weights are)."""
        self._check_fitted()
        return self.weight / self._lengths().unsqueeze(-1)

    def fit(
        self,
        latent: Tensor,
        labels: Tensor,
        *,
        ridge: float = 1.0,
        solver: Literal["logistic", "ridge"] = "logistic",
        iterations: int = 200,
        tolerance: float = 1e-4,
    ) -> CavFit:
        """Fit every column, and say how it went.

        Args:
            latent: ``[*B, in_features]``.
            labels: ``[*B, K]`` or ``[*B, C]``, NaN where there is none; see :meth:`ConceptSpec.targets`.
            ridge: :math:`\\lambda`, scikit-learn's ``1 / C``; a finite number of 0 or more.
            solver: ``"logistic"``, or ``"ridge"``: least squares on labels of -1 and 1, in closed form where no label
                is missing.
            iterations: at most, 1 or more.
            tolerance: on the largest entry of the gradient of the mean loss, as scikit-learn's ``tol`` for features
                with mean 0.

        Raises:
            BadValue: for another shape, other options, numbers that are not finite, no rows, and a column that is
                always true or always false, with its name.
            BadType: for a latent that is not float32 or float64.
        """
        if latent.dtype not in (torch.float32, torch.float64):
            raise BadType("a fit needs single or double precision", got=str(latent.dtype), fix="latent.float()")
        check_block(latent, (self.in_features,), self._read[0])
        if solver not in ("logistic", "ridge"):
            raise BadValue("not a way to fit", got=f"solver={solver!r}", needed='"logistic" or "ridge"')
        with torch.no_grad(), torch.autocast(latent.device.type, enabled=False):
            like = latent[..., :1].expand(*latent.shape[:-1], self.concepts.size)
            targets = self.concepts.targets(labels, like).reshape(-1, self.concepts.size)
            rows = latent.reshape(-1, self.in_features)
            if not len(rows) or not (bool(rows.sum().isfinite()) or bool(rows.isfinite().all())):  # the sum is fast
                raise BadValue("not a latent to fit", got=f"{len(rows)} rows, or NaN", needed="finite numbers")
            self._check_classes(targets)
            weight = rows.new_zeros(self.concepts.size, self.in_features)
            bias, count, left = rows.new_zeros(self.concepts.size), 0, 0.0
            for loss, columns in self._by_loss(solver).items():
                wanted = targets if len(columns) == self.concepts.size else targets[:, columns]
                if loss == "squares":
                    wanted = torch.where(self._continuous()[columns], wanted, 2 * wanted - 1)
                found = linear_fit(rows, wanted, ridge, loss, iterations, tolerance)
                weight[columns], bias[columns] = found.weight, found.bias
                count, left = max(count, found.iterations), max(left, found.gradient)
            score = self._score(torch.nn.functional.linear(rows, weight, bias), targets)
        with torch.inference_mode(False):  # what is made in inference mode could not be loaded into or learnt through
            self.weight = torch.empty_like(self.weight).copy_(weight)
            self.bias = torch.empty_like(self.bias).copy_(bias)
            self.fitted = torch.ones_like(self.fitted)
        return CavFit(score, count, left)

    def compute(self, *entries: Tensor) -> Tensor:
        latent = check_block(entries[0], (self.in_features,), self._read[0])
        self._check_fitted()
        logits = torch.nn.functional.linear(latent, self.weight, self.bias)
        return logits / self._lengths() if self.distance else logits

    def _lengths(self) -> Tensor:
        """The length of each column's weights, ``[C]``; inf for 0, so that what is divided by it is 0."""
        length = self.weight.norm(dim=-1)
        return length.masked_fill(length == 0, torch.inf)

    def _check_fitted(self) -> None:
        if not torch.compiler.is_compiling() and not bool(self.fitted):
            raise BadValue("these vectors are not fitted", got="no fit", fix="cavs.fit(latent, labels)")

    def _continuous(self) -> Tensor:
        """Which columns belong to continuous concepts, ``[C]``."""
        kinds = [kind == "continuous" for kind, n in self._kinds() for _ in range(n)]
        return torch.tensor(kinds, device=self.weight.device)

    def _kinds(self) -> list[tuple[str, int]]:
        return list(zip(self.concepts.kinds, self.concepts.cardinalities, strict=True))

    def _by_loss(self, solver: str) -> dict[Literal["logistic", "squares"], Tensor]:
        """The columns that each loss fits."""
        squares = self._continuous() if solver == "logistic" else torch.ones(self.concepts.size, dtype=torch.bool)
        parts: dict[Literal["logistic", "squares"], Tensor] = {"logistic": ~squares, "squares": squares}
        return {loss: columns.nonzero().flatten() for loss, columns in parts.items() if bool(columns.any())}

    def _check_classes(self, targets: Tensor) -> None:
        names = [
            name for name, n in zip(self.concepts.names, self.concepts.cardinalities, strict=True) for _ in range(n)
        ]
        known = known_labels(targets)
        low = (targets if known is None else targets.masked_fill(~known, torch.inf)).amin(0)
        high = (targets if known is None else targets.masked_fill(~known, -torch.inf)).amax(0)
        wild = (low.isinf() | high.isinf()).logical_and_(low <= high).nonzero().flatten().tolist()
        if wild:
            raise BadValue("a label is not finite", got=f"inf for {names[wild[0]]!r}", needed="finite numbers, or NaN")
        same = (low >= high).nonzero().flatten().tolist()
        if same:
            count = int((~targets[:, same[0]].isnan()).sum())
            got = f"{names[same[0]]!r}, {count} labels that are all alike"
            raise BadValue("a column does not vary", got=got, needed="two different labels or more in each column")

    def _score(self, found: Tensor, targets: Tensor) -> Tensor:
        hit, known = (found > 0) == (targets > 0.5), known_labels(targets)
        if known is None:
            known, count = torch.ones_like(hit), torch.tensor(len(hit), device=hit.device)
        else:
            hit, targets, count = hit & known, targets.masked_fill(~known, 0), known.sum(0)
        hits = hit.sum(0) / count
        if "continuous" not in self.concepts.kinds:
            return hits
        residual = ((found - targets).square() * known).sum(0)
        spread = ((targets - targets.sum(0) / count).square() * known).sum(0)
        return torch.where(self._continuous(), 1 - residual / spread, hits)
