"""What goes wrong in silence, or crashes, in torch_concepts 1.0.0a7, one test for each finding about concept models.

The numbers (W2, W3, ...) are those of the study that this room was built from; findings about interventions alone are
tested with these.
"""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.concepts import (
    CausalBottleneck,
    ConceptBottleneck,
    ConceptEmbedding,
    ConceptLoss,
    ConceptMemoryReasoner,
    ConceptSpec,
    Dag,
    GraphBottleneck,
    LogicRules,
    MemorySelector,
    TeacherForcing,
    teach,
)
from tdconcepts.hooks import Target
from tdconcepts.interventions import (
    Do,
    GradientPolicy,
    GroundTruth,
    RandomPolicy,
    UncertaintyPolicy,
    UniformPolicy,
    intervene,
)
from tdconcepts.metrics import causal_concept_effect

SPEC = ConceptSpec(["colour", "wing", "shape"], [3, 1, 3])
DAG = Dag(SPEC.names, [("colour", "wing"), ("shape", "wing")])


def body():
    return nn.Linear(4, 8)


MODELS = {
    "bottleneck": lambda: ConceptBottleneck(nn.Linear(4, 7), nn.Linear(7, 2), SPEC),
    "embedding": lambda: ConceptEmbedding(body(), 2, SPEC, in_features=8),
    "reasoner": lambda: ConceptMemoryReasoner(body(), 2, SPEC, in_features=8),
    "graph": lambda: GraphBottleneck(body(), DAG, SPEC, in_features=8),
    "causal": lambda: CausalBottleneck(body(), DAG, SPEC, in_features=8),
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def data(*batch):
    return TensorDict({"observation": torch.randn(*batch, 4, generator=torch.Generator().manual_seed(0))}, batch)


def test_w2_a_selector_of_one_output_reads_its_input():
    selector = MemorySelector(4, 5, 3, 1)
    x = torch.randn(6, 4)
    assert selector(latent=x).std(0).max() > 1e-3
    torch.testing.assert_close(selector.weights(x).sum(-1), torch.ones(6, 1))


@models
def test_w3_concepts_of_one_cardinality_have_a_softmax_each(build):
    concepts = build()(data(9))["concepts"]
    for name in ("colour", "shape"):
        torch.testing.assert_close(concepts[:, SPEC.slice(name)].sum(-1), torch.ones(9))


@pytest.mark.parametrize("space", ["probs", "logits"])
def test_w4_a_true_label_is_certain_in_either_space(space):
    model = ConceptBottleneck(nn.Linear(4, 7), nn.Linear(7, 2), SPEC, space=space)
    td = data(2).set("labels", torch.tensor([[2, 1, 0], [0, 0, 1]]))
    for out in (
        teach(model, how="independent")(td.copy()),
        intervene(model, strategy=GroundTruth("labels"))(td.copy()),
    ):
        probs = out["concepts"] if space == "probs" else SPEC.probs(out["concepts"])
        torch.testing.assert_close(probs, SPEC.targets(td["labels"]), atol=4e-4, rtol=0)


@models
def test_w6_a_copy_runs_itself(build):
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.3)
    expected = build()
    expected.load_state_dict(twin.state_dict())
    td = data(3)
    assert torch.equal(twin(td.copy())["concepts"], expected(td.copy())["concepts"])
    assert not torch.equal(twin(td.copy())["concepts"], model(td.copy())["concepts"])
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(td.copy())["concepts"], model(td.copy())["concepts"])


def test_w7_a_missing_label_stays_where_it_is():
    spec = ConceptSpec(2)
    labels = torch.tensor([[1.0, torch.nan]])
    logits = torch.zeros(1, 2, requires_grad=True)
    mask, taught = TeacherForcing(spec, probability=1.0)(logits.sigmoid(), labels)
    assert mask.tolist() == [[True, False]]
    assert taught.tolist() == [[1.0, 0.5]]
    loss = ConceptLoss(spec)(logits, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.tolist() == [[-0.5, 0.0]]


def test_w7_a_prediction_that_is_not_finite_goes_where_it_is_replaced():
    _, taught = TeacherForcing(ConceptSpec(2), probability=1.0)(
        torch.tensor([[torch.nan, torch.inf]]), torch.ones(1, 2)
    )
    assert taught.tolist() == [[1.0, 1.0]]
    model = GraphBottleneck(body(), DAG, SPEC, in_features=8)
    do = torch.full((1, 7), torch.nan)
    do[:, [0, 1, 2, 4, 5, 6]] = 0.0
    td = TensorDict({"observation": torch.full((1, 4), torch.nan), "do": do}, [1])
    assert model(td)["concepts"].isfinite().all()


@models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_w8_half_precision_gives_numbers(build, dtype):
    model = build().to(dtype)
    td = data(5).to(dtype)
    assert model(td)["concepts"].isfinite().all()
    assert td["concepts"].dtype is dtype


def test_w10_names_follow_their_columns():
    td = TensorDict({"concepts": torch.arange(7.0).expand(2, 7)}, [2])
    assert SPEC.split(td)["concepts", "shape"][0].tolist() == [4, 5, 6]
    assert SPEC.split(td)["concepts"].flip(0)["shape"][0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("n", [112, 312, 1000])
def test_w11_a_perfect_rule_of_many_concepts_is_certain(n):
    rules = LogicRules(n, 1, 1)
    rules.decoder = nn.Identity()
    rules.memory = nn.Parameter(torch.tensor([60.0, 0, 0]).repeat_interleave(n).reshape(1, 1, -1))
    truth, _ = rules(torch.ones(n), torch.ones(1, 1))
    assert truth.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", [GraphBottleneck, CausalBottleneck])
def test_w13_what_is_set_is_not_changed_and_an_intervention_is_followed_beside_it(kind):
    """There evidence on a variable made an intervention on it a silent no-op, and the dict of evidence was changed."""
    model = kind(body(), DAG, SPEC, in_features=8)
    do = torch.full((3, 7), torch.nan)
    do[:, SPEC.slice("colour")] = torch.tensor([1.0, 0, 0])
    td = data(3).set("do", do.clone())
    fixed = intervene(model, strategy=Do([0.0, 1, 0, 0, 0, 0, 1]), among=["colour"])(td)
    torch.testing.assert_close(td["do"], do, equal_nan=True)
    other = do.clone()
    other[:, SPEC.slice("colour")] = torch.tensor([0.0, 1, 0])
    expected = model(data(3).set("do", other))
    assert torch.equal(fixed["concepts"], expected["concepts"])
    assert fixed["intervention", "before"][:, SPEC.slice("colour")].tolist() == [[1.0, 0, 0]] * 3
    last = kind(body(), DAG, SPEC, in_features=8)
    last.load_state_dict(model.state_dict())
    assert torch.equal(last(data(3).set("do", do))["concepts"], model(data(3).set("do", do))["concepts"])


def test_w14_labelled_rows_and_their_spec_can_be_pickled_as_the_workers_of_a_loader_do():
    td = data(8).set("labels", torch.randint(0, 2, (8, 3)))
    for rows, spec in pickle.loads(pickle.dumps([(td[:4], SPEC), (td[4:], SPEC)])):
        assert spec == SPEC
        assert spec.targets(rows["labels"]).shape == (4, 7)


@models
def test_w15_what_crashed_at_once_runs(build):
    """There ``compute_cace``, layers of ``Annotations``, ``UniformPolicy(out_concepts=5)`` of the guide and the example
    of ``GradientPolicy`` raised; examples of docstrings and pages here are run by the tests of the docs."""
    model = build().eval()
    effect = causal_concept_effect(model, data(5), "wing", out="concepts")
    assert effect[SPEC.slice("wing")].tolist() == [1.0]
    by_name = intervene(model, strategy=Do(0.5), policy=UniformPolicy(), among=["wing"], k=1)
    assert by_name(data(2))["intervention", "mask"].sum() == 2


@models
def test_w16_any_number_of_batch_dims(build):
    model = build()
    flat = model(data(12))["concepts"]
    shaped = model(data(12).reshape(2, 3, 2))["concepts"]
    torch.testing.assert_close(shaped.reshape(12, 7), flat)


@models
def test_w17_under_no_grad_and_inference_mode(build):
    model, td = build(), data(3)
    expected = model(td.copy())["concepts"].detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(td.copy())["concepts"], expected)


def test_w2_hard_weights_are_one_slot_of_each_output():
    """There, of ten slots and four outputs, 65 % of the embeddings selected no slot and 5 % several."""
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    soft, hard = MemorySelector(4, 10, 3, 4), MemorySelector(4, 10, 3, 4, selection="argmax")
    hard.load_state_dict(soft.state_dict())
    assert torch.equal(hard.weights(x).argmax(-1), soft.weights(x).argmax(-1))
    assert (hard.weights(x) > 0.5).sum(-1).eq(1).all()


@pytest.mark.parametrize("kind", [GraphBottleneck, CausalBottleneck])
@pytest.mark.parametrize(
    "policy", [UniformPolicy(), RandomPolicy(), UncertaintyPolicy(), GradientPolicy(Target("concepts", 3))]
)
def test_w5_concepts_behind_concepts_with_any_policy(kind, policy):
    """There only roots could be intervened on: names of arguments clashed."""
    model = kind(body(), DAG, SPEC, in_features=8).eval()
    td = intervene(model, policy=policy, strategy=Do(0.25), among=["wing"], k=1)(data(5))
    assert (td["concepts"][:, SPEC.slice("wing")] == 0.25).all()
    assert torch.equal(td["concepts"][:, :3], td["intervention", "before"][:, :3])


def test_w10_names_follow_columns_that_are_put_in_another_order():
    other = ConceptSpec(SPEC.names[::-1], SPEC.cardinalities[::-1])
    td = other.pack(SPEC.split(TensorDict({"concepts": torch.arange(7.0).expand(2, 7)}, [2])))
    assert td["concepts"][0].tolist() == [4, 5, 6, 3, 0, 1, 2]
    fixed = intervene(
        TensorDictModule(nn.Identity(), ["observation"], ["concepts"]),
        strategy=Do(9.0),
        among=["shape"],
        concepts=other,
    )
    assert fixed(TensorDict({"observation": td["concepts"]}, [2]))["concepts"][0].tolist() == [9, 9, 9, 3, 0, 1, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [GraphBottleneck, CausalBottleneck])
def test_w17_a_policy_has_its_gradients_under_no_grad_and_inference_mode(kind, mode):
    model = kind(body(), DAG, SPEC, in_features=8).eval()
    fixed = intervene(model, policy=GradientPolicy(Target("concepts", 3)), strategy=Do(0.5), k=1)
    expected = fixed(data(5))["intervention", "score"]
    assert expected[:, :3].abs().max() > 0
    with mode():
        torch.testing.assert_close(fixed(data(5))["intervention", "score"], expected)
