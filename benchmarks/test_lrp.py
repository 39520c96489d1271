"""LRP against the plain gradient of the same run: forward and input-backward on one thread; peers, and the limit.

``by hand`` are the same formulas without any framework: one ``autograd.Function`` for each pair of a layer and its
rectifier, written for these nets, whose inputs are not negative behind the first layer. What it costs is what
arithmetic costs. Forms take turns; ratios are those of neighbouring calls' CPU time, and their median counts. Peers are
measured in the same turns.
"""

import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

from tdconcepts import Compiled, Target
from tdconcepts.lrp import (
    LRP,
    AttnLRP,
    EpsilonAlpha2Beta1Flat,
    EpsilonPlus,
    EpsilonPlusFlat,
    UniformEpsilon,
)

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from lrp.nets import ResNet18, as_td, prepared, vgg11
from oracles import oracle

pytestmark = pytest.mark.filterwarnings("ignore")
EPSILON = 1e-6
COMPOSITES = {
    "epsilon": (UniformEpsilon(EPSILON), 1.3),
    "EpsilonPlusFlat": (EpsilonPlusFlat(), 1.5),
    "Alpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(), 2.1),
}


# By hand ------------------------------------------------------------------------------------------------------------

MEMORY = torch.empty(0)


def positive(weight):
    """The weight's positive part, in memory that is used again: fresh pages cost more than the numbers."""
    global MEMORY
    MEMORY = MEMORY if MEMORY.numel() >= weight.numel() else torch.empty(weight.numel())
    return torch.clamp(weight, min=0, out=MEMORY[: weight.numel()].view_as(weight))


def pulled(s, like, weight, m):
    mask = (True, False, False)
    return torch.ops.aten.convolution_backward(
        s, like, weight, None, m.stride, m.padding, m.dilation, False, (0, 0), m.groups, mask
    )[0]


def upper(x, weight, m):
    bias = torch.full((m.out_channels,), EPSILON) if m.bias is None else m.bias.clamp(min=0) + EPSILON
    return F.conv2d(x, weight, bias, m.stride, m.padding)


class Flat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, m, z, y):
        ctx.m = m
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        (x, y), m = ctx.saved_tensors, ctx.m
        ones = torch.ones(1, *m.weight.shape[1:])
        count = F.conv2d(torch.ones_like(x[:1]), ones, None, m.stride, m.padding)
        return pulled((g * y).sum(1, keepdim=True).div_(count), x, ones, m), None, None, None


class Plus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, m, z, y):
        ctx.m = m
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        (x, y), m = ctx.saved_tensors, ctx.m
        plus = positive(m.weight)
        s = upper(x, plus, m)
        torch.div(g, s, out=s).mul_(y)
        return pulled(s, x, plus, m), None, None, None


class AlphaBeta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, m, z, y):
        ctx.m = m
        ctx.save_for_backward(x, z, y)
        return y

    @staticmethod
    def backward(ctx, g):
        (x, z, y), m = ctx.saved_tensors, ctx.m
        plus = positive(m.weight)
        top = upper(x, plus, m)
        low = top - z
        F.threshold(low.sub_(z, alpha=1e-5), EPSILON, torch.inf, inplace=True).add_(z, alpha=1e-5)  # noise
        torch.div(g, low, out=low).mul_(y)
        torch.div(g, top, out=top).mul_(y).mul_(2).sub_(low)
        return pulled(top, x, plus, m).add_(pulled(low, x, m.weight, m)), None, None, None


class Epsilon(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.detach()

    @staticmethod
    def backward(ctx, g):
        size = ctx.saved_tensors[0].abs().add_(EPSILON)
        return torch.addcdiv(g, g, size, value=-EPSILON, out=size)


STEPS = {"EpsilonPlusFlat": Plus, "Alpha2Beta1Flat": AlphaBeta}


def step(kind, x, m, norm=None, rectify=True):
    if kind == "epsilon":
        z = Epsilon.apply(m(x))
        z = z if norm is None else Epsilon.apply(norm(z))
        return F.relu(z) if rectify else z
    rule = STEPS[kind] if x.grad_fn is not None else Flat
    with torch.no_grad():
        z = m(x)
        y = z if norm is None else norm(z)
        y = F.relu(y) if rectify else y
    return rule.apply(x, m, z, y)


def by_hand(model, kind, x):
    x = leaf = x.clone().requires_grad_()
    if isinstance(model, nn.Sequential):
        for m in model:
            if isinstance(m, nn.Conv2d):
                x = step(kind, x, m)
            elif not (isinstance(m, nn.ReLU) and x.ndim == 4):
                x = Epsilon.apply(m(x)) if isinstance(m, nn.Linear) else m(x)
    else:
        x = model.maxpool(step(kind, x, model.conv1, model.bn1))
        for block in (block for stage in model.layers for block in stage):
            skip = x if block.downsample is None else step(kind, x, *block.downsample, rectify=False)
            out = step(kind, x, block.conv1, block.bn1)
            x = F.relu(step(kind, out, block.conv2, block.bn2, rectify=False) + skip)
        x = Epsilon.apply(model.fc(x.mean((2, 3))))
    value = x.amax(1)
    found = torch.autograd.grad(value.sum(), leaf)[0]
    return found * leaf.detach() if kind == "epsilon" else found


# Peers --------------------------------------------------------------------------------------------------------------


def zennit(model, name, x):
    composites = oracle("zennit.composites")
    composite = getattr(composites, {"EpsilonPlusFlat": name}.get(name, "EpsilonAlpha2Beta1Flat"))()

    def form():
        leaf = x.clone().requires_grad_()
        with composite.context(model) as m:
            value = m(leaf).amax(1)
            return torch.autograd.grad(value, leaf, value.detach())[0]

    return form


def tdhook(model, x):
    attribution = pytest.importorskip("tdhook.attribution")  # the oracle's stand-ins would mislead it
    rules = pytest.importorskip("tdhook.attribution.lrp_helpers.rules")
    context = attribution.LRP(
        rule_mapper=rules.EpsilonPlus(),
        init_attr_targets=lambda td, _: TensorDict(output=td["output"].amax(1), batch_size=[]),
    )

    def form():
        with context.prepare(model) as m:
            return m(TensorDict(input=x, batch_size=[len(x)]))

    return form


# Measuring ----------------------------------------------------------------------------------------------------------


def turns(forms, rounds, many=1):
    """CPU seconds of each form, in turns; of a short one ``many`` calls in a row, right after some untimed ones."""
    for form in forms.values():
        form()
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            for _ in range(many // 2):
                form()
            start = time.process_time_ns()
            for _ in range(many):
                form()
            times[name].append(1e-9 * (time.process_time_ns() - start) / many)
    return times


def ratios(times, name, reference, parts=3):
    """Three medians of the ratio to another form's call of the same turn."""
    each = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    return [statistics.median(each[i::parts]) for i in range(min(parts, len(each)))]


def add(compare, title, times, name, reference, at_most=None, at_least=None):
    found = ratios(times, name, reference)
    middle = statistics.median(found)
    aim = f"<= {at_most:g}" if at_most else f"{at_least:g}x faster" if at_least else ""
    met = middle <= at_most if at_most else 1 / middle >= at_least if at_least else None
    medians = [statistics.median(times[form]) for form in (name, reference)]
    compare.add(title, *medians, found, aim, met)


def plain_gradient(model, x):
    def form():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).amax(1).sum(), leaf)

    return form


@pytest.mark.parametrize("size", [64, 112])
@pytest.mark.parametrize("net", [vgg11, ResNet18])
@pytest.mark.benchmark(group="lrp")
def test_convolutional_nets(benchmark, compare, net, size):
    torch.manual_seed(0)
    model, x = prepared(net(), dtype=torch.float32), torch.rand(8, 3, size, size)
    td = TensorDict(x=x, batch_size=[8])
    forms = {"plain": plain_gradient(model, x)}
    for name, (composite, _) in COMPOSITES.items():
        for convention in ("gradient", "relevance"):
            explainer = LRP(as_td(model), composite, Target("logits", "argmax"), convention=convention)
            forms[f"{name}, {convention}"] = lambda explainer=explainer: explainer(td.copy())
        forms[f"{name}, by hand"] = lambda name=name: by_hand(model, name, x)
        found = forms[f"{name}, gradient"]()["attribution", "x"]
        torch.testing.assert_close(found, by_hand(model, name, x), rtol=0, atol=2e-3 * float(found.abs().max()))
    peers = {}
    if size == 64:
        peers = {f"zennit {name}": zennit(model, name, x) for name in ("EpsilonPlusFlat", "Alpha2Beta1Flat")}
        peers["tdhook EpsilonPlus"] = tdhook(copy.deepcopy(model), x)
    times = turns(forms | peers, 9 if size == 64 else 5)
    for name, (_, aim) in COMPOSITES.items():
        title = f"{net.__name__} {size}x{size} {name}"
        add(compare, f"{title} / gradient", times, f"{name}, gradient", "plain", at_most=aim)
        add(compare, "  by hand / gradient", times, f"{name}, by hand", "plain")
        add(compare, "  ours / by hand", times, f"{name}, gradient", f"{name}, by hand")
        add(compare, "  relevance convention / gradient", times, f"{name}, relevance", "plain", at_most=aim)
    for name in peers:
        add(compare, f"  {name} / gradient", times, name, "plain")
    benchmark.pedantic(forms["EpsilonPlusFlat, gradient"], rounds=1)


@pytest.mark.benchmark(group="lrp")
def test_inputs_of_any_sign(benchmark, compare):
    torch.manual_seed(0)
    model = prepared(vgg11(), dtype=torch.float32)
    for i, layer in enumerate(model):
        model[i] = nn.LeakyReLU(0.1) if isinstance(layer, nn.ReLU) else layer
    x = torch.randn(8, 3, 64, 64)
    td = TensorDict(x=x, batch_size=[8])
    forms = {"plain": plain_gradient(model, x)}
    for name in ("EpsilonPlusFlat", "Alpha2Beta1Flat"):
        explainer = LRP(as_td(model), COMPOSITES[name][0], Target("logits", "argmax"))
        forms[name] = lambda explainer=explainer: explainer(td.copy())
    times = turns(forms, 5)
    add(compare, "vgg11 64x64 any sign, EpsilonPlusFlat / gradient", times, "EpsilonPlusFlat", "plain", at_most=2.0)
    add(compare, "vgg11 64x64 any sign, Alpha2Beta1Flat / gradient", times, "Alpha2Beta1Flat", "plain", at_most=2.1)
    benchmark.pedantic(forms["EpsilonPlusFlat"], rounds=1)


@pytest.mark.benchmark(group="lrp")
def test_gpt2(benchmark, compare):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=1000, n_positions=64, n_embd=256, n_layer=4, n_head=8)
    body = transformers.GPT2LMHeadModel(config).eval()

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(inputs_embeds=x, use_cache=False).logits[:, -1]

    model, x = Head(), torch.randn(4, 64, 256)
    td = TensorDict(x=x, batch_size=[4])
    explainer = LRP(as_td(model), AttnLRP(), Target("logits", "argmax"))
    forms = {"plain": plain_gradient(model, x), "ours": lambda: explainer(td.copy())}
    times = turns(forms, 30)
    add(compare, "GPT-2, 4 layers, AttnLRP / gradient", times, "ours", "plain", at_most=1.15)
    benchmark.pedantic(forms["ours"], rounds=1)


PEAK = """
import sys, torch
sys.path[:0] = {paths}
torch.set_num_threads(1)
from tensordict import TensorDict
from lrp.nets import as_td, vgg11
from tdconcepts import Target
from tdconcepts.lrp import LRP, EpsilonPlusFlat
model, x = vgg11().eval(), torch.rand(32, 3, 64, 64)
def plain(x):
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
def lrp(x, convention):
    options = dict(convention=convention, chunk_size=32)  # at once: by default it would be in parts, for less
    LRP(as_td(model), EpsilonPlusFlat(), Target("logits", "argmax"), **options)(TensorDict(x=x, batch_size=[len(x)]))
forms = {{"plain": plain, "gradient": lambda x: lrp(x, "gradient"), "relevance": lambda x: lrp(x, "relevance")}}
form = forms[sys.argv[1]]
form(x[:1])
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
form(x)
print(kib("VmHWM") - before)
"""


def peak(form):
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
    run = [sys.executable, "-W", "ignore", "-c", PEAK.format(paths=paths), form]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux")
@pytest.mark.benchmark(group="lrp")
def test_peak_memory(benchmark, compare):
    """The highest resident memory above the start, each form in processes of its own (the columns are GiB)."""
    peaks = {form: [peak(form) / 2**20 for _ in range(3)] for form in ("plain", "gradient", "relevance")}
    middle = statistics.median(peaks["plain"])
    for form in ("gradient", "relevance"):
        found = [own / middle for own in peaks[form]]
        met = statistics.median(found) <= 1.3
        title = f"vgg11 batch 32 peak memory, EpsilonPlusFlat, {form} / gradient"
        compare.add(title, statistics.median(peaks[form]), middle, found, "<= 1.3", met)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.benchmark(group="lrp")
def test_compiled_policy(benchmark, compare):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(8, 4)
    td = TensorDict(x=x, batch_size=[8])
    explainer = LRP(as_td(net), EpsilonPlusFlat(), Target("logits", "argmax"))

    def damped(g, z):
        return g - EPSILON * g / (z.abs() + EPSILON)

    def hand(x, w1, b1, w2, b2, w3, b3):
        z1 = F.linear(x, w1, b1)
        z2 = F.linear(z1.relu(), w2, b2)
        z3 = F.linear(z2.relu(), w3, b3)
        g = torch.zeros_like(z3).scatter(1, z3.argmax(1, keepdim=True), 1.0)
        g = damped(damped(g, z3) @ w3 * (z2 > 0), z2) @ w2 * (z1 > 0)
        return ((g * z1).sum(1, keepdim=True) / 4).expand_as(x).clone()

    compiled_hand = torch.compile(hand, fullgraph=True)
    parameters = list(net.requires_grad_(False).parameters())
    by_torch, ours = torch.compile(explainer, fullgraph=True), Compiled(explainer)
    in_cpp = Compiled(explainer, options={"cpp_wrapper": True})
    rounds, many = 100, 10
    copies = iter([td.copy() for _ in range(4 * (rounds + 1) * 2 * many)])  # made while no time is taken
    forms = {
        "eager": lambda: explainer(next(copies)),
        "torch": lambda: by_torch(next(copies)),
        "tensors": lambda: ours(x),
        "ours": lambda: ours(next(copies)),
        "in C++": lambda: in_cpp(next(copies)),
        "by hand, compiled": lambda: compiled_hand(x, *parameters),
        "zennit": zennit(net, "EpsilonPlusFlat", x),
        "tdhook": tdhook(copy.deepcopy(net), x),
    }
    torch.testing.assert_close(forms["tensors"](), compiled_hand(x, *parameters), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forms["eager"]()["attribution", "x"], forms["zennit"](), atol=1e-5, rtol=1e-5)
    times = turns(forms, rounds, many)
    for peer in ("zennit", "tdhook"):
        add(compare, f"policy: Compiled / {peer}'s eager", times, "ours", peer, at_least=10)
        add(compare, f"  its wrapper in C++ / {peer}'s eager", times, "in C++", peer, at_least=10)
        add(compare, f"  called with tensors / {peer}'s eager", times, "tensors", peer, at_least=10)
        add(compare, f"  torch.compile alone / {peer}'s eager", times, "torch", peer)
    add(compare, "  by hand and compiled / zennit's eager", times, "by hand, compiled", "zennit")
    add(compare, "  our eager / zennit's eager", times, "eager", "zennit")
    torch._dynamo.reset()
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.benchmark(group="lrp")
def test_ten_targets_in_one_pass(benchmark, compare):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()
    net, td = as_td(nn.Sequential(*layers, nn.LazyLinear(10))), TensorDict(x=torch.randn(8, 3, 32, 32), batch_size=[8])
    net(td.copy())
    together = LRP(net, EpsilonPlus(), Target("logits", range(10)))
    each = [LRP(net, EpsilonPlus(), Target("logits", i)) for i in range(10)]
    forms = {"together": lambda: together(td.copy()), "ten": lambda: [one(td.copy()) for one in each]}
    add(compare, "ten targets in one pass / ten passes", turns(forms, 10), "together", "ten", at_most=0.5)
    benchmark.pedantic(forms["together"], rounds=1)
