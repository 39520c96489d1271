"""Pruning, task vectors and adapters: against torch's own pruning, models with written weights, and the papers."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.attribution import IntegratedGradients
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target, Weights
from tdconcepts.hooks.sites import parameter_paths
from tdconcepts.lrp import LRP, EpsilonPlus
from tdconcepts.weights import LoRA, LowRank, Masked, Shifted, TaskVector, prune


def make(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return TensorDictModule(net, ["x"], ["y"]), TensorDict(x=torch.randn(6, 4).double(), batch_size=[6])


def written(net, changes):
    """A copy of the model with the changes written into its weights."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in parameter_paths(other).items():
            if name in changes:
                parameter.copy_(changes[name](parameter))
    return other


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_global_magnitude_equals_torchs(fraction):
    from torch.nn.utils import prune as torchs

    net, td = make()
    other = copy.deepcopy(net)
    torchs.global_unstructured(
        [(other.module[0], "weight"), (other.module[2], "weight")], torchs.L1Unstructured, amount=fraction
    )
    with prune(net, fraction) as m:
        torch.testing.assert_close(m(td.clone())["y"], other(td.clone())["y"])
        kept = sum(int(change.mask.sum()) for change in m.program.changes.values())
    assert kept == 56 - round(fraction * 56)


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_in_each_equal_torchs(dim):
    from torch.nn.utils import prune as torchs

    net, td = make()
    other = copy.deepcopy(net)
    for layer in (other.module[0], other.module[2]):
        torchs.ln_structured(layer, "weight", 0.5, n=2, dim=dim)
    if dim == 0:
        torchs.ln_structured(other.module[2], "weight", 0.0, n=2, dim=0)
    with prune(net, 0.5, scope="each", dim=dim) as m:
        for name, layer in (("0.weight", other.module[0]), ("2.weight", other.module[2])):
            assert torch.equal(m.program.changes[name](layer.weight_orig), layer.weight)
        torch.testing.assert_close(m(td.clone())["y"], other(td.clone())["y"])


def test_channels_of_kernels():
    net = TensorDictModule(nn.Conv2d(2, 4, 3), ["x"], ["y"])
    mask = prune(net, 0.5, dim=0).program.changes["weight"].mask
    size = net.module.weight.flatten(1).norm(dim=-1)
    assert torch.equal(mask[:, 0, 0, 0], size >= size.sort().values[2])
    assert torch.equal(mask, mask[:, :1, :1, :1].expand(4, 2, 3, 3))
    assert prune(net, 0.5, dim=0, only="bias").program.changes["bias"].mask.sum() == 2


def test_by_score_and_by_name():
    net, _ = make()
    scores = {"0.weight": torch.arange(32.0).view(8, 4)}
    for score in (scores, lambda name, parameter: scores[name]):
        mask = prune(net, 0.25, score=score, only="0.weight").program.changes["0.weight"].mask
        assert torch.equal(mask.flatten(), torch.arange(32) >= 8)
    ties = prune(net, 0.25, score=lambda name, p: torch.ones_like(p), only=["0.*"]).program.changes
    assert set(ties) == {"0.weight", "0.bias"}
    assert torch.equal(ties["0.weight"].mask.flatten(), torch.arange(32) >= 10)


def test_what_explains_a_changed_model_explains_the_changes():
    net, td = make()
    changes = prune(net, 0.5).program.changes
    other = written(net, changes)
    for explain in (
        lambda m: IntegratedGradients(m, Target("y", 1), n_steps=4),
        lambda m: LRP(m, EpsilonPlus(), Target("y", 1)),
    ):
        before, expected = explain(net)(td.clone())["attribution", "x"], explain(other)(td.clone())["attribution", "x"]
        outside = explain(net)
        with prune(net, 0.5) as m:
            torch.testing.assert_close(explain(m)(td.clone())["attribution", "x"], expected)
            torch.testing.assert_close(outside(td.clone())["attribution", "x"], expected)
        assert torch.equal(explain(net)(td.clone())["attribution", "x"], before)


def test_task_vectors():
    base, td = make()
    tuned, other = make(1)[0], make(2)[0]
    one, two = TaskVector.between(base, tuned), TaskVector.between(base, other)
    for task, scale, deltas in (
        (one, 1.0, lambda a, b: a),
        (-one, 0.5, lambda a, b: -0.5 * a),
        (one + 2 * two, 1.0, lambda a, b: a + 2 * b),
        (one - two, 1.0, lambda a, b: a - b),
        (TaskVector.merge([one, two]), 1.0, lambda a, b: a + b),
        (TaskVector.merge([one, two], "mean"), 3.0, lambda a, b: 1.5 * (a + b)),
    ):
        changes = {n: Shifted(deltas(one.deltas[n], two.deltas[n])) for n in one.deltas}
        with task.on(base, scale) as m:
            torch.testing.assert_close(m(td.clone())["y"], written(base, changes)(td.clone())["y"])
    with one.on(base) as m:
        torch.testing.assert_close(m(td.clone())["y"], tuned(td.clone())["y"])
    assert one.norm() == pytest.approx(float(torch.cat([d.flatten() for d in one.deltas.values()]).norm()))


def test_ties_merging_by_hand():
    vectors = [
        TaskVector({"w": torch.tensor([4.0, -3.0, 0.1, 2.0])}),
        TaskVector({"w": torch.tensor([-1.0, -5.0, 3.0, 0.2])}),
        TaskVector({"w": torch.tensor([0.1, 4.0, 0.2, -6.0])}),
    ]
    merged = TaskVector.merge(vectors, "ties", keep=0.5)  # [4 -3 0 0], [0 -5 3 0], [0 4 0 -6]
    assert torch.equal(merged.deltas["w"], torch.tensor([4.0, -4.0, 3.0, -6.0]))


def test_adapters_by_svd_are_the_nearest_of_their_rank():
    base, td = make()
    task = TaskVector.between(base, make(1)[0])
    full = LoRA.of(task, base, 8)
    for name, delta in full.task_vector(base).deltas.items():
        torch.testing.assert_close(delta, task.deltas[name])
    low = LoRA.of(task, base, 2).task_vector(base).deltas["0.weight"]
    values = torch.linalg.svdvals(task.deltas["0.weight"])
    assert torch.linalg.matrix_rank(low) == 2
    assert float((low - task.deltas["0.weight"]).norm()) == pytest.approx(float(values[2:].norm()))
    with LoRA.of(task, base, 8).on(base) as m:
        expected = written(base, {n: Shifted(d) for n, d in task.deltas.items() if d.ndim > 1})
        torch.testing.assert_close(m(td.clone())["y"], expected(td.clone())["y"])


def test_adapters_learn_and_the_model_stays():
    net, td = make()
    net.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    lora = LoRA(net, 2, "0.*eight", alpha=4.0, generator=torch.Generator().manual_seed(0))
    goal = make(3)[0](td.clone())["y"].detach()
    optimiser = torch.optim.Adam(lora.parameters(), 0.05)
    losses = []
    with lora.on(net) as m:
        assert torch.equal(m(td.clone())["y"], net(td.clone())["y"])
        for _ in range(60):
            optimiser.zero_grad()
            loss = (m(td.clone())["y"] - goal).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        learned = m(td.clone())["y"]
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with lora.task_vector(net).on(net) as m:
        torch.testing.assert_close(m(td.clone())["y"], learned)


def test_what_has_not_changed_is_not_computed_again():
    net, td = make()
    net.requires_grad_(False)
    mask = torch.ones(8, 4, dtype=torch.bool)
    made = []

    class Counted(Masked):
        def __call__(self, parameter):
            made.append(1)
            return super().__call__(parameter)

    with Weights({"0.weight": Counted(mask)}).on(net) as m:
        first = m(td.clone())["y"]
        assert torch.equal(m(td.clone())["y"], first)
        assert torch.equal(net(td.clone())["y"], first)
        assert len(made) == 1
        mask[0] = False
        second = m(td.clone())["y"]
        assert not torch.equal(second, first)
        net.module[0].weight.mul_(2.0)
        assert not torch.equal(m(td.clone())["y"], second)
        assert len(made) == 3
        doubled = m(td.clone())["y"]
        with Weights({"0.weight": lambda w: w + 1}).on(net):
            inner = net(td.clone())["y"]
        expected = written(net, {"0.weight": lambda w: torch.where(mask, w, 0.0) + 1})
        torch.testing.assert_close(inner, expected(td.clone())["y"])
        assert torch.equal(m(td.clone())["y"], doubled)
    with Weights({"0.weight": lambda w: w + 1}).on(net), m:
        expected = written(net, {"0.weight": lambda w: torch.where(mask, w + 1, 0.0)})
        torch.testing.assert_close(m(td.clone())["y"], expected(td.clone())["y"])


def test_kernels_count_as_inputs():
    net = TensorDictModule(nn.Conv2d(2, 3, 3), ["x"], ["y"])
    lora = LoRA(net, 1, generator=torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in lora.parameters()] == [(3, 1), (1, 18)]
    with torch.no_grad():
        lora.left[0].fill_(1.0)
    x = torch.randn(2, 2, 5, 5)
    with lora.on(net) as m:
        weight = net.module.weight + (lora.left[0] @ lora.right[0]).view(3, 2, 3, 3)
        expected = nn.functional.conv2d(x, weight, net.module.bias)
        torch.testing.assert_close(m(TensorDict(x=x, batch_size=[2]))["y"], expected)


def test_changes_are_data():
    w = torch.tensor([[1.0, float("nan")]])
    assert Masked(torch.tensor([[True, False]]))(w).tolist() == [[1.0, 0.0]]
    assert LowRank(torch.ones(1, 1), torch.ones(1, 2), 2.0)(torch.zeros(1, 2)).tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda net: prune(net, 1.5), BadValue, "fraction"),
        (lambda net: prune(net, "most"), BadValue, "fraction"),
        (lambda net: TaskVector.between(net, None), BadType, "not a model"),
        (lambda net: prune(net, 0.5, scope="all"), BadValue, "scope"),
        (lambda net: prune(net, 0.5, score="size"), BadValue, "score"),
        (lambda net: prune(net, 0.5, score={}), BadKey, "no score for"),
        (lambda net: prune(net, 0.5, score=lambda n, p: p[0]), BadValue, "no score for"),
        (lambda net: prune(net, 0.5, score=lambda n, p: p / 0), BadValue, "finite"),
        (lambda net: prune(net, 0.5, dim=2), BadValue, "no such dim"),
        (lambda net: prune(net, 0.5, only="1.weight"), BadKey, "no parameter"),
        (lambda net: prune(net, 0.5, only=[]), BadKey, "no parameters"),
        (lambda net: LoRA(net, 0), BadValue, "rank"),
        (lambda net: LoRA(net, 1, "0.bias"), BadValue, "low rank"),
        (lambda net: TaskVector.merge([]), BadValue, "merged"),
        (lambda net: TaskVector.between(net, net.module[0]), BadKey, "not the same"),
        (lambda net: TaskVector({"a": torch.ones(1)}) + TaskVector({"a": torch.ones(2)}), BadValue, "shapes"),
    ],
)
def test_bad_input(act, error, text):
    with pytest.raises(error, match=text):
        act(make()[0])
