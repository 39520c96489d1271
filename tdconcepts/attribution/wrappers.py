"""Variations of any explainer: its absolute values, times the input, summed over dims, normalised."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import check_module, check_td, dispatch_rows
from tdconcepts.hooks.explaining import HELD
from tdconcepts.keys import CONVERGENCE_DELTA, NestedKey, join
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["Absolute", "Normalised", "Summed", "TimesInput"]

_POOLS, _SCALES = ("sum", "abs", "positive", "max", "l2"), ("max", "sum", "l2", "range")


class Absolute(Replaceable, TensorDictModuleBase):
    """The size of an explanation: ``|A|``.

    | reads | writes |
    |---|---|
    | what the explainer reads | what the explainer writes |

    A ``convergence_delta`` and the model's own outputs stay as they are.

    Args:
        explainer: any module that writes attributions; other wrappers too.

    Raises:
        BadType: what is no TensorDictModule.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import InputXGradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> td = Absolute(InputXGradient(net, Target("y", 0)))(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> bool((td["attribution", "x"] >= 0).all())
        True
    """

    def __init__(self, explainer: TensorDictModuleBase) -> None:
        super().__init__()
        self.explainer = check_module(explainer, "explainer")
        self.module = getattr(explainer, "module", None)
        self.in_keys, self.out_keys = list(explainer.in_keys), list(explainer.out_keys)
        self.optional_keys = list(getattr(explainer, "optional_keys", ()))
        own = getattr(self.module, "out_keys", ())
        self._changed = [key for key in self.out_keys if key not in own and join(key)[0] != CONVERGENCE_DELTA]

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        check_td(tensordict)
        found = self.explainer(tensordict.select(*self.in_keys, *self.optional_keys, HELD, strict=False))
        results = {key: found.get(key) for key in self.out_keys}
        results |= {key: self._change(key, results[key], tensordict) for key in self._changed if key in results}
        for key, value in results.items():
            tensordict.set(key, value)
        return tensordict

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the explained target's ``"argmax"`` chooses here."""
        hold = getattr(self.explainer, "hold", None)
        return None if hold is None else hold(tensordict)

    def _change(self, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
        return value.abs()


class TimesInput(Absolute):
    """An explanation times the value that it explains: ``w * A``.

    | reads | writes |
    |---|---|
    | what the explainer reads | what the explainer writes |

    Only entries that the explainer reads have a value here; for sites take a method that multiplies itself,
    :class:`InputXGradient` for one.

    Args:
        explainer: any module that writes attributions of entries.

    Raises:
        BadValue: attributions of a site, or of something that is not an entry.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> td = TimesInput(Gradient(net, Target("y", 0)))(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))
        >>> td["attribution", "x"].abs().max().item()
        0.0
    """

    def __init__(self, explainer: TensorDictModuleBase) -> None:
        super().__init__(explainer)
        entries = {join(key): key for key in self.in_keys}
        self._entries: dict[NestedKey, NestedKey] = {}
        for key in self._changed:
            path = join(key)
            named = [entries[path[i:]] for i in range(1, len(path)) if path[i:] in entries]
            if not named:
                got, fix = f"{key!r}", "InputXGradient, or IntegratedGradients, which multiply sites too"
                raise BadValue("there is no entry to multiply with", got=got, needed="attributions of entries", fix=fix)
            self._entries[key] = named[0]

    def _change(self, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
        factor = td.get(self._entries[key])
        factor = factor if value.requires_grad else factor.detach()
        return value * (factor.unsqueeze(td.batch_dims) if value.ndim > factor.ndim else factor)


class Summed(Absolute):
    """An explanation, pooled over some of its last dims: channels, or the numbers of an embedding.

    | reads | writes |
    |---|---|
    | what the explainer reads | what the explainer writes, with these dims gone |

    Args:
        explainer: any module that writes attributions.
        dims: dims of a row, counted from its end (negative), one or several.
        pool: ``"sum"``, ``"abs"`` (of the absolute values), ``"positive"`` (of the positive parts), ``"max"`` (of the
            absolute values) or ``"l2"`` (their Euclidean norm).

    Raises:
        BadValue: no such pooling, or dims that a row does not have.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(lambda x: x.sum((-1, -2, -3)), ["x"], ["y"])
        >>> td = Summed(Gradient(net, Target("y")), dims=-3)(TensorDict(x=torch.randn(2, 3, 5, 5), batch_size=[2]))
        >>> td["attribution", "x"].shape, td["attribution", "x"].max().item()
        (torch.Size([2, 5, 5]), 3.0)
    """

    tunables = (Tunable("pool", choices=_POOLS),)

    def __init__(
        self,
        explainer: TensorDictModuleBase,
        dims: int | tuple[int, ...] = -1,
        pool: Literal["sum", "abs", "positive", "max", "l2"] = "sum",
    ) -> None:
        super().__init__(explainer)
        self.dims = (dims,) if isinstance(dims, int) else tuple(dims)
        if not self.dims or not all(type(dim) is int and dim < 0 for dim in self.dims):
            raise BadValue("not dims of a row", got=f"dims={dims!r}", needed="ints from the end, -1 for the last dim")
        if pool not in _POOLS:
            raise BadValue("no such pooling", got=repr(pool), needed=f"one of {list(_POOLS)}")
        self.pool = pool

    def _change(self, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
        if any(value.ndim + dim < td.batch_dims for dim in self.dims):
            got = f"dims={self.dims} of rows of shape {list(value.shape[td.batch_dims :])}"
            raise BadValue("a row has no such dim", got=got, needed="dims behind the batch")
        if self.pool == "l2":
            return value.square().sum(self.dims).sqrt()
        if self.pool == "max":
            return value.abs().amax(self.dims)
        part = value.abs() if self.pool == "abs" else value.relu() if self.pool == "positive" else value
        return part.sum(self.dims)


class Normalised(Absolute):
    r"""An explanation on a common scale, row by row: :math:`A / s(A)`.

    | reads | writes |
    |---|---|
    | what the explainer reads | what the explainer writes |

    A row of zeros stays zero. Several targets have one scale, with which they compare, or with ``targets=True`` each
    its own, as if explained alone.

    Args:
        explainer: any module that writes attributions.
        by: the scale: ``"max"`` (the largest size, so the result is in [-1, 1]), ``"sum"`` (of the sizes), ``"l2"``
            (the Euclidean norm), or ``"range"``: the row goes linearly from 0, its minimum, to 1, its maximum.
        targets: whether the first dim of a row are several targets, each with a scale of its own.

    Raises:
        BadValue: no such scale.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), ["x"], ["y"])
        >>> td = Normalised(Gradient(net, Target("y", 0)))(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> td["attribution", "x"].abs().amax(-1)
        tensor([1., 1., 1.])
    """

    tunables = (Tunable("by", choices=_SCALES),)

    def __init__(
        self,
        explainer: TensorDictModuleBase,
        by: Literal["max", "sum", "l2", "range"] = "max",
        targets: bool = False,
    ) -> None:
        super().__init__(explainer)
        if by not in _SCALES:
            raise BadValue("no such scale", got=repr(by), needed=f"one of {list(_SCALES)}")
        if not isinstance(targets, bool):
            raise BadType("targets= is a bool", got=repr(targets))
        self.by, self.targets = by, targets

    def _change(self, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
        lead = td.batch_dims + self.targets
        row = value.flatten(lead) if value.ndim > lead else value.unsqueeze(-1)
        if not row.shape[-1] or not row.numel():
            return value
        if self.by == "range":
            low, high = row.aminmax(dim=-1, keepdim=True)
            row, scale = row - low, high - low
        else:
            size = row.abs()
            scale = {"max": size.amax(-1, True), "sum": size.sum(-1, True), "l2": row.norm(dim=-1, keepdim=True)}[
                self.by
            ]
        return (row / torch.where(scale == 0, 1, scale)).reshape(value.shape)
