"""How what flows through a hidden layer changes along a path of the inputs: conductance and internal influence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.attribution.neuron import NeuronSelector, Selector
from tdconcepts.attribution.paths import IntegratedGradients, Quadrature
from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Options, Pullback, Site, Target
from tdconcepts.hooks.batching import expand, gather, groups, spread
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey, key_text
from tdconcepts.tunables import Tunable

__all__ = ["Conductance", "InternalInfluence", "NeuronConductance"]

_FLOW = "flow through the neuron"  # one flat key, in our own copy of the batch


class _Leg(NamedTuple):
    """Some points of a path: which, the layer's value ``[n, *B, ...]`` and gradient ``[n, *B(, T), ...]`` there."""

    some: slice
    value: Tensor
    gradient: Tensor
    several: bool


class Conductance(IntegratedGradients):
    r"""The change of the target that flows through each hidden unit: :math:`\int_0^1 \frac{\partial y}{\partial
    h} \frac{dh}{d\alpha}\, d\alpha`.

    | reads | writes |
    |---|---|
    | what the target depends on; ``("baseline", *k)`` of inputs | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    The *inputs* go from their baseline to their value in a straight line; :math:`h` follows. The path is cut into
    ``n_steps`` pieces of which both ends count, so that the change of :math:`h` is all there: what all units of a layer
    that everything passes through get sums to ``y(x) - y(x_0)``, exactly for a linear network and any number of steps.
    (Captum's default leaves out both ends of the path.) Integer entries keep their values.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: sites, or entries between stages, one or a list.
        n_steps: pieces of the path.
        baseline: where the inputs begin; see :class:`IntegratedGradients`.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: an entry that the module reads (its conductance is :class:`IntegratedGradients`), or no steps.

    Source: Dhamdhere et al., *How important is a neuron?*, 2018 (equation 2); Shrikumar et al., *Computationally
    efficient measures of internal neuron importance*, 2018 (equation 3).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> td = TensorDict(x=torch.randn(3, 4), batch_size=[3])
        >>> td = Conductance(TensorDictModule(net, ["x"], ["y"]), Target("y", 0), Site("1"))(td)
        >>> change = net(td["x"]) - net(torch.zeros(4))
        >>> torch.allclose(td["attribution", "1"].sum(-1), change[:, 0], atol=1e-5)
        True
    """

    tunables = (Tunable("n_steps", 10, 100, 10),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt],
        *,
        n_steps: int = 50,
        baseline: float | NestedKey | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(module, target, wrt, n_steps=n_steps, baseline=baseline, **options)
        _check_inner(self._explaining.pullback)
        self.in_keys = self._explaining.in_keys

    def _along(self, path: Pullback, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        n, total, last = self.n_steps, None, None
        for leg in _walk(self, path, td, held, [i / n for i in range(n + 1)]):
            value = leg.value.unsqueeze(1 + td.batch_dims) if leg.several else leg.value
            part = _trapezia(value[:-1], value[1:], leg.gradient[:-1], leg.gradient[1:])
            if last is not None:
                part = part + _trapezia(last[0], value[:1], last[1], leg.gradient[:1])
            total = part if total is None else total + part
            last = value[-1:].clone(), leg.gradient[-1:].clone()
        return _written(self, path, total)


def _trapezia(before: Tensor, after: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The areas between neighbouring points: how far the value goes, times the mean gradient, ``[n, ...]``, summed."""
    return 0.5 * ((after - before) * (left + right)).sum(0)


class InternalInfluence(IntegratedGradients):
    r"""The mean gradient at a hidden layer along a path of the inputs: :math:`\int_0^1 \partial y / \partial
    h(x_\alpha)\, d\alpha`.

    | reads | writes |
    |---|---|
    | what the target depends on; ``("baseline", *k)`` of inputs | ``("attribution", *k)`` for each ``k`` in ``wrt`` |

    The path is that of :class:`Conductance`.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: sites, or entries between stages, one or a list.
        n_steps: points on the path.
        method: see :func:`~tdconcepts.attribution.paths.quadrature`; the weights sum to one.
        baseline: where the inputs begin; see :class:`IntegratedGradients`.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: an entry that the module reads, which is no hidden layer; no such method; or no steps.

    Source: Leino et al., *Influence-directed explanations for deep convolutional networks*, 2018 (definition 1).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> td = TensorDict(x=torch.randn(3, 4), batch_size=[3])
        >>> td = InternalInfluence(TensorDictModule(net, ["x"], ["y"]), Target("y", 0), Site("0"))(td)
        >>> torch.allclose(td["attribution", "0"], net[1].weight[0].expand(3, 8))
        True
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt],
        *,
        n_steps: int = 50,
        method: Quadrature = "gausslegendre",
        baseline: float | NestedKey | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(module, target, wrt, n_steps=n_steps, method=method, baseline=baseline, **options)
        _check_inner(self._explaining.pullback)
        self.in_keys = self._explaining.in_keys

    def _along(self, path: Pullback, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        total = None
        for leg in _walk(self, path, td, held, self._rule[0]):
            weights = self._rule_as(leg.gradient.dtype, leg.gradient.device)[1][leg.some]
            part = torch.tensordot(weights, leg.gradient.to(weights.dtype), 1)
            total = part if total is None else total + part
        return _written(self, path, None if total is None else total.to(leg.gradient.dtype))


class NeuronConductance(IntegratedGradients):
    r"""The part of an input's integrated gradient that flows through one neuron :math:`h_j`: :math:`(x - x_0) \int_0^1
    \frac{\partial y}{\partial h_j} \frac{\partial h_j}{\partial x}\, d\alpha`.

    | reads | writes |
    |---|---|
    | what the target depends on; ``("baseline", *k)`` | ``("attribution", *k)`` for each entry ``k`` in ``wrt`` |

    A slice sums over its neurons: :math:`\sum_j \partial y / \partial h_j \cdot \partial h_j / \partial x`. (Captum
    multiplies the two sums.)

    Args:
        module: a TensorDictModule.
        target: what is explained.
        layer: the path of the layer, or a site.
        neuron_selector: an int, a slice, or a tuple of these with one for each dim of a row.
        wrt: entries that the module reads, one or a list; default: all.
        n_steps: points on the path, by the Gauss-Legendre rule.
        baseline: where the inputs begin; see :class:`IntegratedGradients`.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: a callable as the selector. BadValue: a neuron out of range, or ``wrt`` inside the module.

    Source: Dhamdhere et al., *How important is a neuron?*, 2018 (equation 1).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> td = TensorDict(x=torch.ones(1, 4), batch_size=[1])
        >>> td = NeuronConductance(TensorDictModule(net, ["x"], ["y"]), Target("y", 0), "0", 5)(td)
        >>> torch.allclose(td["attribution", "x"][0], net[1].weight[0, 5] * net[0].weight[5])
        True
    """

    tunables = (Tunable("n_steps", 10, 100, 10),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        layer: str | Site,
        neuron_selector: Selector,
        wrt: NestedKey | list[NestedKey] | None = None,
        *,
        n_steps: int = 50,
        baseline: float | NestedKey | None = None,
        **options: Unpack[Options],
    ) -> None:
        given: Any = wrt
        super().__init__(module, target, given, n_steps=n_steps, baseline=baseline, **options)
        if self._explaining.pullback.is_inner:
            raise BadValue("a neuron's conductance is taken to inputs", got=f"wrt={wrt!r}", needed="entries it reads")
        if callable(neuron_selector):
            fix = "Conductance(module, target, Site(layer)), and a sum over its neurons"
            raise BadType("a callable has no gradient that flows through it", got=repr(neuron_selector), fix=fix)
        NeuronSelector(neuron_selector)  # which raises for what is none
        site = Site.parse(layer)
        self._flow = Pullback(module, target, site)
        (inputs,) = self._paths
        self._neuron = Pullback(module, Target(site, _Flow(neuron_selector)), list(inputs.wrt))

    def _along(self, path: Pullback, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, batch, lead = self._explaining, td.batch_size, td.batch_dims
        ends, starts = self._ends(path, td)
        steps = {w: ends[w] if start is None else ends[w] - start for w, start in starts.items()}
        totals: dict[Wrt, Tensor] = {}
        others = [key for key in dict.fromkeys([*self._flow.reads(td), *path.reads(td)]) if key not in path.wrt]
        for group in this.tracked(groups(self.n_steps, this.rows(td, path.in_keys), td.numel()), "path"):
            n, some = len(group), slice(group.start, group.stop)
            many = expand(td, n, others)
            for w in path.wrt:
                many.set(w, spread(self._points(starts[w], steps[w], some), n, batch))
            kept = None if held is None else spread(held.expand(n, *held.shape), n, batch)
            pulled = self._flow(many, create_graph=this.create_graph, held=kept, width=this.width(td, n))
            flow, at = pulled.gradients[0], many.batch_dims
            several = pulled.values.ndim > at
            each = []
            for one in flow.unbind(at) if several else [flow]:
                found = self._neuron(many.set(_FLOW, one), create_graph=this.create_graph).gradients
                each.append([gather(gradient, n, batch) for gradient in found])
            for i, w in enumerate(path.wrt):
                gradient = torch.stack([one[i] for one in each], 1 + lead) if several else each[0][i]
                weights = self._rule_as(gradient.dtype, gradient.device)[1][some]
                part = torch.tensordot(weights, gradient.to(weights.dtype), 1)
                totals[w] = part if w not in totals else totals[w] + part
        found_for = {}
        for w, total in totals.items():
            step = steps[w].unsqueeze(lead) if total.ndim > steps[w].ndim else steps[w]
            found_for[self._written[w]] = (total * step).to(step.dtype)
        return found_for if this.create_graph else {key: value.detach() for key, value in found_for.items()}


class _Flow:
    """A selection of a Target: the chosen neurons, each times the gradient of what is explained there."""

    in_keys = (_FLOW,)

    def __init__(self, selector: Selector) -> None:
        self.selector = NeuronSelector(selector)

    def __repr__(self) -> str:
        return f"_Flow({self.selector!r})"

    def __call__(self, value: Tensor, td: TensorDictBase) -> Tensor:
        return self.selector(value * td.get(_FLOW).detach(), td)


def _walk(
    explainer: IntegratedGradients, path: Pullback, td: TensorDictBase, held: Tensor | None, alphas: list[float]
) -> Iterator[_Leg]:
    """The layer's value and gradient at points of the path of the inputs, in groups that stay within the chunk."""
    this, batch = explainer._explaining, td.batch_size
    base, _ = explainer._at_baseline(td, path)
    moved = [key for key in explainer.module.in_keys if key in path.in_keys and _moves(td.get(key))]
    others = [key for key in path.reads(td) if key not in moved]
    for group in this.tracked(groups(len(alphas), this.rows(td, path.in_keys), td.numel()), "path"):
        n, some = len(group), slice(group.start, group.stop)
        many = expand(td, n, others)
        for key in moved:
            end, start = td.get(key), base.get(key)
            at = torch.tensor(alphas[some], dtype=end.dtype, device=end.device).view(-1, *[1] * end.ndim)
            many.set(key, spread(start + at * (end - start), n, batch))
        kept = None if held is None else spread(held.expand(n, *held.shape), n, batch)
        pulled = path(many, create_graph=this.create_graph, snapshot=True, held=kept, width=this.width(td, n))
        several = pulled.values.ndim > many.batch_dims
        yield _Leg(some, gather(pulled.points[0], n, batch), gather(pulled.gradients[0], n, batch), several)


def _written(explainer: IntegratedGradients, path: Pullback, total: Tensor | None) -> dict[NestedKey, Tensor]:
    assert total is not None
    return {explainer._written[path.wrt[0]]: total if explainer._explaining.create_graph else total.detach()}


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_inner(pullback: Pullback) -> None:
    read = [w for w in pullback.wrt if not isinstance(w, Site) and w in pullback.module.in_keys]
    if read:
        raise BadValue(
            f"{key_text(read[0])} is an input, not a hidden layer",
            got=f"wrt={list(pullback.wrt)}",
            needed="sites, or entries between stages",
            fix="IntegratedGradients, which is the conductance of an input",
        )
