"""FullGrad: the gradient times the input, and what the biases of all layers add: together the whole output."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, dropout, padding, pooling

from tdconcepts.attribution.cam import resized
from tdconcepts.attribution.paths import _delta_key
from tdconcepts.errors import BadValue
from tdconcepts.hooks import Options, Pullback, Site, Target, dispatch_rows
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.hooks.jacobian import tangent
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.hooks.sites import module_paths, places
from tdconcepts.keys import NestedKey, check_writable
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["FullGrad", "FullGradOptions"]

_POSTS = ("abs", "rescaled", "positive", "none")
_MODES = ("nearest", "bilinear", "bicubic", "area")


class FullGradOptions(Options, total=False):
    r"""The options of :class:`FullGrad`, besides those of every explainer.

    Args:
        convergence_delta: also write :math:`\sum a - y`, zero where every operation that is not homogeneous is a layer.
    """

    convergence_delta: bool


class FullGrad(Replaceable, TensorDictModuleBase):
    r"""The full-gradient decomposition of a target: :math:`y = \nabla_x y \cdot x + \sum_l \nabla_{z_l} y \cdot b_l`.

    :math:`z_l` is what layer l writes, and :math:`b_l = z_l - J_l x_l` its bias: the part that is not its derivative
    times its input. For linear layers and convolutions it is their bias, for batch norms the implicit one
    :math:`\beta - \gamma \mu / \sigma`, for activations and layer norms :math:`f(x) - f'(x)\,x`; for ReLU and pooling
    zero.

    | reads | writes |
    |---|---|
    | what the target depends on | ``("attribution", *k)`` for each entry ``k`` in ``wrt``: :math:`x \odot \nabla_x y` |
    | | ``("attribution", layer)`` for each layer with a bias: :math:`b_l \odot \nabla_{z_l} y`, in its shape |
    | or, with ``size=`` | ``("attribution", k)`` ``[*B, *size]``: the map, and nothing for the layers |

    Everything that it writes sums to y. The map is :math:`\sum_c \psi(x \odot \nabla_x y) + \sum_l \sum_c
    \psi(b_l \odot \nabla_{z_l} y)` over the layers that have channels and the dims of the map. With several targets one
    more dim of size T follows the batch.

    Args:
        module: a TensorDictModule, in evaluation mode if it has batch norms.
        target: what is explained.
        wrt: entries, one or a list; default: all that the module reads. Also sites, with the ``layers`` behind them.
        layers: the layers whose biases count, paths or sites; default: all that the target needs.
        size: make a map: the rows and columns of an image, the length of a series, the three sides of a volume.
        post: :math:`\psi`, before the map is resized: ``"abs"``; ``"rescaled"``, the absolute values of each layer from
            0 to 1, as in the paper; ``"positive"``; ``"none"``.
        mode: how to resize: ``"nearest"``, ``"bilinear"`` (linear in each dim), ``"bicubic"`` or ``"area"``.
        options: see :class:`FullGradOptions`.

    Raises:
        BadValue: a layer without terms (recurrent ones, attention), a batch norm in training mode, a layer that runs
            several times (name its calls in ``layers``), sites without ``layers``, a size for what is no map.

    Source: Srinivas and Fleuret, *Full-gradient representation for neural network visualization*, 2019 (equations 2, 6,
    and section 3.3 for implicit biases).

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> explain = FullGrad(TensorDictModule(net, ["x"], ["y"]), Target("y", 1))
        >>> td = explain(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> total = sum(td[key].sum(-1) for key in explain.out_keys)
        >>> explain.out_keys, torch.allclose(total, net(td["x"])[:, 1], atol=1e-6)
        ([('attribution', 'x'), ('attribution', '0'), ('attribution', '2')], True)
    """

    tunables = (Tunable("post", choices=_POSTS), Tunable("mode", choices=_MODES))

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        layers: list[str | Site] | None = None,
        size: tuple[int, ...] | None = None,
        post: Literal["abs", "rescaled", "positive", "none"] = "abs",
        mode: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear",
        **options: Unpack[FullGradOptions],
    ) -> None:
        super().__init__()
        self._delta = bool(options.pop("convergence_delta", False))
        for name, value, known in (("post", post, _POSTS), ("mode", mode, _MODES)):
            if value not in known:
                raise BadValue("no such choice", got=f"{name}={value!r}", needed=f"one of {list(known)}")
        if size is not None and not (1 <= len(size) <= 3 and all(type(n) is int and n >= 1 for n in size)):
            raise BadValue("not the size of a map", got=f"size={size!r}", needed="one to three ints >= 1")
        plain = Pullback(module, target, wrt)
        if plain.is_inner and layers is None:
            got, needed = f"wrt={list(plain.wrt)}", "the layers behind the sites, which are the ones that count"
            raise BadValue(
                "biases in front of a site are part of its value", got=got, needed=needed, fix="layers=[...]"
            )
        if size is not None and len(plain.wrt) > 1:
            raise BadValue("a map is one of one entry", got=f"wrt={list(plain.wrt)}", fix='wrt="image", or size=None')
        self._layers = _layers(module, plain) if layers is None else _named(module, layers)
        self._explaining = this = Explaining(
            module,
            target,
            [*plain.wrt, *(site for site, _ in self._layers), *(_inputs(site) for site, m in self._layers if _asks(m))],
            options,
        )
        self._count = len(plain.wrt)
        self.module, self.layers, self.size, self.post, self.mode = module, layers, size, post, mode
        written = self._count + (len(self._layers) if size is None else 0)
        this.attribution_keys = this.attribution_keys[:written]
        self._delta_key = _delta_key(plain.wrt)
        extra = [self._delta_key] if self._delta else []
        this.out_keys = [*this.attribution_keys, *extra, *(module.out_keys if this.outputs else [])]
        check_writable(this.out_keys[: written + len(extra)], this.in_keys)
        self.in_keys, self.out_keys = this.in_keys, this.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, lead = self._explaining, td.batch_dims
        pulled = this.pullback(td, create_graph=this.create_graph, snapshot=True, held=held, width=this.width(td))
        several = pulled.values.ndim > lead
        inputs = iter(pulled.points[self._count + len(self._layers) :])
        factors = pulled.points[: self._count]
        with torch.set_grad_enabled(this.create_graph):
            for (_, layer), value in zip(self._layers, pulled.points[self._count :], strict=False):
                factors.append(bias_of(layer, value, next(inputs) if _asks(layer) else None, lead))
            terms = [
                gradient * (factor.unsqueeze(lead) if several else factor)
                for gradient, factor in zip(pulled.gradients, factors, strict=False)
            ]
        front = lead + several
        results = dict(zip(this.attribution_keys, terms, strict=False))
        if self.size is not None:
            results = {this.attribution_keys[0]: self._map(terms, front, self.size)}
        if self._delta:
            total: Any = sum(term.flatten(front).sum(-1) if term.ndim > front else term for term in terms)
            delta = (total - pulled.values).detach()
            results[self._delta_key] = delta
        return results | this.written(pulled.outputs)

    def _map(self, terms: list[Tensor], front: int, size: tuple[int, ...]) -> Tensor:
        first, *others = terms
        if first.ndim - front != len(size) + 1:
            got = f"rows of shape {list(first.shape[front:])}, size={size}"
            raise BadValue("the entry is no map with channels", got=got, needed="[channels, *the dims of size]")
        found = self._placed(first, front, size)
        for term in others:
            if term.ndim == first.ndim:
                found = found + self._placed(term, front, size)
        return found

    def _placed(self, term: Tensor, front: int, size: tuple[int, ...]) -> Tensor:
        """One term as a map: psi, resized, its channels summed."""
        if self.post in ("abs", "rescaled"):
            term = term.abs()
        elif self.post == "positive":
            term = term.relu()
        if self.post == "rescaled" and term.numel():
            dims = tuple(range(front, term.ndim))
            low, high = term.amin(dims, keepdim=True), term.amax(dims, keepdim=True)
            term = (term - low) / torch.where(high == low, 1.0, high - low)
        return resized(term, front + 1, size, self.mode).sum(front)


_WEIGHTED = (nn.Linear, conv._ConvNd)
_HOMOGENEOUS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample, nn.Embedding),
    *(nn.EmbeddingBag, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Fold, nn.Unfold),
    *(pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
    *(
        dropout._DropoutNd,
        nn.ZeroPad1d,
        nn.ZeroPad2d,
        nn.ZeroPad3d,
        padding._ReflectionPadNd,
        padding._ReplicationPadNd,
    ),
)
_NO_TERMS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def bias_of(layer: nn.Module, value: Tensor, given: Tensor | None, lead: int) -> Tensor:
    """What a layer adds to its derivative times its input, in the shape of what it writes, ``[*B, ...]``.

    Raises:
        BadValue: for a batch norm in training mode.
    """
    row = value.ndim - lead
    if isinstance(layer, batchnorm._BatchNorm):
        if layer.training or layer.running_mean is None or layer.running_var is None:
            raise BadValue("a batch norm takes the statistics of the batch", got="training mode", fix="model.eval()")
        scale = (layer.running_var + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)
        shift = -layer.running_mean * scale + (0.0 if layer.bias is None else layer.bias)
        return shift.reshape(-1, *[1] * (row - 1)).to(value.dtype).expand(value.shape)
    if isinstance(layer, _WEIGHTED):
        bias = layer.bias
        assert isinstance(bias, Tensor)
        placed = bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (row - 1))
        return placed.expand(value.shape)
    assert given is not None
    rows = given.reshape(-1, *given.shape[lead:])
    if not rows.numel():
        return torch.zeros_like(value)
    out, along = tangent(layer, rows)
    return (out - along).reshape(value.shape)


def _asks(layer: nn.Module) -> bool:
    """Whether the bias depends on what the layer is given."""
    return not isinstance(layer, (*_WEIGHTED, batchnorm._BatchNorm))


def _inputs(site: Site) -> Site:
    return Site(site.path, "input", None, site.call)


def _layers(module: TensorDictModuleBase, pullback: Pullback) -> list[tuple[Site, nn.Module]]:
    """Every layer that may have a bias and that the target needs, each once."""
    inside = {inner for stage in pullback.stages for inner in stage.modules()}
    found: dict[nn.Module, Site] = {}
    for path, layer in module_paths(module).items():
        if layer not in inside or layer in found or isinstance(layer, TensorDictModuleBase):
            continue
        if isinstance(layer, _NO_TERMS):
            raise BadValue(
                f"there are no full-gradient terms for {type(layer).__name__}",
                got=f"the layer {path!r}",
                needed="linear layers, convolutions, norms, elementwise activations",
                fix="layers=[...] names those that count; the sum is then not the whole output",
            )
        if any(name != "parametrizations" for name in layer._modules) or isinstance(layer, _HOMOGENEOUS):
            continue
        if isinstance(layer, _WEIGHTED) and layer.bias is None:
            continue
        found[layer] = Site(path)
    return [(site, layer) for layer, site in found.items()]


def _named(module: TensorDictModuleBase, layers: list[str | Site]) -> list[tuple[Site, nn.Module]]:
    found = []
    for name in layers:
        for place in places(module, Site.parse(name)):
            layer = place.module
            if isinstance(layer, _WEIGHTED) and layer.bias is None:
                raise BadValue("a layer without a bias", got=repr(str(name)), needed="layers that have one")
            found.append((Site(place.name) if place.call is None else Site.parse(name), layer))
    return found
