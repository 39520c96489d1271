"""Correction curves: k concepts of each row by hand; and areas."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.concepts import CausalBottleneck, ConceptBottleneck, ConceptSpec, Dag, GraphBottleneck
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.interventions import GradientPolicy, UncertaintyPolicy, UniformPolicy
from tdconcepts.metrics.corrections import correction_curve, curve_area


def world():
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    model = ConceptBottleneck(nn.Identity(), head, 4)
    labels = torch.randint(0, 2, (30, 4))
    x = torch.randn(30, 4)
    return model, head, TensorDict({"observation": x, "labels": labels, "task": head(labels.float()).argmax(-1)}, [30])


def test_the_curve_by_hand():
    model, head, data = world()
    curve = correction_curve(model, data, UncertaintyPolicy())
    for k in range(5):
        hits = 0
        for x, y, task in zip(data["observation"], data["labels"], data["task"], strict=True):
            p = x.sigmoid()
            for i in (p - 0.5).abs().argsort()[:k]:
                p[i] = y[i]
            hits += int(head(p).argmax() == task)
        assert curve[k].item() == pytest.approx(hits / 30)
    assert curve[-1] == 1
    assert set(data.keys()) == {"observation", "labels", "task"}
    chosen = correction_curve(model, data, UncertaintyPolicy(), counts=[0, 3])
    assert torch.equal(chosen, curve[[0, 3]])


@pytest.mark.parametrize("shape", [(30,), (5, 6)])
def test_rows_without_a_task_do_not_count(shape):
    model, _, data = world()
    gone = torch.rand(30) < 0.4
    data["task"] = data["task"].double().masked_fill(gone, torch.nan)
    expected = correction_curve(model, data[~gone].set("task", data["task"][~gone].long()), UncertaintyPolicy())
    torch.testing.assert_close(correction_curve(model, data.reshape(shape), UncertaintyPolicy()), expected)
    assert correction_curve(model, data[gone], UncertaintyPolicy(), counts=[0]).isnan().all()


def test_a_score_of_ones_own_counts_where_a_task_is_known():
    model = ConceptBottleneck(nn.Identity(), nn.Linear(1, 2), 1)
    nn.init.zeros_(model["head"].module.weight)
    model["head"].module.bias.data = torch.tensor([1.0, -1.0])
    nan = torch.nan
    task = torch.tensor([[1.0, nan], [nan, nan], [1.0, 1.0]])
    data = TensorDict(observation=torch.zeros(3, 1), labels=torch.ones(3, 1), task=task, batch_size=[3])
    each = correction_curve(model, data, UncertaintyPolicy(), counts=[0])  # of each task: right, right, wrong
    assert each.item() == pytest.approx(2 / 3)
    all_right = lambda out, task: ((out > 0) == (task > 0.5)).all(-1)  # noqa: E731
    assert correction_curve(model, data, UncertaintyPolicy(), counts=[0], score=all_right).item() == 0.5
    with pytest.raises(BadValue, match="one score of each row"):
        correction_curve(model, data, UncertaintyPolicy(), score=lambda out, task: out.mean())


def test_the_area_is_the_mean_height():
    curve = torch.tensor([[0.2, 0.4, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(curve_area(curve), torch.tensor([0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(curve_area(curve[0], [0, 1, 4]), torch.tensor((0.3 + 3 * 0.7) / 4, dtype=torch.float64))


def test_bad_input():
    model, _, data = world()
    with pytest.raises(BadKey, match="did you mean 'task'"):
        correction_curve(model, data, UncertaintyPolicy(), task="tasks")
    with pytest.raises(BadValue, match="pass counts"):
        correction_curve(TensorDictModule(nn.Identity(), ["observation"], ["x"]), data, UncertaintyPolicy())
    for curve, counts in (
        (torch.ones(1), None),
        (torch.ones(3), [0, 1]),
        (torch.ones(3), [0, 2, 1]),
        (torch.ones(()), None),
    ):
        with pytest.raises(BadValue, match="not a curve"):
            curve_area(curve, counts)


@pytest.mark.parametrize("kind", [GraphBottleneck, CausalBottleneck])
@pytest.mark.parametrize("policy", [UncertaintyPolicy(), GradientPolicy(Target("concepts", 3))])
def test_in_a_graph_the_task_follows_what_is_corrected(kind, policy):
    torch.manual_seed(0)
    names = ["a", "b", "c", "task"]
    dag = Dag(names, [("a", "c"), ("b", "task"), ("c", "task")])
    model = kind(nn.Identity(), dag, ConceptSpec(names), in_features=5)
    labels = torch.randint(0, 2, (20, 4)).float()
    data = TensorDict(observation=torch.randn(20, 5), labels=labels, task=labels[:, 3], batch_size=[20])
    score = lambda block, task: (block[..., 3] > 0.5) == task.bool()  # noqa: E731
    curve = correction_curve(model, data, policy, out="concepts", score=score, among=names[:3])
    do = labels.clone()
    do[:, 3] = torch.nan
    whole = model(data.copy().set("do", do))["concepts"]
    plain = model(data.copy())["concepts"]
    assert len(curve) == 4
    assert curve[0] == score(plain, data["task"]).double().mean()
    assert curve[-1] == score(whole, data["task"]).double().mean()
    assert not torch.equal(whole[:, 3], plain[:, 3])


def test_a_curve_that_is_a_list():
    with pytest.raises(BadType, match="not a curve"):
        curve_area([0.1, 0.2])


def test_a_batch_norm_in_training_mode():
    norm = nn.BatchNorm1d(2)
    model = ConceptBottleneck(nn.Sequential(nn.Linear(2, 2), norm), nn.Linear(2, 1), ["a", "b"])
    data = TensorDict({"observation": torch.randn(5, 2), "labels": torch.ones(5, 2), "task": torch.ones(5, 1)}, [5])
    with pytest.raises(BadValue, match=r"(?s)BatchNorm1d in training mode.*model.eval\(\)"):
        correction_curve(model, data, UniformPolicy())
    assert norm.num_batches_tracked == 0
