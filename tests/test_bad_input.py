"""Bad input, case by case: an error of ours that says the way out, and nothing of the caller's has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import tdconcepts as tdc
from tdconcepts import Site, Target, TdConceptsError


def model() -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), ["x"], ["hidden"]),
        TensorDictModule(nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()), ["hidden"], ["concepts"]),
        TensorDictModule(nn.Linear(3, 2), ["concepts"], ["logits"]),
    )


def rows() -> TensorDict:
    return TensorDict(
        x=torch.randn(5, 4),
        action=torch.tensor([0, 1, 1, 0, 1]),
        tokens=torch.arange(5),
        labels=torch.ones(5, 3),
        donor=torch.zeros(5, 3),
        batch_size=[5],
    )


class Skips(nn.Module):
    """A module inside that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def skipping() -> TensorDictModule:
    return TensorDictModule(Skips(), ["x"], ["logits"])


def compiled() -> TensorDictSequential:
    net = model()
    net[0].module.compile(backend="eager")
    return net


def other_batch() -> TensorDict:
    return TensorDict(x=torch.randn(5, 4), action=torch.tensor([[0], [1], [1], [0], [1]]).repeat(1, 2), batch_size=[5])


def gradient(net, target=None, wrt="x", **options):
    return tdc.Gradient(net, Target("logits", 0) if target is None else target, wrt, **options)


def intervened(net, **options):
    return tdc.intervene(net, at="concepts", policy=tdc.UncertaintyPolicy(), **options)


# what is wrong: (model, TensorDict, what is done with them, kind of error, a word of the way out)
CASES = {
    "an unknown entry to explain": (model, rows, lambda m, td: gradient(m, Target("lgits", 0))(td), KeyError, "logits"),
    "an unknown entry to explain by": (model, rows, lambda m, td: gradient(m, wrt="y")(td), KeyError, "y"),
    "an entry that is missing": (model, rows, lambda m, td: gradient(m)(td.exclude("x")), KeyError, "'x'"),
    "no entry to choose the target by": (
        model,
        rows,
        lambda m, td: gradient(m, Target("logits", by="choice"))(td),
        KeyError,
        "choice",
    ),
    "an unknown path": (model, rows, lambda m, td: tdc.capture(m, "0.7"), KeyError, "0.0"),
    "a glob without a match": (model, rows, lambda m, td: tdc.capture(m, "blocks.*"), KeyError, "path"),
    "an unknown entry to patch": (model, rows, lambda m, td: tdc.patch(m, {"h": tdc.Scale(2.0)}), KeyError, "hidden"),
    "no entry to replace with": (
        model,
        rows,
        lambda m, td: tdc.patch(m, {"hidden": tdc.Replace("other")})(td),
        KeyError,
        "other",
    ),
    "a site that never ran": (skipping, rows, lambda m, td: tdc.capture(m, "idle")(td), ValueError, "never ran"),
    "a site in an explainer that never ran": (
        skipping,
        rows,
        lambda m, td: gradient(m, wrt=Site("idle"))(td),
        ValueError,
        "never ran",
    ),
    "a replacement of another shape": (
        model,
        rows,
        lambda m, td: tdc.patch(m, {Site("0.0"): tdc.Replace(torch.zeros(1, 6))})(td),
        ValueError,
        "[1, 6]",
    ),
    "an edit that changes the shape": (
        model,
        rows,
        lambda m, td: tdc.patch(m, {Site("0.0"): lambda value, td: value[:1]})(td),
        ValueError,
        "shape",
    ),
    "labels of another shape": (
        model,
        rows,
        lambda m, td: intervened(m, strategy=tdc.GroundTruth("labels"))(td.set("labels", torch.ones(5, 2))),
        ValueError,
        "labels",
    ),
    "a target out of range": (model, rows, lambda m, td: gradient(m, Target("logits", 2))(td), ValueError, "range"),
    "an action out of range": (
        model,
        rows,
        lambda m, td: gradient(m, Target("logits", by="action"))(td.set("action", td["action"] + 1)),
        ValueError,
        "[0, 2)",
    ),
    "a neuron out of range": (model, rows, lambda m, td: tdc.NeuronGradient(m, "0.0", 6)(td), ValueError, "neuron"),
    "a target with several numbers": (
        model,
        rows,
        lambda m, td: gradient(m, Target("logits"))(td),
        ValueError,
        "argmax",
    ),
    "an action with another batch": (
        model,
        other_batch,
        lambda m, td: gradient(m, Target("logits", by="action"))(td),
        ValueError,
        "[5]",
    ),
    "an activation without the batch": (
        lambda: TensorDictModule(
            nn.Sequential(nn.Flatten(0), nn.Linear(20, 10), nn.Unflatten(0, (5, 2))), ["x"], ["y"]
        ),
        rows,
        lambda m, td: tdc.capture(m, "1")(td),
        ValueError,
        "batch",
    ),
    "a bare module to explain": (model, rows, lambda m, td: gradient(nn.Linear(4, 2)), TypeError, "TensorDictModule("),
    "a bare module to patch": (
        model,
        rows,
        lambda m, td: tdc.patch(nn.Linear(4, 2), {Site("."): tdc.Scale(2.0)}),
        TypeError,
        "TensorDictModule(",
    ),
    "a bare module to intervene on": (
        model,
        rows,
        lambda m, td: tdc.intervene(nn.Linear(4, 2), strategy=tdc.Do(0.0)),
        TypeError,
        "TensorDictModule(",
    ),
    "a compiled model without anchors": (
        compiled,
        rows,
        lambda m, td: tdc.capture(m, "0.0")(td),
        ValueError,
        "anchor(",
    ),
    "an explainer of a compiled model without anchors": (
        compiled,
        rows,
        lambda m, td: gradient(m, wrt=Site("0.0"))(td),
        ValueError,
        "anchor(",
    ),
    "a locked TensorDict to explain": (model, rows, lambda m, td: gradient(m)(td.lock_()), ValueError, "td.copy()"),
    "a locked TensorDict to capture in": (
        model,
        rows,
        lambda m, td: tdc.capture(m, "0.0")(td.lock_()),
        ValueError,
        "td.copy()",
    ),
    "a fraction above one": (
        model,
        rows,
        lambda m, td: intervened(m, strategy=tdc.Do(0.0), fraction=1.5),
        ValueError,
        "[0, 1]",
    ),
    "a negative fraction": (
        model,
        rows,
        lambda m, td: intervened(m, strategy=tdc.Do(0.0), fraction=-0.1),
        ValueError,
        "[0, 1]",
    ),
    "an integer entry asked for gradients": (
        lambda: TensorDictModule(nn.Embedding(5, 2), ["tokens"], ["logits"]),
        rows,
        lambda m, td: gradient(m, wrt=None)(td),
        TypeError,
        "wrt=Site(",
    ),
    "an integer target": (
        lambda: TensorDictModule(lambda x: x.argmax(-1), ["x"], ["logits"]),
        rows,
        lambda m, td: gradient(m, Target("logits"))(td),
        TypeError,
        "logits",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_says_the_way_out_and_nothing_has_changed(name: str) -> None:
    make, make_rows, act, kind, word = CASES[name]
    net, td = make(), make_rows()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    before, weights = {k: v.clone() for k, v in td.items()}, copy.deepcopy(dict(net.state_dict()))
    pointers = {k: v.data_ptr() for k, v in td.items()}
    with pytest.raises(TdConceptsError) as caught:
        act(net, td)
    assert isinstance(caught.value, kind)
    text = str(caught.value)
    assert word in text
    assert "got: " in text or "needed: " in text
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    for key, value in before.items():
        if key not in ("action", "labels", "y"):  # which some cases set themselves
            assert torch.equal(td[key], value)
            assert td[key].data_ptr() == pointers[key]
            assert not td[key].requires_grad
    for key, value in net.state_dict().items():
        assert torch.equal(value, weights[key])


def test_a_nan_in_an_untouched_place_stays_there() -> None:
    net, td = model(), rows()
    td["x"][2] = float("nan")
    out = tdc.intervene(net, at="concepts", strategy=tdc.Do(1.0), among=[0])(td)
    assert torch.equal(out["concepts"][:, 0], torch.ones(5))
    assert out["concepts"][2, 1:].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert not out["concepts"][others].isnan().any()
    assert not out["logits"][others].isnan().any()


def test_a_nan_behind_a_replacement_does_not_reach_the_gradient() -> None:
    net = model()
    concepts = torch.tensor([[0.2, float("nan"), 0.7]], requires_grad=True)
    pipeline = tdc.InterventionPipeline(tdc.UniformPolicy(), tdc.Do(0.0), among=[1])
    out = net[2](pipeline(TensorDict(concepts=concepts, batch_size=[1])))
    out["logits"].sum().backward()
    assert not out["logits"].isnan().any()
    assert not concepts.grad.isnan().any()
    assert concepts.grad[0, 1] == 0
