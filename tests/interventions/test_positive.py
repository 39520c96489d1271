"""Positive weights: functional, through the layer that makes the concepts."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential
from torch import nn

from tdconcepts.errors import BadKey, BadValue
from tdconcepts.interventions.pipeline import InterventionPipeline
from tdconcepts.interventions.policies import UniformPolicy
from tdconcepts.interventions.positive import PositiveWeights
from tdconcepts.interventions.splicing import intervene
from tdconcepts.interventions.strategies import Do


def network():
    torch.manual_seed(0)
    return TensorDictSequential(
        Mod(nn.Linear(6, 5), ["x"], ["hidden"]),
        Mod(nn.Linear(5, 4), ["hidden"], ["concepts_logits"]),
        Mod(nn.Sigmoid(), ["concepts_logits"], ["concepts"]),
        Mod(nn.Linear(4, 3), ["concepts"], ["logits"]),
    )


def data(*batch):
    return TensorDict({"x": torch.randn(*batch, 6, generator=torch.Generator().manual_seed(1))}, batch)


@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0,)])
def test_the_last_layer_with_parameters_is_called_with_what_is_positive_of_them(batch):
    model = network()
    td = intervene(model, strategy=PositiveWeights(), among=[0, 2])(data(*batch))
    layer = model[1].module
    expected = (td["hidden"] @ layer.weight.relu().T + layer.bias.relu()).sigmoid()
    torch.testing.assert_close(td["intervention", "value"], expected)
    assert torch.equal(td["concepts"][..., [0, 2]], td["intervention", "value"][..., [0, 2]])
    assert torch.equal(td["concepts"][..., [1, 3]], td["intervention", "before"][..., [1, 3]])


def test_the_layer_is_untouched_and_the_second_call_is_the_first():
    """torch_concepts 0.x clipped the wrapped layer in place, for good."""
    model = network()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    plain = model(data(5))["concepts"]
    fixed = intervene(model, strategy=PositiveWeights())
    first, second = fixed(data(5))["concepts"], fixed(data(5))["concepts"]
    assert torch.equal(first, second)
    assert not torch.allclose(first, plain)
    assert torch.equal(model(data(5))["concepts"], plain)
    for name, (pointer, value) in before.items():
        assert model.state_dict()[name].data_ptr() == pointer
        assert torch.equal(model.state_dict()[name], value)
    assert list(map(id, fixed.parameters())) == list(map(id, model.parameters()))


def test_the_gradient_reaches_the_weights_above_zero():
    model = network()
    intervene(model, strategy=PositiveWeights(), at="concepts_logits")(data(5))["concepts_logits"].sum().backward()
    weight = model[1].module.weight
    assert ((weight.grad != 0) == (weight > 0)).all()


def test_buffers_are_not_updated_twice():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    model = TensorDictSequential(Mod(norm, ["x"], ["concepts"]))
    twin = copy.deepcopy(model)
    intervene(model, strategy=PositiveWeights())(data(5))
    twin(data(5))
    assert torch.equal(norm[1].running_mean, twin[0].module[1].running_mean)
    assert norm[1].num_batches_tracked == 1


def test_copies_pickles_compile_and_vmap():
    fixed = intervene(network(), strategy=PositiveWeights(), k=2)
    expected = fixed(data(5))["logits"]
    for other in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(other(data(5))["logits"], expected)
        with torch.no_grad():
            other[1].module.weight.fill_(1.0)
        assert not torch.equal(other(data(5))["intervention", "value"], fixed(data(5))["intervention", "value"])
    torch._dynamo.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(data(5))["logits"], expected)
    mapped = torch.vmap(lambda x: fixed(TensorDict({"x": x}))["logits"])(data(5)["x"])
    torch.testing.assert_close(mapped, expected)


def test_after_another_intervention():
    once = intervene(network(), strategy=Do(0.5), among=[0])
    td = intervene(once, strategy=PositiveWeights(), among=[1], out_key="second")(data(5))
    assert (td["concepts"][:, 0] == 0.5).all()
    assert torch.equal(td["concepts"][:, 1], td["second", "value"][:, 1])


def test_where_there_are_no_weights():
    with pytest.raises(BadValue, match="no weights"):
        InterventionPipeline(UniformPolicy(), PositiveWeights())
    with pytest.raises(BadValue, match="no weights"):
        intervene(network(), at="x", strategy=PositiveWeights())
    with pytest.raises(BadValue, match="part of a model"):
        PositiveWeights()(concepts=torch.zeros(2))
    pipeline = intervene(network(), strategy=PositiveWeights())[-2]
    with pytest.raises(BadKey, match="'hidden'"):
        pipeline(TensorDict({"concepts": torch.zeros(2, 4)}, [2]))
