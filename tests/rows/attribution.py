"""The conformance rows of the attribution room."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from world import DRAWS, GENERATOR, GRAPH, STREAM, World, argmax, explainer, row, seeded

import tdconcepts as tdc
from tdconcepts import Site, Target
from tdconcepts.attribution import (
    Absolute,
    AttentionRollout,
    Conductance,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    ExpectedGradients,
    FullGrad,
    GradCAM,
    GuidedBackprop,
    GuidedGradCAM,
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronConductance,
    NeuronIntegratedGradients,
    NoiseTunnel,
    Normalised,
    Summed,
    TimesInput,
    TransformerAttribution,
)


class Maps(nn.Module):
    """``[..., 4] -> [..., 3 channels, 4 places]``, for any batch dims."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-2) * self.weight + self.bias


def maps(w: World) -> TensorDictModule:
    """A network with a layer of maps."""
    layers = seeded(Maps, w), nn.ReLU(), nn.Flatten(-2), seeded(nn.Linear, w, 12, 3)
    net = TensorDictModule(nn.Sequential(*layers), [w("observation")], [w("logits")])
    tdc.anchor(net, "1")  # for the compiler
    return net


class Attending(nn.Module):
    """``[..., 4 tokens] -> [..., 3]`` by two layers of attention, for any batch dims."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(-1) * self.weight + self.bias
        for layer in self.layers:
            q, k, v = (t.reshape(*t.shape[:-1], 2, 2).movedim(-2, -3) for t in layer(x).chunk(3, -1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).movedim(-3, -2).flatten(-2)
        return self.head(x[..., 0, :])


def attending(w: World) -> TensorDictModule:
    """A network with attention."""
    return TensorDictModule(seeded(Attending, w), [w("observation")], [w("logits")])


ROWS = [
    explainer("Gradient", lambda w: tdc.Gradient(w.model, argmax(w), **w.chunk)),
    explainer("Gradient of the logged action", lambda w: tdc.Gradient(w.model, Target(w("logits"), by=w("action")))),
    explainer(
        "Gradient of several targets, to entries and sites",
        lambda w: tdc.Gradient(
            w.model, Target(w("logits"), [0, 2]), [w("observation"), Site("0.0"), w("hidden")], **w.chunk
        ),
        "0.0",
        "0",
    ),
    explainer("Gradient with outputs", lambda w: tdc.Gradient(w.model, argmax(w), outputs=True, **w.chunk)),
    explainer(
        "Gradient with its graph",
        lambda w: tdc.Gradient(w.model, Target(w("logits"), 1), create_graph=True, **w.chunk),
        detached=GRAPH,
    ),
    explainer("Saliency", lambda w: tdc.Saliency(w.model, Target(w("logits"), -1), **w.chunk)),
    explainer(
        "InputXGradient",
        lambda w: tdc.InputXGradient(w.model, Target(w("logits"), 2), [w("observation"), Site("0.1")], **w.chunk),
        "0.1",
    ),
    explainer(
        "NeuronGradient", lambda w: tdc.NeuronGradient(w.model, "0.2", (slice(1, 4),), wrt=w("observation")), "0.2"
    ),
    explainer(
        "IntegratedGradients",
        lambda w: tdc.IntegratedGradients(w.model, argmax(w), n_steps=4, convergence_delta=True, **w.chunk),
    ),
    explainer(
        "IntegratedGradients of several targets, at sites",
        lambda w: tdc.IntegratedGradients(
            w.model,
            Target(w("logits"), [2, 0]),
            [Site("1.0", "input"), w("hidden")],
            n_steps=3,
            method="riemann_trapezoid",
            **w.chunk,
        ),
        "1.0:in",
        "0",
    ),
    explainer(
        "IntegratedGradients from a keyed baseline, with outputs",
        lambda w: tdc.IntegratedGradients(
            w.model, Target(w("logits"), by=w("action")), n_steps=3, baseline="baseline", outputs=True, **w.chunk
        ),
    ),
    explainer(
        "SmoothGrad from a generator",
        lambda w: tdc.SmoothGrad(tdc.Gradient(w.model, argmax(w)), n_iter=DRAWS, noise=w.generator, **w.chunk),
        rows=STREAM,
        compiled=GENERATOR,
        precision="the draws are others in another dtype",
    ),
    explainer(
        "SmoothGrad around IntegratedGradients",
        lambda w: tdc.SmoothGrad(
            tdc.IntegratedGradients(w.model, argmax(w), n_steps=3), 0.2, DRAWS, noise="noise", **w.chunk
        ),
    ),
    explainer(
        "VarGrad",
        lambda w: tdc.VarGrad(
            tdc.Gradient(w.model, Target(w("logits"), [0, 1])), 0.1, DRAWS, noise="noise", relative=False, **w.chunk
        ),
    ),
    explainer(
        "Conductance",
        lambda w: Conductance(w.model, argmax(w), [Site("0.0"), w("hidden")], n_steps=3, **w.chunk),
        "0.0",
        "0",
    ),
    explainer(
        "InternalInfluence",
        lambda w: InternalInfluence(w.model, Target(w("logits"), [2, 0]), Site("0.0"), n_steps=3, **w.chunk),
        "0.0",
    ),
    explainer(
        "NeuronConductance",
        lambda w: NeuronConductance(w.model, Target(w("logits"), [2, 0]), "0.0", slice(1, 4), n_steps=3, **w.chunk),
        "0.0",
    ),
    explainer(
        "ExpectedGradients",
        lambda w: ExpectedGradients(
            w.model,
            argmax(w),
            baselines=TensorDict({w("observation"): torch.linspace(-1, 1, 8).view(2, 4)}, [2]),
            n_samples=3,
            generator=w.generator,
            **w.chunk,
        ),
        compiled=GENERATOR,
    ),
    explainer(
        "DeepLift of several targets, to entries and sites",
        lambda w: DeepLift(
            w.model,
            Target(w("logits"), [2, 0]),
            [w("observation"), Site("0.0"), w("hidden")],
            convergence_delta=True,
            **w.chunk,
        ),
        "0.0",
        "0",
    ),
    explainer(
        "DeepLiftShap",
        lambda w: DeepLiftShap(
            w.model,
            argmax(w),
            baselines=TensorDict({w("observation"): torch.linspace(-1, 1, 8).view(2, 4)}, [2]),
            **w.chunk,
        ),
    ),
    explainer(
        "GuidedBackprop",
        lambda w: GuidedBackprop(
            w.model, Target(w("logits"), [1, 2]), [w("observation"), Site("0.2")], on_missing="gradient", **w.chunk
        ),
        "0.2",
    ),
    explainer(
        "Deconvolution with outputs",
        lambda w: Deconvolution(w.model, argmax(w), outputs=True, on_missing="gradient", **w.chunk),
    ),
    explainer(
        "GuidedGradCAM",
        lambda w: GuidedGradCAM(maps(w), Target(w("logits"), [1, 0]), "1", **w.chunk),
    ),
    explainer("AttentionRollout", lambda w: AttentionRollout(attending(w), discard=0.2, outputs=True, **w.chunk)),
    explainer(
        "TransformerAttribution",
        lambda w: TransformerAttribution(attending(w), Target(w("logits"), [1, 0]), token=-1, **w.chunk),
    ),
    explainer(
        "FullGrad",
        lambda w: FullGrad(w.model, Target(w("logits"), [1, 2]), convergence_delta=True, **w.chunk),
        *("0.0", "0.2", "0.3", "0.3:in", "1.0", "1.1", "1.1:in", "2.0", "2.1", "2.1:in", "2.2", "2.2:in", "2.4"),
    ),
    explainer("GradCAM", lambda w: GradCAM(w.model, Target(w("logits"), [1, 2]), "0.0", **w.chunk), "0.0"),
    row("LayerActivation", lambda w: LayerActivation(w.model, "0.0")),
    explainer("LayerConductance", lambda w: LayerConductance(w.model, argmax(w), "0.2", n_steps=2, **w.chunk), "0.2"),
    explainer("LayerGradCam", lambda w: LayerGradCam(w.model, argmax(w), "2.0", True, **w.chunk), "2.0:in"),
    explainer(
        "LayerIntegratedGradients",
        lambda w: LayerIntegratedGradients(w.model, argmax(w), ["0.2", "2.0"], n_steps=2, **w.chunk),
        "0.2",
        "2.0",
    ),
    explainer(
        "NeuronIntegratedGradients",
        lambda w: NeuronIntegratedGradients(w.model, "0.2", slice(1, 3), n_steps=2, **w.chunk),
        "0.2",
    ),
    row("Absolute", lambda w: Absolute(tdc.IntegratedGradients(w.model, argmax(w), n_steps=2, convergence_delta=True))),
    row("TimesInput", lambda w: TimesInput(tdc.Gradient(w.model, Target(w("logits"), [1, 0]), outputs=True))),
    row("Summed", lambda w: Summed(tdc.Gradient(w.model, argmax(w)), pool="abs")),
    row("Normalised", lambda w: Normalised(tdc.Gradient(w.model, Target(w("logits"), [1, 0])), "l2", targets=True)),
    explainer(
        "NoiseTunnel SmoothGradSquared",
        lambda w: NoiseTunnel(tdc.Gradient(w.model, argmax(w)), "smoothgrad_sq", DRAWS, noise="noise", **w.chunk),
    ),
]
