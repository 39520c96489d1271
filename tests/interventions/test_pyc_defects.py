"""What went wrong in torch_concepts' interventions, one test for each finding of our study: it does not go wrong here.

The study read a development version; 1.0.0a7 has mended some (W1, W5, W8, W9 and the leading dims of W16). W2, W3, W10
and W11 are about layers and models: see the tests of the concepts room.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.hooks import Target
from tdconcepts.interventions import (
    Do,
    FromDistribution,
    GradientPolicy,
    GroundTruth,
    InterventionPipeline,
    PositiveWeights,
    RandomPolicy,
    Splice,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)

POLICIES = [UniformPolicy(), RandomPolicy(), UncertaintyPolicy(), GradientPolicy(Target("task", 0))]


def chain(space=None):
    """x -> c1 (root) -> c2 (its child) -> task: concepts behind concepts, and a task."""
    torch.manual_seed(0)
    return TensorDictSequential(
        Mod(nn.Sequential(nn.Linear(5, 3), nn.Sigmoid()), ["x"], ["c1"]),
        Mod(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), ["c1"], ["c2"]),
        Mod(nn.Linear(4, 2), ["c2"], ["task"]),
        Mod(nn.Identity(), ["task"], ["out"]),
    )


def data(*batch, dtype=torch.float32):
    return TensorDict({"x": torch.randn(*batch, 5, generator=torch.Generator().manual_seed(1)).to(dtype)}, batch)


def corrected(concepts, policy, strategy, **more):
    entries = {key: more.pop(key) for key in list(more) if isinstance(more[key], torch.Tensor)}
    td = TensorDict({"concepts": concepts, **entries}, concepts.shape[:-1])
    return InterventionPipeline(policy, strategy, more.pop("at", "concepts"), **more)(td)["concepts"]


def test_w1_the_most_influential_are_replaced():
    gradients = torch.tensor([0.1, 5.0, -10.0, 0.5])
    assert corrected(torch.zeros(4), GradientPolicy(key="g"), Do(7.0), fraction=0.5, g=gradients).tolist() == [
        0,
        7,
        7,
        0,
    ]
    head = Mod(nn.Linear(3, 1, bias=False), ["c"], ["y"])
    head.module.weight.data = torch.tensor([[0.1, -3.0, 1.0]])
    model = TensorDictSequential(Mod(nn.Identity(), ["x"], ["c"]), head)
    fixed = intervene(model, "c", policy=GradientPolicy(Target("y", 0)), strategy=Do(7.0), k=1)
    assert fixed(TensorDict({"x": torch.zeros(3)}))["c"].tolist() == [0, 7, 0]


def test_w1_without_gradients_nothing_is_replaced_in_silence():
    with pytest.raises(BadKey, match="no gradients"):
        corrected(torch.zeros(4), GradientPolicy(), Do(7.0), fraction=0.5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
def test_w1_a_quantile_is_a_fraction_whether_scores_tie_or_not(count, fraction):
    """Not 1 of 2 for q = 0, 3 of 4 for q = .9, 0 of 1 for q < 1; and under UniformPolicy not all of them."""
    for policy in (UniformPolicy(), RandomPolicy()):
        done = corrected(torch.zeros(6, count), policy, Do(7.0), fraction=fraction)
        assert (done == 7).sum(-1).tolist() == [round(fraction * count)] * 6


@pytest.mark.parametrize("quantile", [-0.1, 1.5, math.nan, math.inf])
def test_w1_a_quantile_out_of_range_is_not_clamped(quantile):
    with pytest.raises(BadValue, match="out of range"):
        intervene(chain(), "c1", strategy=Do(0.0), quantile=quantile)


def test_w4_a_ground_truth_is_not_a_logit():
    """There GT = 1 became the probability .731, GT = 0 became .5, and a correct -4.15 became 0."""
    logits = torch.tensor([4.0, -4.15])
    done = corrected(logits, UniformPolicy(), GroundTruth("y", space="logits"), y=torch.tensor([1, 0]))
    assert done.sigmoid().tolist() == pytest.approx([1, 0], abs=2e-4)


def test_w4_evidence_and_intervention_are_one_result():
    """The head sees the same, whether the truth is put in by an intervention or is what the concepts are."""
    model, labels = chain(), torch.tensor([[1.0, 0.0, 1.0]])
    td = data(1).set("labels", labels)
    done = intervene(model, "c1", strategy=GroundTruth("labels"))(td)["task"]
    given = TensorDictSequential(*list(model.module)[1:])(TensorDict({"c1": labels}, [1]))["task"]
    assert torch.equal(done, given)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("at", ["c1", "c2", "x"])
def test_w5_any_entry_and_any_policy(policy, at):
    """There only concepts fed by the encoder could be intervened on: names of arguments clashed."""
    td = intervene(chain(), at, policy=policy, strategy=Do(0.25), k=2)(data(5))
    assert (td[at] == 0.25).sum(-1).tolist() == [2] * 5


def test_w5_the_task_itself():
    td = intervene(chain(), "task", policy=UncertaintyPolicy(0.0), strategy=Do(0.25), k=1)(data(5))
    assert (td["out"] == 0.25).sum(-1).tolist() == [1] * 5


def test_w6_a_deep_copy_runs_its_own_weights():
    fixed = intervene(chain(), "c1", strategy=Do(0.25), among=[0])
    copied = copy.deepcopy(fixed)
    averaged = torch.optim.swa_utils.AveragedModel(fixed)
    with torch.no_grad():
        copied[3].module.bias.fill_(42)
        averaged.module[3].module.bias.fill_(100)
    assert (copied(data(5))["task"] > 30).all()
    assert (averaged(data(5))["task"] > 90).all()
    assert (fixed(data(5))["task"] < 30).all()
    copied.module[1].module["value"] = Do(0.75)
    assert (copied(data(5))["c1"][:, 0] == 0.75).all()
    assert (fixed(data(5))["c1"][:, 0] == 0.25).all()


def test_w6_it_pickles_and_saves_and_a_subclass_is_asked():
    fixed = intervene(chain(), "c1", policy=UncertaintyPolicy(), strategy=Do(0.25), k=1)
    file = io.BytesIO()
    torch.save(fixed, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(fixed)), torch.load(file, weights_only=False)):
        assert torch.equal(other(data(5))["task"], fixed(data(5))["task"])

    class Louder(Do):
        def compute(self, concepts, tensordict):
            return 2 * super().compute(concepts, tensordict)

    assert corrected(torch.zeros(2), UniformPolicy(), Louder(0.5)).tolist() == [1, 1]


def test_w7_nan_and_infinity_stay_where_they_are():
    nan, inf = math.nan, math.inf
    concepts = torch.tensor([0.5, 0.25])
    label = torch.tensor([1.0, nan])
    assert corrected(concepts, UniformPolicy(), GroundTruth("y"), among=[0], y=label).tolist() == [1, 0.25]
    for bad in (nan, inf):  # a prediction that is replaced
        assert corrected(torch.tensor([bad, 0.25]), UniformPolicy(), Do(1.0), among=[0]).tolist() == [1, 0.25]
    assert corrected(concepts, UniformPolicy(), Do([inf, inf]), among=[0]).tolist() == [inf, 0.25]
    scores = torch.tensor([nan, 0.3, 0.2])  # one NaN score does not poison its row
    assert corrected(torch.zeros(3), lambda c, td: td["s"], Do(7.0), k=1, s=scores).tolist() == [0, 7, 0]
    low = torch.tensor([-5.0, -1.0, -2.0])  # nor does a score below -1
    assert corrected(torch.zeros(3), lambda c, td: td["s"], Do(7.0), k=1, s=low).tolist() == [0, 7, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES[:3], ids=lambda p: type(p).__name__)
def test_w8_half_precision(dtype, policy):
    concepts = torch.rand(6, 5).to(dtype)
    for fraction in (0.2, 0.5, 1.0):
        done = corrected(concepts, policy, Do(7.0), fraction=fraction)
        assert done.dtype is dtype
        assert (done == 7).sum(-1).tolist() == [round(fraction * 5)] * 6
        assert done.isfinite().all()


def test_w8_under_autocast():
    with torch.autocast("cpu", dtype=torch.float16):
        td = intervene(chain(), "c1", policy=UncertaintyPolicy(), strategy=Do(0.25), k=2)(data(5))
    assert td["task"].isfinite().all()
    assert td["intervention", "mask"].sum(-1).tolist() == [2] * 5


def test_w9_the_wrapped_layer_is_not_destroyed():
    model = chain()
    before, plain = copy.deepcopy(model.state_dict()), model(data(5))["task"]
    fixed = intervene(model, "c1", strategy=PositiveWeights(), among=[0])
    assert torch.equal(fixed(data(5))["c1"], fixed(data(5))["c1"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(data(5))["task"], plain)


def test_w12_categorical_concepts_are_not_split():
    """There the one-hot truth (0, 0, 1) made (2, 0, 1) of the logits (2, .1, -.2)."""
    splice = Splice(cardinalities=(3,), space="logits")
    for fraction in (0.4, 0.6, 1.0):
        done = corrected(
            torch.tensor([2.0, 0.1, -0.2]),
            UncertaintyPolicy(),
            GroundTruth("y"),
            at=splice,
            fraction=fraction,
            y=torch.tensor([0.0, 0.0, 1.0]),
        )
        assert torch.equal(done, torch.tensor([2.0, 0.1, -0.2])) if fraction < 0.5 else done.argmax() == 2
        assert fraction < 0.5 or done.softmax(-1).tolist() == pytest.approx([0, 0, 1], abs=3e-4)


def test_w13_an_intervention_is_never_a_silent_no_op_and_changes_nothing_of_the_caller():
    """There evidence on a variable won over an intervention on it, and the dict of evidence was changed."""
    fixed = intervene(chain(), "c1", strategy=Do(0.25))
    evidence = torch.rand(5, 3)
    td = data(5).set("c1", evidence)
    given, kept = td["x"], evidence.clone()
    assert (fixed(td)["c1"] == 0.25).all()
    assert td["x"] is given
    assert torch.equal(evidence, kept)
    with pytest.raises(BadValue, match="change nothing"):
        intervene(TensorDictSequential(Mod(nn.Linear(5, 3), ["x"], ["c1", "y"])), "c1", strategy=Do(0.25))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks, from Python 3.12 on
def test_w14_results_and_pipelines_cross_processes():
    model = chain().requires_grad_(False)  # torch sends no graphs to other processes
    fixed = intervene(model, "c1", policy=UncertaintyPolicy(), strategy=GroundTruth("y"), k=1)
    rows = data(6).set("y", torch.ones(6, 3))
    expected = fixed(rows.copy())
    again = pickle.loads(pickle.dumps(expected))
    assert torch.equal(again["intervention", "mask"], expected["intervention", "mask"])
    loader = torch.utils.data.DataLoader(
        rows, batch_size=3, num_workers=2, collate_fn=fixed, multiprocessing_context="fork", timeout=30
    )
    assert torch.equal(torch.cat([batch["c1"] for batch in loader]), expected["c1"])


def test_w15_selection_by_name_also_compiled():
    torch._dynamo.reset()
    fixed = intervene(chain(), "c1", strategy=Do(0.25), among=["b", "c"], concepts=["a", "b", "c"], k=1)
    for run in (fixed, torch.compile(fixed, fullgraph=True, backend="eager")):
        assert (run(data(5))["c1"] == 0.25).tolist() == [[False, True, False]] * 5


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 3), (0,)])
def test_w16_any_number_of_leading_dims(batch):
    fixed = intervene(chain(), "c1", policy=GradientPolicy(Target("task", 0)), strategy=Do(0.25), k=2)
    assert (fixed(data(*batch))["c1"] == 0.25).sum(-1).eq(2).all()


def test_w16_by_name_they_nest():
    concepts = ["a", "b", "c"]
    once = intervene(chain(), "c1", strategy=Do(0.25), among=["a"], concepts=concepts)
    td = intervene(once, "c1", strategy=Do(0.75), among=["c"])(data(5))  # the names are known from the first
    assert (td["c1"][:, [0, 2]] == torch.tensor([0.25, 0.75])).all()
    behind = intervene(once, "c2", strategy=Do(0.5), out_key="second")(data(5))
    assert (behind["c2"] == 0.5).all()
    assert (behind["c1"][:, 0] == 0.25).all()


def test_w16_a_batch_of_another_size_and_one_row():
    """There the truth was frozen at construction: a smaller batch raised, and one row came back as four."""
    fixed = intervene(chain(), "c1", strategy=GroundTruth("y"))
    for rows in (4, 3, 1):
        assert fixed(data(rows).set("y", torch.ones(rows, 3)))["c1"].tolist() == [[1] * 3] * rows
    normal = torch.distributions.Normal(torch.zeros(3), 1.0)
    assert corrected(torch.zeros(3, 3), UniformPolicy(), FromDistribution(normal)).shape == (3, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_w17_gradients_in_any_mode(mode):
    model = chain()
    expected = intervene(model, "c2", policy=GradientPolicy(Target("task", 0)), strategy=Do(0.25), k=1)(data(5))
    with mode():
        fixed = intervene(model, "c2", policy=GradientPolicy(Target("task", 0)), strategy=Do(0.25), k=1)
        td = fixed(data(5))
    torch.testing.assert_close(td["intervention", "score"], expected["intervention", "score"])
    assert torch.equal(td["intervention", "score"][0], model[2].module.weight[0].detach().abs())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_it_maps_and_compiles_with_every_policy(policy):
    torch._dynamo.reset()
    fixed = intervene(chain(), "c2", policy=policy, strategy=Do(0.25), k=2)
    for run in (
        torch.vmap(lambda x: fixed(TensorDict({"x": x}))["c2"], randomness="different"),
        lambda x: torch.compile(fixed, fullgraph=True, backend="eager")(TensorDict({"x": x}, [5]))["c2"],
    ):
        assert (run(data(5)["x"]) == 0.25).sum(-1).tolist() == [2] * 5
