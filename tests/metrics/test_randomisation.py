"""The parameter-randomisation check: what depends on the weights falls, what does not stays."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdconcepts.attribution import Gradient
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Target
from tdconcepts.metrics.randomisation import parameter_randomisation, spearman


def module():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    return TensorDictModule(layers, ["x"], ["q"])


def test_spearman_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    one, other = torch.randint(-3, 4, (5, 7)).double(), torch.randn(5, 7).double()
    for i in range(5):
        assert spearman(one, other, signed=True)[i] == pytest.approx(stats.spearmanr(one[i], other[i]).statistic)
        assert spearman(one, other)[i] == pytest.approx(stats.spearmanr(one[i].abs(), other[i].abs()).statistic)


@pytest.mark.parametrize("cascading", [True, False])
def test_a_gradient_depends_on_the_weights_and_a_difference_from_zero_does_not(cascading):
    net, td = module(), TensorDict(x=torch.randn(30, 6), batch_size=[30])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    found = parameter_randomisation(
        lambda m: Gradient(m, Target("q", 0)), net, td, cascading=cascading, generator=draws
    )
    assert found.layers == ("4", "2", "0")
    assert found.similarity.shape == (3, 30)
    assert found.mean["0"] < 0.5
    assert list(td.keys()) == ["x"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    copied = lambda m: TensorDictModule(lambda x: 2 * x, ["x"], [("attribution", "x")])  # noqa: E731
    still = parameter_randomisation(copied, net, td)
    torch.testing.assert_close(still.similarity, torch.ones(3, 30))


def test_a_layer_that_is_a_stage_is_found():
    stages = [TensorDictModule(nn.Linear(6, 4), ["x"], ["z"]), TensorDictModule(nn.Linear(4, 2), ["z"], ["q"])]
    td = TensorDict(x=torch.randn(3, 6), batch_size=[3])
    found = parameter_randomisation(lambda m: Gradient(m, Target("q", 0), wrt="x"), TensorDictSequential(*stages), td)
    assert found.layers == ("1", "0")


def test_layers_in_an_order_of_ones_own():
    net, td = module(), TensorDict(x=torch.randn(3, 6), batch_size=[3])
    found = parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), net, td, layers=["0"], cascading=False)
    assert list(found.mean) == ["0"]
    with pytest.raises(BadKey, match="no layer '1'"):
        parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), net, td, layers=["1"])
    with pytest.raises(BadKey, match="writes no 'y'"):
        parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), net, td, key="y")
    with pytest.raises(BadType, match="the explainer is not"):
        parameter_randomisation(lambda m: None, net, td)
    with pytest.raises(BadType, match="what makes the explainer"):
        parameter_randomisation(None, net, td)
    with pytest.raises(BadType, match="not states"):
        parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), net, None)
    bare = TensorDictModule(nn.Tanh(), ["x"], ["q"])
    with pytest.raises(BadValue, match="nothing to randomise"):
        parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), bare, td)
