"""GraphBottleneck and CausalBottleneck: trained on the checkmark, corrected by do, taught by labels."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts.causal import CausalBottleneck, GraphBottleneck
from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.losses import ConceptLoss
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.teaching import teach
from tdconcepts.concepts.toys import toy_data
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.interventions import Do, GradientPolicy, GroundTruth, Intervention, intervene

MODELS = [GraphBottleneck, CausalBottleneck]
DAG = Dag(["A", "B", "C", "task"], [("B", "C"), ("A", "task"), ("C", "task")])


def build(kind, dag=DAG, **options):
    torch.manual_seed(0)
    return kind(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), dag, in_features=16, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_the_checkmark_is_learnt_and_do_reaches_the_task(kind):
    data = toy_data("checkmark", 300, torch.Generator().manual_seed(0))
    every = torch.cat([data.td["labels"], data.td["task"].unsqueeze(-1)], 1)
    td = data.td.clone().set("labels", every)
    model = build(kind)
    training = TensorDictSequential(teach(model, how="independent"), ConceptLoss(model.concepts))
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        training(td.copy())["loss", "concepts"].mean().backward()
        optimizer.step()
    model.eval()
    found = model(td.copy())["concepts"]
    assert ((found > 0.5) == every.bool()).float().mean() > 0.99
    do = torch.full((300, 4), torch.nan)
    do[:, 1] = 1.0  # B = 1, so C = 0, so the task is 0
    done = model(td.copy().set("do", do))["concepts"]
    assert done[:, 2].max() < 0.5
    if kind is GraphBottleneck:  # the other's equations are the row's own, and the input shows the task
        assert done[:, 3].max() < 0.5
    do[:, 0] = 0.0
    do[:, 2] = 0.0
    nothing = model(td.copy().set("do", do))["concepts_logits"][:, 3]
    torch.testing.assert_close(nothing, nothing[:1].expand(300))  # no parent is on: the bias is all there is
    torch.testing.assert_close(done[:, 0], found[:, 0])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [[], [5], [2, 3], [0]])
def test_any_batch_nested_keys_and_kinds(kind, batch):
    spec = ConceptSpec(["task", "C", "B", "A"], [1, 2, 3, 1], ["binary", "categorical", "categorical", "continuous"])
    model = build(kind, concepts=spec, in_keys=[("g", "o")], key=("g", "c"))
    td = model(TensorDict({"g": {"o": torch.randn(*batch, 4)}}, batch))
    assert td["g", "c"].shape == (*batch, 7)
    assert set(td.keys()) == {"g"}
    assert model.optional_keys == [("g", "do")]


@pytest.mark.parametrize("kind", MODELS)
def test_teaching_sets_labels_in_training_only(kind):
    model = build(kind)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, torch.nan, 0, 1]])
    td = TensorDict({"observation": torch.randn(2, 4), "labels": labels}, [2])
    pipeline = teach(model, how="independent")
    out = pipeline(td.copy())
    plain = model(td.copy())["concepts"]
    torch.testing.assert_close(out["concepts"], torch.where(labels.isnan(), out["concepts"], labels))
    assert torch.equal(out["do"].isnan(), labels.isnan())
    torch.testing.assert_close(pipeline.eval()(td.copy())["concepts"], plain)
    with pytest.raises(BadValue, match="sequential"):
        teach(model, how="sequential")


@pytest.mark.parametrize("kind", MODELS)
def test_an_equation_whose_parents_are_labels_trains_the_encoder_where_it_reads_the_input(kind):
    model = build(kind)
    out = teach(model, how="independent")(
        TensorDict({"observation": torch.randn(3, 4), "labels": torch.ones(3, 4)}, [3])
    )
    for column, name in enumerate(DAG.names):
        loss, weight = out["concepts_logits"][:, column].sum(), model["encoder"].module[0].weight
        (grad,) = torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True)
        reached = grad is not None and bool(grad.abs().max() > 0)
        assert reached is (kind is CausalBottleneck or name in DAG.roots)


@pytest.mark.parametrize("order", [["A", "B", "C", "task"], ["task", "C", "A", "B"]])
@pytest.mark.parametrize("batch", [[], [3], [2, 3]])
def test_the_equations_of_each_row_can_be_read_in_the_order_of_the_block(order, batch):
    spec = ConceptSpec(order, [1 + (name == "A") for name in order])
    model = build(CausalBottleneck, concepts=spec)
    equations = model["propagation"].equations
    torch.nn.init.normal_(equations.bias)
    td = model(TensorDict({"observation": torch.randn(*batch, 4)}, batch))
    weights = equations.weights(td["exogenous"])
    told = (weights @ td["concepts"].unsqueeze(-1)).squeeze(-1)
    for name in order:
        for column in range(spec.size)[spec.slice(name)]:
            parents = spec.columns(DAG.parents(name))
            assert weights[..., column, [i for i in range(spec.size) if i not in parents]].abs().sum() == 0
            if parents:
                bias = equations.bias[model["propagation"].back[column]]
                torch.testing.assert_close(told[..., column] + bias, td["concepts_logits"][..., column])


@pytest.mark.parametrize("kind", MODELS)
def test_copies_and_pickles(kind):
    model, x = build(kind), torch.randn(3, 4)
    expected = model(observation=x)[-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(observation=x)[-1], expected)


def test_bad_input():
    with pytest.raises(BadValue, match="other names"):
        build(GraphBottleneck, concepts=["A", "B", "C"])
    with pytest.raises(BadType, match="encoder is no module"):
        CausalBottleneck(3, DAG, in_features=2)
    for kind in MODELS:
        with pytest.raises(BadKey, match=r"TensorDictModule\(net, \['x'\], \['latent'\]\)"):
            kind(TensorDictModule(nn.Linear(4, 3), ["x"], ["z"]), DAG, in_features=3)
    with pytest.raises(BadValue, match="embedding_size"):
        build(CausalBottleneck, embedding_size=0)


@pytest.mark.parametrize("order", [["A", "B", "C", "task"], ["task", "C", "A", "B"]])
@pytest.mark.parametrize("kind", MODELS)
def test_an_intervention_is_followed_and_a_policy_sees_what_follows(kind, order):
    model = build(kind, concepts=ConceptSpec(order)).double()
    td = toy_data("checkmark", 5, torch.Generator().manual_seed(0)).td.double()
    task = order.index("task")
    policy = GradientPolicy(Target("concepts", task))
    fixed = intervene(model, policy=policy, strategy=Do(1.0), among=["B"])(td.copy())
    plain, step = model(td.copy())["concepts"], 1e-6
    for name in order:  # the score is the derivative of the task by the concept, along the graph
        do = torch.full((5, 4), torch.nan, dtype=torch.float64)
        do[:, order.index(name)] = plain[:, order.index(name)] + step
        moved = (model(td.copy().set("do", do))["concepts"][:, task] - plain[:, task]) / step
        found = fixed["intervention", "score"][:, order.index(name)]
        torch.testing.assert_close(found, moved.abs(), atol=1e-5, rtol=1e-4)
    do = torch.full((5, 4), torch.nan, dtype=torch.float64)
    do[:, order.index("B")] = 1.0
    expected = model(td.copy().set("do", do))
    assert torch.equal(fixed["concepts"], expected["concepts"])
    assert torch.equal(fixed["concepts_logits"], expected["concepts_logits"])
    assert torch.equal(fixed["intervention", "do"].nan_to_num(9.0), do.nan_to_num(9.0))
    assert torch.equal(fixed["intervention", "before"], plain)
    assert "do" not in fixed


def test_interventions_on_a_graph_nest_and_map_and_are_refused_as_an_edit():
    model = build(GraphBottleneck)
    td = toy_data("checkmark", 5, torch.Generator().manual_seed(0)).td
    first = intervene(model, strategy=Do(1.0), among=["B"])
    both = intervene(first, strategy=Do(0.0), among=["A"], out_key="second")
    do = torch.full((5, 4), torch.nan)
    do[:, :2] = torch.tensor([0.0, 1.0])
    expected = model(td.copy().set("do", do))["concepts"]
    assert torch.equal(both(td.copy())["concepts"], expected)
    assert list(first.module)[:3] == ["encoder", "roots", "propagation"]
    assert sum(p.numel() for p in first.parameters()) == sum(p.numel() for p in model.parameters())
    copied = pickle.loads(pickle.dumps(both))
    assert torch.equal(copied(td.copy())["concepts"], expected)
    labels = torch.cat([td["labels"], torch.full((5, 1), torch.nan)], 1)
    told = intervene(model, strategy=GroundTruth("every"))(td.copy().set("every", labels))
    assert torch.equal(told["concepts"][:, :3], labels[:, :3])
    assert not told["intervention", "mask"][:, 3].any()
    with pytest.raises(BadValue, match="nothing would follow"):
        Intervention(Do(1.0), among=["B"]).on(model)
