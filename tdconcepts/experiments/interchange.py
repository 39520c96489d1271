"""Interchange interventions: does a part of the model hold the variable that a causal model says it holds?"""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments.patching import Patching, Split
from tdconcepts.experiments.table import Experiments, Where, each
from tdconcepts.hooks import Edit, Replace, Target, dispatch_rows
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Interchange", "ReplaceWithin", "interchange"]

AGREEMENT = ("interchange", "agreement")


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceWithin(Edit):
    r"""Replace what an activation says in a subspace, and keep the rest: :math:`x + (s - x) Q Q^\top`.

    Args:
        value: the key of the entry with s, of the activation's shape.
        basis: Q, with orthonormal columns, ``[F, k]``.

    Raises:
        BadKey: for a missing entry. BadValue: for another number of features.

    Examples:
        >>> from tensordict import TensorDict
        >>> edit = ReplaceWithin("s", torch.eye(3)[:, :1])
        >>> edit(torch.zeros(2, 3), TensorDict(s=torch.ones(2, 3), batch_size=[2]))
        tensor([[1., 0., 0.],
                [1., 0., 0.]])
    """

    value: NestedKey
    basis: Tensor

    def __call__(self, value: Tensor, td: TensorDictBase | None) -> Tensor:
        other = None if td is None else td.get(self.value)
        if other is None:
            raise BadKey(f"no entry {key_text(self.value)} to take the subspace from")
        if value.shape[-1] != self.basis.shape[0]:
            raise BadValue(
                "the subspace lies among other features", got=f"{self.basis.shape[0]}", needed=f"{value.shape[-1]}"
            )
        basis = self.basis.to(value.device, value.dtype)
        return value + (other.to(value.device, value.dtype) - value) @ basis @ basis.mT


class Interchange(Patching):
    """Interchange interventions with their agreement; see :func:`interchange`."""

    def __init__(
        self,
        model: TensorDictModuleBase,
        sites: Where | list[Where],
        target: Target | None,
        split: Split,
        subspace: Tensor | None,
        label: NestedKey | None,
        chunk_size: int | None,
    ) -> None:
        splits = split if subspace is None else _Within(split, _basis(subspace))
        super().__init__(model, sites, target, splits, ("base", "source"), None, chunk_size)
        self.label = None if label is None else as_key(label)
        if self.label is not None:
            if len(self._outputs) != 1:
                raise BadValue(
                    "the label of which output?",
                    got=f"the model writes {self._outputs}",
                    needed="a target, which names one",
                    fix='target=Target("logits", "argmax")',
                )
            self.in_keys = list(dict.fromkeys([*self.in_keys, self.label]))
            self.out_keys = [*self.out_keys, AGREEMENT]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run both, the experiments, and compare with the labels."""
        label = None if self.label is None else tensordict.get(self.label)
        if self.label is not None and label is None:
            raise BadKey(f"no entry {key_text(self.label)} with what the causal model says")
        super().forward(tensordict)
        if label is not None:
            tensordict.set(AGREEMENT, self._agreement(tensordict, label))
        return tensordict

    def _agreement(self, td: TensorDictBase, label: Tensor) -> Tensor:
        said = td.get(self._written()[0]).argmax(-1)  # [*B, N]
        if label.is_floating_point() or label.dtype == torch.bool:
            raise BadType("labels are classes", got=str(label.dtype), needed="indices of the output's last dim")
        label = label.unsqueeze(-1) if label.ndim == said.ndim - 1 else label
        if label.ndim != said.ndim or label.shape[-1] not in (1, said.shape[-1]):
            raise BadValue(
                "the labels do not fit the experiments",
                got=f"shape {list(label.shape)}",
                needed=f"{list(said.shape[:-1])}, or one for each experiment: {list(said.shape)}",
            )
        return said == label


def interchange(
    model: TensorDictModuleBase,
    sites: Where | list[Where],
    target: Target | None = None,
    *,
    label: NestedKey | None = None,
    subspace: Tensor | None = None,
    split: Split = each,
    chunk_size: int | None = None,
) -> Interchange:
    r"""Run the base input with a part of the activation that the source input has there.

    .. math:: y_n = f(\mathrm{base} \mid \mathrm{do}(a_n = a_n(\mathrm{source})))

    If the part holds the causal model's variable, the output is what the causal model says for the base input with the
    source's value of that variable: that is the label, and the mean of the agreement over many pairs is the
    *interchange intervention accuracy*.

    | reads | writes |
    |---|---|
    | ``("base", *k)``, ``("source", *k)`` for each input k of the model | ``("sweep", *key)`` ``[*B, N, ...]`` |
    | what the target reads | ``("patching", "effect")`` ``[*B, N]``, as :func:`activation_patching` has it |
    | ``label``: classes, ``[*B]``, or ``[*B, N]`` | ``("interchange", "agreement")`` ``[*B, N]``, bool |

    Args:
        model: a TensorDictModule.
        sites: sites and entries, one or a list, globs too.
        target: the number y, and the output that the labels are about.
        label: the entry with what the causal model says.
        subspace: directions ``[k, F]`` in the last dim: what is replaced in each activation (distributed alignment).
        split: how a site falls into experiments, as for :func:`activation_patching`.
        chunk_size: how many rows may be in flight.

    Raises:
        BadKey: a site or an entry that does not exist. BadValue: labels or a subspace that don't fit; a subspace of
        dependent directions.

    Source: Geiger et al. 2021, Causal Abstractions of Neural Networks, section 3; Geiger et al. 2024 for subspaces.

    Examples:
        >>> from tdconcepts import Site
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), ["x"], ["y"])
        >>> base, source = torch.randn(5, 4), torch.randn(5, 4)
        >>> said = net.module(source).argmax(-1)  # all of the output goes through the first layer
        >>> td = TensorDict({"base": {"x": base}, "source": {"x": source}, "label": said}, batch_size=[5])
        >>> bool(interchange(net, Site("0"), label="label")(td)["interchange", "agreement"].all())
        True
    """
    return Interchange(model, sites, target, split, subspace, label, chunk_size).checked()


class _Within:
    def __init__(self, split: Split, basis: Tensor) -> None:
        self.split, self.basis = split, basis

    def __call__(self, where: Where, edit: EditLike) -> Experiments:
        return self.split(where, ReplaceWithin(edit.value, self.basis) if isinstance(edit, Replace) else edit)  # type: ignore[arg-type]


def _basis(subspace: Tensor) -> Tensor:
    if not isinstance(subspace, Tensor) or subspace.ndim != 2 or not subspace.is_floating_point():
        raise BadType("not a subspace", got=repr(subspace)[:80], needed="directions, a tensor [k, F]")
    basis, upper = torch.linalg.qr(subspace.detach().mT)
    size = upper.diagonal().abs()
    if subspace.shape[0] > subspace.shape[1] or bool((size <= 1e-6 * size.max()).any()):
        raise BadValue(
            "the directions depend on each other",
            got=f"a tensor {list(subspace.shape)}, of which each row is a direction",
            needed="k independent rows [k, F]",
            fix="subspace.mT" if subspace.shape[0] > subspace.shape[1] else None,
        )
    return basis
