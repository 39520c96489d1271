"""Gradients with another backward pass at each ReLU: guided back-propagation, deconvolution, and guided Grad-CAM."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.attribution.cam import resized, weighted
from tdconcepts.errors import BadValue
from tdconcepts.hooks import Options, Site, Target, check_module, dispatch_rows
from tdconcepts.hooks.calls import refuse_scripted
from tdconcepts.hooks.explaining import Explaining, Running, check_options
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.hooks.rectifiers import DeconvNetRule, GuidedBackpropRule
from tdconcepts.hooks.rules import Rule, Rules
from tdconcepts.keys import NestedKey, key_text
from tdconcepts.tunables import Replaceable, Tunable

__all__ = ["Deconvolution", "GuidedBackprop", "GuidedGradCAM"]

OnMissing = Literal["raise", "gradient"]
_MODES = ("nearest", "bilinear", "bicubic", "area")


class GuidedBackprop(Replaceable, TensorDictModuleBase):
    r"""Guided back-propagation: a gradient that passes a ReLU only where its input and the gradient are positive,
    :math:`g_{in} = g \cdot 1[x > 0] \cdot 1[g > 0]`.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    Every ReLU counts: modules, ``F.relu``, ``x.relu_()``. With several targets there is one more dim of size T right
    after the batch dims.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        on_missing: what to do about another rectifier (GELU, SiLU, ELU, leaky ReLU, ...), for which there is no guided
            form: ``"raise"``, or take its ``"gradient"`` (Captum does, silently).
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: at the call, another rectifier than ReLU. BadType: a bare ``nn.Module``, one that
            torch.jit has compiled, or an integer entry. BadKey: an entry or site that does not exist.

    Source: Springenberg et al., *Striving for simplicity: the all convolutional net*, 2015 (section 3.4).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 1)), ["x"], ["y"])
        >>> _ = net.module[1].weight.data.copy_(torch.tensor([[1.0, -1.0, 1.0]]))
        >>> td = TensorDict(x=torch.tensor([[2.0, 2.0, -2.0]]), batch_size=[1])
        >>> GuidedBackprop(net, Target("y"))(td)["attribution", "x"]
        tensor([[1., 0., 0.]])
    """

    _relu: Rule = GuidedBackpropRule()

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        *,
        on_missing: OnMissing = "raise",
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._explaining = _explaining(type(self).__name__, self._relu, module, target, wrt, on_missing, options)
        self.module, self.on_missing = module, on_missing
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here, for methods that look at several points."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        return _flows(self._explaining, td, held)


def _explaining(
    method: str,
    rule: Rule,
    module: TensorDictModuleBase,
    target: Target,
    wrt: Wrt | list[Wrt] | None,
    on_missing: str,
    options: Any,
) -> Explaining:
    check_options(options, [*Running.__annotations__, *Options.__annotations__])
    if on_missing not in ("raise", "gradient"):
        raise BadValue("no such choice", got=f"on_missing={on_missing!r}", needed='"raise" or "gradient"')
    unknown = _OtherRectifiers(method) if on_missing == "raise" else None
    refuse_scripted(check_module(module))
    return Explaining(module, target, wrt, options, rules=Rules((), {"relu": rule}, "relevance", unknown=unknown))


def _flows(this: Explaining, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
    pulled = this.pullback(td, create_graph=this.create_graph, held=held, width=this.width(td))
    results = dict(zip(this.attribution_keys, map(this.own, pulled.gradients), strict=True))
    return results | this.written(pulled.outputs)


class Deconvolution(GuidedBackprop):
    r"""Deconvolution: a gradient that passes a ReLU where the gradient is positive, whatever the input,
    :math:`g_{in} = \max(g, 0)`.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    Which ReLUs count, and what several targets give, is as of :class:`GuidedBackprop`.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        on_missing: ``"raise"`` for another rectifier than ReLU, or take its ``"gradient"``.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadValue: at the call, another rectifier than ReLU. BadType: a bare ``nn.Module``, one that
            torch.jit has compiled, or an integer entry. BadKey: an entry or site that does not exist.

    Source: Zeiler and Fergus, *Visualizing and understanding convolutional networks*, 2014 (section 2.1).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 1)), ["x"], ["y"])
        >>> _ = net.module[1].weight.data.copy_(torch.tensor([[1.0, -1.0, 1.0]]))
        >>> td = TensorDict(x=torch.tensor([[2.0, 2.0, -2.0]]), batch_size=[1])
        >>> Deconvolution(net, Target("y"))(td)["attribution", "x"]
        tensor([[1., 0., 1.]])
    """

    _relu = DeconvNetRule()


class GuidedGradCAM(Replaceable, TensorDictModuleBase):
    r"""Guided back-propagation times Grad-CAM in the size of the input: sharp, and of the class.

    | reads | writes |
    |---|---|
    | what the target depends on | ``("attribution", *k)`` for each entry ``k`` in ``wrt`` |

    The map of the layer is resized to the last dims of each entry: two for images, one for series, three for volumes.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        site: the layer whose map it is.
        wrt: entries, one or a list; default: all entries that the module reads.
        channels: the dim of the channels in a row of the layer, as of :class:`GradCAM`.
        mode: how to resize, as of :class:`GradCAM`; Captum's default is ``"nearest"``.
        options: ``on_missing`` of :class:`GuidedBackprop`, and those of every explainer.

    Raises:
        BadValue: a map that has other dims than the entry, or a ``wrt`` inside the module; else as the two methods.

    Source: Selvaraju et al., *Grad-CAM: visual explanations from deep networks*, 2017 (section 3.2).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> conv = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> net = torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(8 * 9, 2))
        >>> explain = GuidedGradCAM(TensorDictModule(net, ["image"], ["y"]), Target("y", 0), "0.2")
        >>> explain(TensorDict(image=torch.randn(4, 3, 8, 8), batch_size=[4]))["attribution", "image"].shape
        torch.Size([4, 3, 8, 8])
    """

    tunables = (Tunable("mode", choices=_MODES),)

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        site: Site | str,
        wrt: NestedKey | list[NestedKey] | None = None,
        *,
        channels: int = 0,
        mode: Literal["nearest", "bilinear", "bicubic", "area"] = "nearest",
        **options: Unpack[_GuidedOptions],
    ) -> None:
        super().__init__()
        given: list[Wrt] | Wrt | None = list(wrt) if isinstance(wrt, list) else wrt
        missing = options.pop("on_missing", "raise")
        self._explaining = this = _explaining(
            type(self).__name__, GuidedBackpropRule(), module, target, given, missing, options
        )
        if this.pullback.is_inner:
            needed = "entries that the module reads"
            raise BadValue("guided Grad-CAM is taken to inputs", got=f"wrt={wrt!r}", needed=needed)
        if mode not in _MODES:
            raise BadValue("no such way to resize", got=f"mode={mode!r}", needed=f"one of {list(_MODES)}")
        own: dict[str, Any] = {k: v for k, v in options.items() if k in ("chunk_size", "create_graph")}
        self._map = Explaining(module, target, Site.parse(site), own)
        self.module, self.channels, self.mode, self.on_missing = module, channels, mode, missing
        self.in_keys = list(dict.fromkeys([*this.in_keys, *self._map.in_keys]))
        self.out_keys = this.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this = self._explaining
        results = _flows(this, td, held)
        found, front, channels, _ = weighted(self._map, td, held, self.channels)
        found = found.relu().squeeze(channels)
        places = found.ndim - front
        for w, key in zip(this.pullback.wrt, this.attribution_keys, strict=True):
            row = results[key].ndim - front
            if places > row or not places:
                got, needed = f"a map of {places} dims, rows of {row}", "the dims of the map in a row"
                raise BadValue(f"the map does not lie on {key_text(w)}", got=got, needed=needed)
            large = resized(found, front, results[key].shape[front + row - places :], self.mode)
            large = large.reshape(*large.shape[:front], *[1] * (row - places), *large.shape[front:])
            results[key] = results[key] * large
        return results


class _GuidedOptions(Options, total=False):
    on_missing: OnMissing


class _OtherRectifiers:
    """What becomes of rectifiers that have no guided form."""

    def __init__(self, method: str) -> None:
        self.method = method

    def knows(self, name: str) -> bool:
        """Whether its gradient is right."""
        return name not in _RECTIFIERS

    def __call__(self, name: str) -> None:
        raise BadValue(
            f"{self.method} is a rule for ReLUs, and the model has another rectifier",
            got=f"the operation {name!r}",
            needed="ReLU",
            fix=f'on_missing="gradient" takes the gradient of {name}',
        )


_RECTIFIERS = frozenset(["leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"])
_RECTIFIERS |= {"hardswish", "relu6", "threshold", "glu", "clamp_min"}
