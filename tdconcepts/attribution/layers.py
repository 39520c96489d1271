"""Captum's names for layers and for integrated gradients of neurons, each a line on top of Target and wrt."""

from __future__ import annotations

from typing import Any

from tensordict.nn import TensorDictModuleBase

from tdconcepts.attribution.cam import GradCAM
from tdconcepts.attribution.conductance import Conductance
from tdconcepts.attribution.neuron import NeuronSelector, Selector
from tdconcepts.attribution.paths import IntegratedGradients
from tdconcepts.hooks import Hooked, Site, Target, capture
from tdconcepts.tunables import constructor

__all__ = [
    "LayerActivation",
    "LayerConductance",
    "LayerGradCam",
    "LayerIntegratedGradients",
    "NeuronIntegratedGradients",
]


@constructor()
def LayerActivation(  # noqa: N802 (a constructor, under Captum's name)
    module: TensorDictModuleBase, layer: str | Site, attribute_to_layer_input: bool = False
) -> Hooked:
    """What a layer writes: ``capture(module, Site(layer))``, under ``("activation", site)``.

    Args:
        module: a TensorDictModule.
        layer: the path of the layer, or a site.
        attribute_to_layer_input: what it is given, in place of what it writes.

    Raises:
        BadKey: no such layer.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), ["x"], ["y"])
        >>> LayerActivation(net, "0")(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))["activation", "0"].shape
        torch.Size([3, 8])
    """
    return capture(module, _site(layer, attribute_to_layer_input))


@constructor()
def LayerIntegratedGradients(  # noqa: N802
    module: TensorDictModuleBase,
    target: Target,
    layer: str | Site | list[str | Site],
    attribute_to_layer_input: bool = False,
    **options: Any,
) -> IntegratedGradients:
    """Integrated gradients at layers: ``IntegratedGradients(module, target, Site(layer))``.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        layer: the path of the layer, or a site, or a list of them.
        attribute_to_layer_input: at the layer's input in place of its output.
        options: the other arguments of :class:`IntegratedGradients`.

    Raises:
        BadKey: no such layer.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), ["x"], ["y"])
        >>> explain = LayerIntegratedGradients(net, Target("y", 0), "0", n_steps=20)
        >>> explain(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))["attribution", "0"].shape
        torch.Size([3, 8])
    """
    given = layer if isinstance(layer, list) else [layer]
    return IntegratedGradients(module, target, [_site(one, attribute_to_layer_input) for one in given], **options)


@constructor()
def LayerConductance(  # noqa: N802
    module: TensorDictModuleBase,
    target: Target,
    layer: str | Site,
    attribute_to_layer_input: bool = False,
    **options: Any,
) -> Conductance:
    """The conductance of a layer: ``Conductance(module, target, Site(layer))``.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        layer: the path of the layer, or a site.
        attribute_to_layer_input: of the layer's input in place of its output.
        options: the other arguments of :class:`Conductance`.

    Raises:
        BadKey: no such layer.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), ["x"], ["y"])
        >>> explain = LayerConductance(net, Target("y", 0), "0", n_steps=5)
        >>> explain(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))["attribution", "0"].shape
        torch.Size([3, 8])
    """
    return Conductance(module, target, _site(layer, attribute_to_layer_input), **options)


@constructor()
def LayerGradCam(  # noqa: N802
    module: TensorDictModuleBase,
    target: Target,
    layer: str | Site,
    attribute_to_layer_input: bool = False,
    relu_attributions: bool = False,
    **options: Any,
) -> GradCAM:
    """Grad-CAM with Captum's default, without the ReLU: ``GradCAM(module, target, layer, relu=False)``.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        layer: the path of the layer, or a site.
        attribute_to_layer_input: at the layer's input in place of its output.
        relu_attributions: keep only what speaks for the target.
        options: the other arguments of :class:`GradCAM`; ``size=`` is Captum's ``LayerAttribution.interpolate``.

    Raises:
        BadKey: no such layer.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2))
        >>> explain = LayerGradCam(TensorDictModule(layers, ["image"], ["y"]), Target("y", 0), "0")
        >>> explain(TensorDict(image=torch.randn(4, 3, 8, 8), batch_size=[4]))["attribution", "0"].shape
        torch.Size([4, 1, 6, 6])
    """
    return GradCAM(module, target, _site(layer, attribute_to_layer_input), relu=relu_attributions, **options)


@constructor()
def NeuronIntegratedGradients(  # noqa: N802
    module: TensorDictModuleBase,
    layer: str | Site,
    neuron_selector: Selector,
    attribute_to_neuron_input: bool = False,
    **options: Any,
) -> IntegratedGradients:
    """Integrated gradients of one neuron: ``IntegratedGradients(module, Target(Site(layer), neuron))``.

    Args:
        module: a TensorDictModule.
        layer: the path of the layer, or a site.
        neuron_selector: see :func:`NeuronGradient`.
        attribute_to_neuron_input: a neuron of the layer's input in place of its output.
        options: the other arguments of :class:`IntegratedGradients`.

    Raises:
        BadKey: no such layer. BadType: what is no selector.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), ["x"], ["y"])
        >>> explain = NeuronIntegratedGradients(net, "0", slice(2, 4), n_steps=20)
        >>> explain(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))["attribution", "x"].shape
        torch.Size([3, 4])
    """
    target = Target(_site(layer, attribute_to_neuron_input), NeuronSelector(neuron_selector))
    return IntegratedGradients(module, target, **options)


def _site(layer: str | Site, to_input: bool) -> Site:
    site = Site.parse(layer)
    return Site(site.path, "input", site.index, site.call, site.leaf) if to_input else site
