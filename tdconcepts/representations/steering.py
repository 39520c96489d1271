"""Steering vectors: directions between two kinds of rows, and the edits that add them or take them out."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Add, Edit, RemoveDirection, Site
from tdconcepts.keys import ACTIVATION, NestedKey, as_key, as_keys, key_text
from tdconcepts.representations.fitting import Probe
from tdconcepts.representations.learned import Learned
from tdconcepts.representations.linear import check_binary
from tdconcepts.representations.logistic import LogisticProbe
from tdconcepts.representations.moments import Moments, merged
from tdconcepts.representations.reading import Data, Reader, batches, features, finite

__all__ = ["SteeringVector"]

Norm = Literal["unit", "activation"]


class SteeringVector(Learned, TensorDictModuleBase):
    r"""A direction for each entry, from rows of two kinds: read by the stage, written by its edits.

    * ``"mean"``: :math:`\mu_1 - \mu_0`, the difference of means;
    * ``"pca"``: the first principal axis of the differences of pairs, on the side of their mean;
    * ``"probe"``: the weight of a :class:`LogisticProbe`, or of the probe that is given.

    ======  ============================  ======================================================
    reads   ``keys``                      ``[*B, F]``; for the fit also the label, or ``negative``
    writes  ``("steering", *key)``        ``[*B]``: where a row lies along the direction, from the mean
    ======  ============================  ======================================================

    Args:
        keys: an entry, or a list of them: ``("activation", "net.2")``.
        label: the entry with the kinds, 0 or 1, ``[*B]``.
        negative: instead of a label, for each of ``keys`` the entry with the other kind, row by row.
        method: see above; a fitted probe of these entries is a method too.
        norm: ``"unit"``: length one; ``"activation"``: the mean length of the rows; a number; None: as far as the two
            means lie apart along it.
        out_key: the first name of what is written.

    Raises:
        BadValue: neither or both of label and negative; at the fit: one kind only, means that are the same.

    Source: Turner et al., *Activation addition*, 2023, and Rimsky et al., *Steering Llama 2*, 2024 (means); Zou et al.,
    *Representation engineering*, 2023 (PCA of differences).

    Examples:
        >>> from tensordict import TensorDict
        >>> x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]])
        >>> td = TensorDict(x=x, y=torch.tensor([0, 0, 1, 1]), batch_size=[4])
        >>> steer = SteeringVector("x", "y", norm=None).fit(td)
        >>> steer.vector(), steer.add(scale=0.5)(torch.zeros(1, 2), None)
        (tensor([4., 0.]), tensor([[2., 0.]]))
    """

    learns: ClassVar[tuple[str, ...]] = ("vector", "mean")

    def __init__(
        self,
        keys: NestedKey | list[NestedKey],
        label: NestedKey | None = None,
        negative: NestedKey | list[NestedKey] | None = None,
        method: Literal["mean", "pca", "probe"] | Probe = "mean",
        norm: Norm | float | None = "unit",
        out_key: NestedKey = "steering",
    ) -> None:
        super().__init__()
        self.about(keys, out_key)
        if (label is None) == (negative is None) and not isinstance(method, Probe):
            raise BadValue("what is compared with what?", got=f"label={label!r}, negative={negative!r}", needed="one")
        self.label = None if label is None else as_key(label)
        self.negative = None if negative is None else as_keys(negative)
        if self.negative is not None and len(self.negative) != len(self.keys):
            got = f"{len(self.keys)} and {len(self.negative)}"
            raise BadValue("the entries don't pair up", got=got, needed="a negative entry for each entry")
        if not isinstance(method, Probe) and method not in ("mean", "pca", "probe"):
            raise BadValue("no such method", got=repr(method), needed='"mean", "pca", "probe" or a fitted probe')
        needs = {"pca": self.negative, "probe": self.label}
        if isinstance(method, str) and method in needs and needs[method] is None:
            fix = "negative=: pairs of rows" if method == "pca" else "label=: the kind of each row"
            raise BadValue(f"method={method!r} needs the other form", got=f"label={label!r}", fix=fix)
        if not (norm is None or norm in ("unit", "activation") or (isinstance(norm, (int, float)) and norm > 0)):
            raise BadValue("not a norm", got=repr(norm), needed='"unit", "activation", a number above 0, or None')
        self.method: str = method if isinstance(method, str) else "given"
        self.norm = norm
        self._probe = (method,) if isinstance(method, Probe) else ()  # not a part of this module

    def fit(self, data: Data, *, mask: NestedKey | None = None) -> Self:
        """Find the directions; returns the stage.

        Args:
            data: a TensorDict ``[*B]``, or an iterable of them.
            mask: with a label: an entry ``[*B]``, True where a row counts.

        Raises:
            BadValue: one kind of rows only, or no difference between them.
        """
        probe = self._probe[0] if self._probe else None
        label = probe.label if isinstance(probe, Probe) and self.label is None else self.label
        if self.method == "probe":
            probe = LogisticProbe(list(self.keys), label).fit(data, mask=mask)  # type: ignore[arg-type]
        found = self._paired(data) if self.negative is not None else self._labelled(data, label, mask)  # type: ignore[arg-type]
        for i, (key, (step, mean, typical, axis)) in enumerate(zip(self.keys, found, strict=True)):
            axis = probe.direction(key).to(step) if probe is not None else axis
            if axis.ndim != 1:
                raise BadValue("a probe of several labels", got=f"{len(axis)} directions", needed="one label, [*B]")
            length = axis.norm()
            if not bool(length > 1e-12 * typical):
                raise BadValue(
                    f"the two kinds of {key_text(key)} are alike", got="no difference", needed="a difference"
                )
            unit = axis / length
            apart = (step @ unit).abs()
            size = {"unit": torch.ones_like(apart), "activation": typical, None: apart}.get(self.norm, self.norm)  # type: ignore[arg-type]
            dtype = torch.promote_types(self._dtype, torch.float32)
            self.keep(i, ((size * unit).to(dtype), mean.to(dtype)))
        return self

    def vector(self, key: NestedKey | None = None) -> Tensor:
        """The direction of an entry ``[F]``, of the length that ``norm`` says."""
        return self.kept(self.place(key))[0].clone()

    def add(self, key: NestedKey | None = None, scale: float = 1.0) -> Add:
        """The edit that adds ``scale`` times the vector: for :func:`~tdconcepts.patch`."""
        return Add(self.vector(key), scale)

    def project_out(self, key: NestedKey | None = None, to_mean: bool = True) -> RemoveDirection:
        """The edit that takes the direction out: the component along it becomes that of the mean row, or zero."""
        vector, mean = self.kept(self.place(key))
        return RemoveDirection(vector, mean if to_mean else None)

    def edits(self, what: Literal["add", "project_out"] = "add", scale: float = 1.0) -> dict[Site | NestedKey, Edit]:
        """The edits of all entries, ready for :func:`~tdconcepts.patch`: a captured activation is edited at its site.

        Examples:
            >>> from tensordict import TensorDict
            >>> td = TensorDict({("activation", "0"): torch.eye(2), "y": torch.tensor([0, 1])}, batch_size=[2])
            >>> list(SteeringVector(("activation", "0"), "y").fit(td).edits())
            [Site('0')]
        """
        if what not in ("add", "project_out"):
            raise BadValue("no such edit", got=repr(what), needed='"add" or "project_out"')
        found: dict[Site | NestedKey, Edit] = {}
        for key in self.keys:
            captured = isinstance(key, tuple) and len(key) == 2 and key[0] == ACTIVATION
            found[Site.parse(key[1]) if captured else key] = (
                self.add(key, scale) if what == "add" else self.project_out(key)
            )
        return found

    def readout(self, x: list[Tensor], kept: list[Tensor]) -> Tensor:
        """Where each row lies along the direction."""
        vector, mean = kept
        return (x[0] - mean) @ (vector / vector.norm())

    _dtype = torch.float32

    def _labelled(
        self, data: Data, label: NestedKey, mask: NestedKey | None
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each entry the difference of means, the mean, the mean length, and the direction."""
        reader = Reader(list(self.keys), label, mask)
        parts: list[Moments] = []
        lengths: list[Tensor] = []
        for td in batches(data):
            rows = reader.rows(td)
            if rows.y.shape[-1] != 1:
                raise BadValue("one direction, one label", got=f"{rows.y.shape[-1]} labels", needed="[*B]")
            check_binary(rows.y)
            self._dtype = td.get(self.keys[0]).dtype
            new = [Moments.of(x, rows.y) for x in rows.x]
            parts = [merged(pair) for pair in zip(parts, new, strict=True)] if parts else new
            far = [x.norm(dim=-1).sum() for x in rows.x]
            lengths = [a + b for a, b in zip(lengths, far, strict=True)] if lengths else far
        found = []
        for m, total in zip(parts, lengths, strict=True):
            share, cross, _ = m.labels
            if m.count == 0 or not 0 < float(share) < 1:
                raise BadValue("there is one kind of rows only", got=f"{m.count} rows", needed="rows of 0 and of 1")
            step = (cross / (m.count * share * (1 - share))).squeeze(-1)
            found.append((step, m.mean, total / m.count, step))
        if not found:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        return found

    def _paired(self, data: Data) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        parts: list[tuple[Moments, Moments, Tensor]] = []
        for td in batches(data):
            self._dtype = td.get(self.keys[0]).dtype if td.get(self.keys[0]) is not None else self._dtype
            new = []
            for key, other in zip(self.keys, self.negative, strict=True):  # type: ignore[arg-type]
                ones, others = (finite(features(td, k), k).double() for k in (key, other))
                if ones.shape != others.shape:
                    got = f"{key_text(key)} {list(ones.shape)}, {key_text(other)} {list(others.shape)}"
                    raise BadValue("the pairs have different widths", got=got, needed="the same")
                length = ones.norm(dim=-1).sum() + others.norm(dim=-1).sum()
                new.append((Moments.of(ones - others), Moments.of(torch.cat([ones, others])), length))
            if parts:
                new = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in zip(parts, new, strict=True)]
            parts = new
        found = []
        for differences, both, total in parts:
            if not both.count:
                raise BadValue("no pairs", got="0 rows", needed="one or more")
            step = axis = differences.mean
            if self.method == "pca":
                second = differences.scatter + differences.count * step.unsqueeze(-1) * step
                axis = torch.linalg.eigh(second).eigenvectors[:, -1]
                axis = torch.where(axis @ step < 0, -axis, axis) if bool(second.trace() > 0) else step
            found.append((step, both.mean, total / both.count, axis))
        if not found:
            raise BadValue("no data", got="an empty stream", needed="one TensorDict or more")
        return found
