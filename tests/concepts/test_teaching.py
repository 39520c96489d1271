"""TeacherForcing and teach: what the head sees in training, and where gradients go."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.concepts.bottleneck import ConceptBottleneck
from tdconcepts.concepts.causal import GraphBottleneck
from tdconcepts.concepts.embedding import ConceptEmbedding
from tdconcepts.concepts.encoders import ConceptEncoder
from tdconcepts.concepts.graphs import Dag
from tdconcepts.concepts.losses import ConceptLoss
from tdconcepts.concepts.reasoner import ConceptMemoryReasoner
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.teaching import LabelsAsDo, TeacherForcing, teach
from tdconcepts.errors import BadKey, BadType, BadValue

SPEC = ConceptSpec(["a", "b", "c"], [1, 3, 1])
nan = math.nan


def data(n=6):
    labels = torch.tensor([[1.0, 2, 0], [0, nan, 1]]).repeat(n // 2, 1)
    return TensorDict({"observation": torch.randn(n, 4), "labels": labels}, [n])


def bottleneck(**options):
    torch.manual_seed(0)
    return ConceptBottleneck(nn.Linear(4, 5), nn.Linear(5, 2), SPEC, **options)


def gradients(pipeline, td, key):
    pipeline.zero_grad()
    pipeline(td)[key].sum().backward()
    return pipeline["encoder"].module.weight.grad


def test_the_share_of_labels_is_the_probability_and_a_concept_is_replaced_as_a_whole():
    stage = TeacherForcing(SPEC, generator=torch.Generator().manual_seed(0))
    mask, concepts = stage(torch.full((8000, 5), 0.3), torch.tensor([[1.0, 2, 0]]).expand(8000, 3))
    share = mask.float().mean(0)
    assert (share - 0.25).abs().max() < 0.02  # 4 standard errors
    assert (mask[:, 1] == mask[:, 2]).all()
    assert (mask[:, 1] == mask[:, 3]).all()
    assert not (mask[:, 0] == mask[:, 4]).all()
    target = SPEC.targets(torch.tensor([1.0, 2, 0]))
    assert torch.equal(concepts, torch.where(mask, target, 0.3))


def test_missing_labels_keep_the_prediction_and_the_mask_says_so():
    td = teach(bottleneck(), how="independent")(data())
    assert td["teaching", "mask"][1].tolist() == [True, False, False, False, True]
    plain = bottleneck()(data())
    assert td["concepts"].isfinite().all()
    assert plain["concepts"].shape == td["concepts"].shape
    torch.testing.assert_close(td["concepts"][1, 1:4], bottleneck()["activation"](td["concepts_logits"])[1, 1:4])


@pytest.mark.parametrize(("how", "task", "seen"), [("joint", True, False), ("sequential", False, False)])
def test_joint_and_sequential_see_predictions(how, task, seen):
    model, td = bottleneck(), data()
    pipeline = teach(model, how=how)
    assert torch.equal(pipeline(td.copy())["logits"], model(td.copy())["logits"])
    grad = gradients(pipeline, td.copy(), "logits")
    assert (grad is not None and bool(grad.abs().max() > 0)) is task
    assert gradients(pipeline, td.copy(), "concepts_logits").abs().max() > 0
    assert bool(pipeline(td)["teaching", "mask"].any()) is seen


def others():
    """Models whose task reads more than the concepts: by stages of this room, and by a head that reads the latent."""
    torch.manual_seed(0)
    kinds = {"embedding": ConceptEmbedding, "reasoner": ConceptMemoryReasoner}
    built = {name: kind(nn.Linear(4, 6), 2, SPEC, in_features=6) for name, kind in kinds.items()}
    latent = TensorDictModule(nn.Linear(4, 6), ["observation"], ["latent"])
    head = TensorDictModule(nn.Bilinear(5, 6, 2), ["concepts", "latent"], ["logits"])
    encoder = TensorDictSequential(latent, ConceptEncoder(6, SPEC, keys={"latent": "concepts_logits"}))
    return {**built, "side path": ConceptBottleneck(encoder, head, SPEC)}


@pytest.mark.parametrize("name", ["embedding", "reasoner", "side path"])
@pytest.mark.parametrize("how", ["sequential", "independent", "joint", "randint"])
def test_the_task_trains_the_encoder_only_where_the_table_says_so(how, name):
    model, td = others()[name], data()
    td["labels"] = td["labels"].nan_to_num(1.0)
    pipeline = teach(model, how=how)
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    out = pipeline(td.copy())
    task = out[task_key(name)]
    (task_grad,) = torch.autograd.grad(task.square().sum(), first.weight, allow_unused=True, retain_graph=True)
    (concept_grad,) = torch.autograd.grad(ConceptLoss(SPEC)(out)["loss", "concepts"].sum(), first.weight)
    assert (task_grad is None) is (how in ("sequential", "independent"))
    assert concept_grad.abs().max() > 0
    if how == "sequential":
        torch.testing.assert_close(task, model(td.copy())[task_key(name)])
    plain, after = model.eval()(td.copy()), pipeline.eval()(td.copy())
    torch.testing.assert_close(after[task_key(name)], plain[task_key(name)])
    assert torch.autograd.grad(after[task_key(name)].sum(), first.weight)[0].abs().max() > 0


def task_key(name):
    return "probs" if name == "reasoner" else "logits"


def test_what_the_rest_reads_besides_is_still_trained_by_it_where_it_comes_after():
    pipeline = teach(others()["reasoner"], how="sequential")
    assert list(pipeline.module) == ["encoder", "concepts", "activation", "apart", "teaching", "selector", "rules"]
    pipeline(data())["probs"].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in pipeline["selector"].parameters())
    head = TensorDictModule(lambda c, z: c + z, ["concepts", "concepts_logits"], ["logits"])
    model = ConceptBottleneck(nn.Linear(4, 5), head, SPEC)
    for how in ("sequential", "independent"):
        with pytest.raises(BadValue, match="the logits of the concepts too"):
            teach(model, how=how)
    assert teach(model)(data())["logits"].shape == (6, 5)


@pytest.mark.parametrize("how", ["sequential", "independent", "randint"])
def test_in_space_logits_the_predictions_are_kept_to_be_trained_by(how):
    model, td = bottleneck(space="logits"), data()
    pipeline = teach(model, how=how)
    out = pipeline(td.copy())
    assert torch.equal(out["concepts_logits"], model(td.copy())["concepts"])
    ConceptLoss(SPEC)(out)["loss", "concepts"].sum().backward()
    assert model["encoder"].module.weight.grad.abs().max() > 0


@pytest.mark.parametrize("space", ["probs", "logits"])
def test_a_label_of_which_one_column_is_missing_is_missing_as_a_whole(space):
    labels = torch.tensor([[1.0, nan, 0, 0, 0], [nan, 0, 1, 0, 1]])
    mask, concepts = TeacherForcing(SPEC, probability=1.0, space=space)(torch.full((2, 5), 0.3), labels)
    assert mask.tolist() == [[True, False, False, False, True], [False, True, True, True, True]]
    assert (concepts == 0.3).tolist() == (~mask).tolist()
    do = LabelsAsDo(SPEC, probability=1.0)(torch.zeros(2, 7), labels)
    assert torch.equal(do.isnan(), ~mask)


def test_independent_heads_see_labels():
    model, td = bottleneck(), data()
    pipeline = teach(model, how="independent")
    out = pipeline(td.copy())
    assert torch.equal(out["concepts"][0], SPEC.targets(td["labels"][0]))
    torch.testing.assert_close(out["logits"][0], model["head"].module(SPEC.targets(td["labels"][0])))
    assert gradients(pipeline, td.copy(), "logits") is None


def test_at_evaluation_the_pipeline_is_the_model_and_stages_are_shared():
    model, td = bottleneck(), data()
    pipeline = teach(model, how="randint", probability=1.0).eval()
    assert torch.equal(pipeline(td.copy())["logits"], model(td.copy())["logits"])
    assert list(pipeline.module) == ["encoder", "activation", "teaching", "head"]
    assert {*map(id, model.parameters())} == {*map(id, pipeline.parameters())}
    assert not pipeline(td)["teaching", "mask"].any()


def test_in_space_logits_a_label_is_written_as_a_logit():
    """W4: torch_concepts writes the label 1 as the logit 1, a probability of .73."""
    out = teach(bottleneck(space="logits"), how="independent")(data())
    torch.testing.assert_close(SPEC.probs(out["concepts"])[0], SPEC.targets(data()["labels"])[0], atol=4e-4, rtol=0)


def test_the_same_generator_gives_the_same_draws_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    masks = [
        TeacherForcing(SPEC, generator=torch.Generator().manual_seed(3))(torch.zeros(9, 5), torch.ones(9, 3))[0]
        for _ in range(2)
    ]
    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), state)


def test_embedding_models_and_nested_ones_are_taught_too():
    model = ConceptEmbedding(nn.Linear(4, 6), 2, SPEC, in_features=6, embedding_size=3)
    out = teach(model, how="independent")(data())
    assert torch.equal(out["mixture"][0, 0], out["exogenous"][0, 0])
    inner = ConceptBottleneck(
        TensorDictSequential(TensorDictModule(nn.Linear(4, 5), ["observation"], ["concepts_logits"])),
        nn.Linear(5, 2),
        SPEC,
    )
    assert torch.equal(teach(inner, how="independent")(data())["concepts"][0], SPEC.targets(data()["labels"][0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("space", ["probs", "logits"])
def test_dtypes(dtype, space):
    stage = TeacherForcing(SPEC, probability=1.0, space=space)
    _, concepts = stage(torch.zeros(2, 5, dtype=dtype), torch.tensor([[1, 2, 0], [0, 1, 1]]))
    assert concepts.dtype is dtype
    assert concepts.isfinite().all()


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: teach(bottleneck(), how="both"), BadValue, "both"),
        (lambda: teach(nn.Linear(2, 2)), BadType, "TensorDictModule"),
        (lambda: teach(TensorDictModule(nn.Linear(2, 2), ["a"], ["b"])), BadType, "know its concepts"),
        (lambda: TeacherForcing(SPEC, probability=1.5), BadValue, "1.5"),
        (lambda: TeacherForcing(SPEC, space="onehot"), BadValue, "onehot"),
        (lambda: teach(bottleneck())(data().exclude("labels")), BadKey, "labels"),
        (lambda: teach(bottleneck())(data().set("labels", torch.zeros(6, 2))), BadValue, r"\[6, 3\] numbers"),
        (lambda: teach(bottleneck())(data().set("labels", torch.full((6, 3), 7))), BadValue, "7"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_draws_of_labels_for_a_graph_come_from_the_generator():
    model = GraphBottleneck(nn.Linear(4, 6), Dag(SPEC.names, [("a", "b")]), SPEC, in_features=6)
    td, state, found = data(60), torch.get_rng_state(), []
    for _ in range(2):
        pipeline = teach(model, how="randint", probability=0.5, generator=torch.Generator().manual_seed(3))
        found.append(pipeline(td.copy())["do"].isnan())
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), state)


def test_randint_gives_the_encoder_the_gradient_of_the_task_where_predictions_are_seen():
    pipeline = teach(bottleneck(), how="randint", generator=torch.Generator().manual_seed(0))
    assert gradients(pipeline, data(), "logits").any()


def test_labels_of_a_single_concept_need_no_dim_as_do():
    stage = LabelsAsDo(ConceptSpec(["a"]), probability=1.0)
    assert stage(latent=torch.zeros(2, 5), labels=torch.tensor([1.0, nan])).nan_to_num(9.0).tolist() == [[1], [9]]
