"""The conformance table: one row for each explainer, stage and context; ``test_conformance.py`` checks all laws on it.

A new method adds a row, a few lines that build it in a :class:`World`, and gets all the laws. Where a law can't hold,
the row says so, with the reason: ``row("patch with the batch's mean", ..., rows="the mean is over the batch")``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

import tdconcepts as tdc
from tdconcepts import Site, Target
from tdconcepts.attribution import (
    Absolute,
    Conductance,
    ExpectedGradients,
    GradCAM,
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
)
from tdconcepts.concepts import ConceptActivation, ConceptBottleneck, ConceptSpec, MemorySelector
from tdconcepts.experiments import (
    Sweep,
    ablation_effects,
    activation_patching,
    attribution_patching,
    each,
    every,
    product,
)
from tdconcepts.interventions import (
    Do,
    GradientPolicy,
    GroundTruth,
    InterventionPipeline,
    RandomPolicy,
    RemoveDirection,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)
from tdconcepts.lrp import LRP, EpsilonPlus, EpsilonPlusFlat
from tdconcepts.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyExact,
    ShapleySampling,
)

N = 5  # rows that a world has
DRAWS = 3  # of noise


class Fuse(nn.Module):
    """A layer that raises at its ``left + 1``-th call, to see what an error in the middle leaves behind."""

    left: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Fuse.left is not None:
            Fuse.left -= 1
            if Fuse.left < 0:
                raise ZeroDivisionError("the fuse blew")
        return x


class Shift(nn.Module):
    """A layer with a buffer, and with an operation that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-0.2, 0.2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.shift)


class World:
    """A model, and the entries that rows read: the same for each world with the same arguments.

    The model is ``observation [4] -> hidden [5] -> concepts [3] -> logits [3]``, with an in-place ReLU, a buffer, and
    modules in both modes. ``w("logits")`` is a key, a nested one where the world is ``nested``; ``w.chunk`` are the
    options that bound the rows in flight.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        nested: bool = False,
        chunk: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.dtype, self.nested, self.device = dtype, nested, device
        self.chunk: dict[str, Any] = {} if chunk is None else {"chunk_size": chunk}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), Shift())
            bottleneck = nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
            head = nn.Sequential(nn.Linear(3, 6), Fuse(), nn.GELU(), nn.Dropout(), nn.Linear(6, 3)).eval()
            self.model = TensorDictSequential(
                TensorDictModule(body, [self("observation")], [self("hidden")]),
                TensorDictModule(bottleneck, [self("hidden")], [self("concepts")]),
                TensorDictModule(head, [self("concepts")], [self("logits")]),
            ).to(device, dtype)
            self.body, self.bottleneck, self.head = body, bottleneck, head
            self.entries = {
                self("observation"): torch.randn(N, 4).to(dtype),
                self("action"): torch.randint(0, 3, (N,)),
                self("labels"): torch.randint(0, 2, (N, 3)),
                self("donor"): torch.randn(N, 6).to(dtype),
                self("latent"): torch.randn(N, 4).to(dtype),
                self("concepts"): torch.rand(N, 3).to(dtype),
                self("concepts_logits"): torch.randn(N, 3).to(dtype),
                self("observation", group="baseline"): torch.randn(N, 4).to(dtype),
                self("hidden", group="baseline"): torch.randn(N, 5).to(dtype),
                self("observation", group="noise"): torch.randn(N, DRAWS, 4).to(dtype),
                self("observation", group="clean"): torch.randn(N, 4).to(dtype),
                self("observation", group="corrupt"): torch.randn(N, 4).to(dtype),
            }

    def __call__(self, name: str, group: str | None = None) -> Any:
        """The key of an entry, in a group such as ``"baseline"`` or not: a nested one in a nested world."""
        path = (*([group] if group else []), *(["agents"] if self.nested else []), name)
        return path if len(path) > 1 else name

    @property
    def generator(self) -> torch.Generator:
        """A new generator, always from the same seed."""
        return torch.Generator(self.device).manual_seed(7)

    def td(self, batch: tuple[int, ...] = (N,), rows: slice | int = slice(None)) -> TensorDict:
        """The first rows of the world under a batch size, and entries that nobody reads."""
        count = int(torch.tensor(batch).prod()) if batch else 1
        td = TensorDict({}, batch_size=batch)
        for key, value in self.entries.items():
            some = value[rows] if isinstance(rows, int) else value[rows][:count]
            td.set(key, some.clone().reshape((*batch, *value.shape[1:])).to(self.device))
        td.set("other", torch.ones(*batch, 2))
        td.set(("group", "other"), torch.zeros(batch))
        td.set_non_tensor("note", "a word")
        return td


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of the test; it starts with the name that it is about.
        make: builds the module in a world; a context is given back unentered, and entered for each law.
        chunks: whether ``make`` passes ``w.chunk`` on.
        anchors: sites to anchor before compiling.
        exempt: laws (the part of the test's name after ``test_``) that can't hold, with the reason.
    """

    name: str
    make: Callable[[World], Any]
    chunks: bool = False
    anchors: tuple[str, ...] = ()
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def opened(self, world: World) -> Iterator[TensorDictModuleBase]:
        """The module, inside its context if it is one."""
        made = self.make(world)
        with made if hasattr(made, "__enter__") else contextlib.nullcontext(made) as module:
            yield module


def explainer(name: str, make: Callable[[World], Any], *anchors: str, **exempt: str) -> Row:
    return Row(name, make, chunks=True, anchors=anchors, exempt=exempt)


def row(name: str, make: Callable[[World], Any], **exempt: str) -> Row:
    return Row(name, make, exempt=exempt)


@contextlib.contextmanager
def anchored(w: World) -> Iterator[TensorDictModuleBase]:
    """A capture and a patch on a model that holds anchors, made for compiling."""
    program = tdc.Patch({Site("0.0"): tdc.Scale(0.5)}) + tdc.Capture("2.0")
    with tdc.anchor(w.model, "0.0", "2.0", entries=[w("hidden")]), program.on(w.model) as m:
        yield m


STREAM = "one stream of random numbers serves the whole batch"
DIFFERENTIABLE = "its results are part of the model and keep its graph, as they must for training"
GRAPH = "create_graph=True asks for the graph"
TENSORDICTS = "the first stage is tensordict's own module, which has its own errors"
GENERATOR = "torch.compile can't trace a torch.Generator"
RANDOM32 = "the draws are float32 in every model"
DATA_DEPENDENT = "masks become numbers of groups, which a graph can't hold"
GROUPS = torch.tensor([0, 0, 1, 2])

argmax = lambda w: Target(w("logits"), "argmax")  # noqa: E731

EXPLAINERS = [
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
    explainer(
        "FeatureAblation",
        lambda w: FeatureAblation(w.model, argmax(w), [w("observation"), Site("0.1")], **w.chunk),
        "0.1",
        compiled=DATA_DEPENDENT,
    ),
    explainer(
        "Occlusion with outputs",
        lambda w: Occlusion(w.model, argmax(w), window=2, outputs=True, **w.chunk),
        compiled=DATA_DEPENDENT,
    ),
    explainer(
        "FeaturePermutation",
        lambda w: FeaturePermutation(w.model, argmax(w), generator=w.generator, **w.chunk),
        **dict.fromkeys(["rows", "called_with_tensors", "batch_dims"], "rows depend on each other, by definition"),
        compiled=GENERATOR,
    ),
    explainer(
        "ShapleySampling",
        lambda w: ShapleySampling(
            w.model, Target(w("logits"), [0, 2]), n_samples=3, generator=w.generator, mask=GROUPS, **w.chunk
        ),
        compiled=GENERATOR,
    ),
    explainer("ShapleyExact", lambda w: ShapleyExact(w.model, argmax(w), **w.chunk), compiled=DATA_DEPENDENT),
    explainer(
        "KernelShap from rows",
        lambda w: KernelShap(
            w.model,
            Target(w("logits"), by=w("action")),
            n_samples=6,
            generator=w.generator,
            baseline=TensorDict({w("observation"): torch.linspace(-1, 1, 8).view(2, 4)}, [2]),
            **w.chunk,
        ),
        compiled=GENERATOR,
    ),
    explainer(
        "Lime", lambda w: Lime(w.model, argmax(w), n_samples=9, generator=w.generator, **w.chunk), compiled=GENERATOR
    ),
]

RELEVANCE = [
    explainer("LRP by EpsilonPlus", lambda w: LRP(w.model, EpsilonPlus(), argmax(w), **w.chunk)),
    explainer(
        "LRP of several targets, to entries and sites",
        lambda w: LRP(
            w.model, EpsilonPlus(), Target(w("logits"), [0, 2]), [w("observation"), Site("0.0"), w("hidden")], **w.chunk
        ),
        "0.0",
        "0",
    ),
    explainer(
        "LRP in the relevance convention, with outputs",
        lambda w: LRP(
            w.model,
            EpsilonPlusFlat(),
            Target(w("logits"), by=w("action")),
            convention="relevance",
            outputs=True,
            **w.chunk,
        ),
    ),
]

CONTEXTS = [
    row(
        "composite of rules",
        lambda w: EpsilonPlus().on(w.model),
        detached="it changes the backward pass, and keeps the graph for it",
    ),
    row("capture", lambda w: tdc.capture(w.model, "0.*", Site("2.0", "input"))),
    row(
        "capture with gradients",
        lambda w: tdc.capture(w.model, "0.0", "1", gradients=Target(w("logits"), [0, 1])),
        detached="the model's own outputs keep their graph",
    ),
    row("capture that stops", lambda w: tdc.capture(w.model, "0.2", stop=True)),
    row(
        "patch",
        lambda w: tdc.patch(
            w.model,
            {Site("0.0"): tdc.Replace(w("donor")), w("hidden"): tdc.Ablate([0, 2]), Site("2.0", "input"): tdc.Add(0.3)},
        ),
    ),
    row("patch of an input", lambda w: tdc.patch(w.model, {w("observation"): tdc.Scale(0.5)})),
    row(
        "patch with a direction removed",
        lambda w: tdc.patch(w.model, {w("hidden"): RemoveDirection(torch.arange(1.0, 6.0))}),
    ),
    row(
        "patch with the batch's mean",
        lambda w: tdc.patch(w.model, {Site("0.0"): tdc.Ablate([1], to="mean")}),
        rows="the mean is over the batch, by definition",
        batch_dims="the mean is over the batch, by definition",
    ),
    row("Capture and Patch", lambda w: (tdc.Patch({Site("0.0"): tdc.Scale(2.0)}) + tdc.Capture("0.0")).on(w.model)),
    row("anchor", anchored, copies="made by a generator function, which has no copies"),
]

SPEC = ConceptSpec(["wing", "colour"], [1, 2])

STAGES = [
    row(
        "ConceptActivation",
        lambda w: ConceptActivation(SPEC, w("concepts_logits"), w("concepts")),
        detached=DIFFERENTIABLE,
    ),
    row(
        "ConceptBottleneck",
        lambda w: ConceptBottleneck(
            nn.Sequential(w.body, w.bottleneck[0]),
            w.head,
            SPEC,
            in_keys=[w("observation")],
            key=w("concepts"),
            out_keys=[w("logits")],
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
    ),
    row(
        "MemorySelector",
        lambda w: seeded(MemorySelector, w, 4, 3, 2, 5, 0.5, keys={w("latent"): w("exogenous")}),
        detached=DIFFERENTIABLE,
    ),
    row(
        "MemorySelector that draws",
        lambda w: seeded(MemorySelector, w, 4, 3, 2, 5, selection=w.generator, keys={w("latent"): w("exogenous")}),
        detached=DIFFERENTIABLE,
        rows=STREAM,
        batch_dims=STREAM,
        compiled=GENERATOR,
    ),
    row(
        "InterventionPipeline",
        lambda w: InterventionPipeline(UniformPolicy(), GroundTruth(w("labels")), w("concepts"), fraction=0.5),
        detached=DIFFERENTIABLE,
        bad_input="a sequential writes as it goes",
    ),
    row(
        "intervene where uncertain",
        lambda w: intervene(
            w.model, w("concepts"), policy=UncertaintyPolicy(), strategy=GroundTruth(w("labels"), "probs"), k=2
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene where influential",
        lambda w: intervene(w.model, w("concepts"), policy=GradientPolicy(argmax(w)), strategy=Do(0.0), k=1),
        detached=DIFFERENTIABLE,
        called_with_a_batch="a TensorDictSequential gives tensors no batch size, and so all rows are one",
        bad_input=TENSORDICTS,
    ),
    row(
        "intervene at random",
        lambda w: intervene(
            w.model, w("hidden"), policy=RandomPolicy(w.generator), strategy=Do([0.0, 1.0, 0.0, 1.0, 0.5]), k=2
        ),
        detached=DIFFERENTIABLE,
        bad_input=TENSORDICTS,
        rows=STREAM,
        compiled=GENERATOR,
        dtypes=RANDOM32,
    ),
]

PLANNED = "a plan is chosen by trying it, which torch.compile can't trace"

EXPERIMENTS = [
    explainer(
        "Sweep over units",
        lambda w: Sweep(w.model, every([Site("0.0"), w("hidden")], tdc.Ablate()), outputs=w("logits"), **w.chunk),
        compiled=PLANNED,
    ),
    explainer(
        "Sweep over pairs, with a donor",
        lambda w: Sweep(
            w.model,
            product(every(Site("0.0"), tdc.Replace(w("donor")), [0, -1]), every(w("concepts"), tdc.Scale(2.0)))
            + each(w("observation"), [tdc.Scale(0.5), tdc.Add(1.0)]),
            **w.chunk,
        ),
        compiled=PLANNED,
    ),
    explainer(
        "activation_patching",
        lambda w: activation_patching(
            w.model, [Site("0.0"), w("hidden")], Target(w("logits"), 1), split=every, direction="noise", **w.chunk
        ),
        compiled=PLANNED,
    ),
    row(
        "attribution_patching",
        lambda w: attribution_patching(w.model, [Site("0.0"), w("hidden")], argmax(w), n_steps=2),
        compiled=PLANNED,
    ),
    explainer(
        "ablation_effects",
        lambda w: ablation_effects(w.model, Site("1.*"), Target(w("logits"), by=w("action")), **w.chunk),
        compiled=PLANNED,
    ),
]

TABLE = EXPLAINERS + RELEVANCE + CONTEXTS + STAGES + EXPERIMENTS


def seeded(cls: type[nn.Module], w: World, *args: Any, **options: Any) -> nn.Module:
    """A module with parameters that are the same in every world."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return cls(*args, **options).to(w.device, w.dtype)
