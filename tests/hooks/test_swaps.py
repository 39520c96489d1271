"""Parameters under a program: every way in which a model uses them, and a model that stays as it is."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Capture, Site, Weights, patch
from tdconcepts.hooks.edits import Scale


class Halved:
    def __call__(self, parameter):
        return 0.5 * parameter


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table

    def forward(self, x):
        return self.head(torch.tanh(F.embedding((x[..., :1] > 0).long().squeeze(-1), self.table)))


class First(nn.Module):
    """Of what a recurrent layer or an attention gives, the first."""

    def __init__(self, inner, *more):
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.inner(*([x] * (1 + len(self.more))))[0].squeeze(1)


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(-1, (1, 4)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten()),
    "recurrent": lambda: First(nn.LSTM(4, 3, num_layers=2, batch_first=True)),
    "attention": lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 1, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "tied": Tied,
    "normalised": lambda: nn.Sequential(nn.LayerNorm(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
}


def make(kind="linear"):
    torch.manual_seed(0)
    net = TensorDictModule(NETS[kind]().eval(), ["x"], ["y"])
    return net, TensorDict(x=torch.randn(3, 1, 4) if kind == "transformer" else torch.randn(3, 4), batch_size=[3])


def halved(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


@pytest.mark.parametrize("kind", NETS)
def test_every_way_to_use_a_parameter(kind):
    net, td = make(kind)
    expected = halved(net)(td.clone())["y"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Weights({"**": Halved()}).on(net) as m:
            torch.testing.assert_close(m(td.clone())["y"], expected)
            torch.testing.assert_close(net(td.clone())["y"], expected)
            assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.allclose(net(td.clone())["y"], expected)


def test_contexts_compose_and_end_in_any_order():
    net, td = make()
    quarter = halved(halved(net))(td.clone())["y"]
    first, second = (Weights({"*.weight": Halved(), "*.bias": Halved()}).on(net) for _ in range(2))
    outer, inner = Weights({"0.weight": lambda w: w + 1}).on(net), Weights({"0.weight": lambda w: 3 * w}).on(net)
    first.__enter__()
    second.__enter__()
    torch.testing.assert_close(net(td.clone())["y"], quarter)
    first.__exit__(None, None, None)
    torch.testing.assert_close(net(td.clone())["y"], halved(net)(td.clone())["y"])
    second.__exit__(None, None, None)
    with outer, inner:
        x = F.linear(td["x"], 3 * (net.module[0].weight + 1), net.module[0].bias).relu()
        torch.testing.assert_close(net(td.clone())["y"], net.module[2](x))


def test_it_adds_to_other_programs():
    net, td = make()
    program = Weights({"0.*": Halved()}) + Capture("0")
    with program.on(net) as m, patch(net, {Site("2"): Scale(2.0)}):
        out = m(td.clone())
    torch.testing.assert_close(out["activation", "0"], 0.5 * net.module[0](td["x"]))
    torch.testing.assert_close(out["y"], 2 * net.module[2]((0.5 * net.module[0](td["x"])).relu()))


def test_gradients_reach_the_parameter_and_the_change():
    net, td = make()
    step = nn.Parameter(torch.zeros(2, 5))
    with Weights({"2.weight": lambda w: w + step}).on(net) as m:
        m(td)["y"].sum().backward()
    torch.testing.assert_close(step.grad, net.module[2].weight.grad)
    assert step.grad.abs().sum() > 0


def test_other_threads_see_the_model_as_it_is():
    net, td = make()
    plain, found = net(td.clone())["y"], []
    with Weights({"**": Halved()}).on(net):
        thread = threading.Thread(target=lambda: found.append(net(td.clone())["y"]))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)


def test_an_error_in_the_middle_leaves_nothing():
    net, td = make()

    def fuse(w):
        raise ZeroDivisionError

    plain = net(td.clone())["y"]
    m = Weights({"2.weight": fuse}).on(net)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            m(td.clone())
        assert torch.equal(net(td.clone())["y"], plain)
    with pytest.raises(ZeroDivisionError), m:
        net(td.clone())
    assert torch.equal(net(td.clone())["y"], plain)


def test_copies_have_changes_of_their_own():
    net, td = make()
    m = Weights({"**": Halved()}).on(net)
    expected = m(td.clone())["y"]
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(twin(td.clone())["y"], expected)
        with torch.no_grad():
            twin.module.module[2].bias.add_(2.0)
        torch.testing.assert_close(twin(td.clone())["y"], expected + 1)
        with twin:
            assert torch.equal(net(td.clone())["y"], make()[0](td.clone())["y"])


def test_under_vmap_and_compile():
    net, td = make()
    scales = torch.tensor([0.5, 2.0])

    def run(scale):
        with Weights({"2.weight": lambda w: scale * w}).on(net) as m:
            return m(TensorDict(x=td["x"], batch_size=[3]))["y"]

    torch.testing.assert_close(torch.vmap(run)(scales), torch.stack([run(s) for s in scales]))
    torch._dynamo.reset()
    with Weights({"*.weight": Halved()}).on(net) as m:
        compiled = torch.compile(m, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(td.clone())["y"], m(td.clone())["y"])


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({}, BadType, "not a mapping"),
        ({"0.weight": 3.0}, BadType, "a change is none"),
        ({"0.wieght": Halved()}, BadKey, "did you mean '0.weight'"),
        ({"0.*": Halved(), "*.bias": Halved()}, BadKey, "two changes"),
        ({"0.weight": lambda w: w[:1]}, BadValue, "another shape"),
        ({"0.weight": lambda w: None}, BadValue, "another shape"),
    ],
)
def test_bad_changes(changes, error, text):
    net, td = make()
    with pytest.raises(error, match=text):
        Weights(changes).on(net)(td)
