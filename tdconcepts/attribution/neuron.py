"""Captum's names for the attribution of neurons, in one line each on top of Target and wrt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, Unpack

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.attribution.gradient import Gradient
from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Options, Site, Target
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.tunables import constructor

__all__ = ["NeuronGradient", "NeuronSelector"]

Selector: TypeAlias = int | slice | tuple[int | slice, ...] | Callable[[Tensor], Tensor]


@constructor()
def NeuronGradient(  # noqa: N802 (a constructor, under Captum's name)
    module: TensorDictModuleBase,
    layer: str | Site,
    neuron_selector: Selector,
    attribute_to_neuron_input: bool = False,
    wrt: Wrt | list[Wrt] | None = None,
    **options: Unpack[Options],
) -> Gradient:
    r"""The gradient of one neuron: ``Gradient(module, Target(Site(layer), neuron), wrt)``.

    | reads | writes |
    |---|---|
    | the module's ``in_keys`` | ``("attribution", *k)`` for each ``k`` in ``wrt``, in the shape of the entry |

    For many neurons in one call write ``Gradient(module, Target(Site(layer), [0, 3, 7]))``.

    Args:
        module: a TensorDictModule.
        layer: the path of the layer, or a site.
        neuron_selector: which neuron: an int, for layers whose rows are vectors; a tuple of ints and slices, one for
            each dim of a row, where slices sum; a slice, which sums; or a callable from the layer's value to one number
            a row.
        attribute_to_neuron_input: a neuron of the layer's input in place of its output.
        wrt: entries and sites; default: all entries that the module reads.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: an index out of range, or of another number of dims. BadKey: no such layer.

    Source: Captum's ``NeuronGradient``; its tensor in and out are entries here.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = TensorDictModule(net, ["x"], ["y"])
        >>> td = NeuronGradient(net, "0", 5)(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> torch.equal(td["attribution", "x"][0], net.module[0].weight[5])
        True
    """
    site = Site.parse(layer)
    if attribute_to_neuron_input:
        site = Site(site.path, "input", site.index, site.call, site.leaf)
    return Gradient(module, Target(site, NeuronSelector(neuron_selector)), wrt, **options)


class NeuronSelector:
    """Captum's neuron selectors as a selection of a Target: slices sum.

    Args:
        selector: see :func:`NeuronGradient`.

    Raises:
        BadType: for anything else.
    """

    def __init__(self, selector: Selector) -> None:
        parts = selector if isinstance(selector, tuple) else (selector,)
        if not callable(selector) and not (parts and all(map(_is_index, parts))):
            raise BadType(
                "not a neuron selector",
                got=repr(selector),
                needed="an int, a slice, a tuple of these, or a callable",
                fix="several neurons at once: Gradient(module, Target(Site(layer), [0, 3, 7]))",
            )
        self.selector = selector

    def __repr__(self) -> str:
        return f"NeuronSelector({self.selector!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronSelector) and self.selector == other.selector

    def __hash__(self) -> int:
        return hash(repr(self))

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        lead = td.batch_dims
        if callable(self.selector):
            return self.selector(value)
        index: tuple[Any, ...] = self.selector if isinstance(self.selector, tuple) else (self.selector,)
        row = value.shape[lead:]
        inside = len(index) == len(row) and all(
            isinstance(i, slice) or -n <= i < n for i, n in zip(index, row, strict=False)
        )
        if not inside:
            raise BadValue(
                "the neuron is not in the layer",
                got=f"neuron_selector={self.selector!r} in rows of shape {list(row)}",
                needed=f"{len(row)} indices or slices, one for each dim of a row, each within it",
            )
        part = value[(slice(None),) * lead + index]
        if not part.numel() and value.numel():
            raise BadValue(
                "no neuron is selected", got=f"neuron_selector={self.selector!r} in rows of shape {list(row)}"
            )
        return part.flatten(lead).sum(-1) if part.ndim > lead else part


def _is_index(part: object) -> bool:
    if isinstance(part, slice):
        return all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))
    return type(part) is int
