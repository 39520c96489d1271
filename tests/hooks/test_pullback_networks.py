"""The pull-back through recurrent and convolutional networks, vmaps inside the model, modules used twice."""

import pytest
import torch
from hooks.nets import Twice, linear, slow, twice
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdconcepts.hooks import Pullback, Site, Target

W1, B1 = linear(3, 2, 1).weight.detach(), linear(3, 2, 1).bias.detach()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(4, 3, batch_first=True), linear(3, 2, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])[..., -1, :]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind):
    net = TensorDictModule(Recurrent(kind), ["x"], ["y"])
    td = TensorDict(x=torch.randn(3, 5, 4), batch_size=[3])
    wrts = ["x", Site("rnn", leaf=0), Site("head", "input")]
    found = Pullback(net, Target("y", [1, 0]), wrts).gradients(td)
    out = net.module.rnn(td["x"])[0].detach()
    torch.testing.assert_close(found[0], slow(lambda x: net.module(x)[:, [1, 0]], td["x"], 1))
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, slow(lambda o: (o @ W1.T + B1)[:, -1, [1, 0]], out, 1))
    assert [g.shape for g in Pullback(net, Target("y", 1), wrts).gradients(td)] == [(3, 5, 4), (3, 5, 3), (3, 5, 3)]


class Convolutions(nn.Module):
    """As torchrl's ConvNet: takes any number of batch dims, by merging them into one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.norm = nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 3)

    def forward(self, x):
        lead = x.shape[:-3]
        maps = self.pool(self.norm(self.act(self.conv(x.flatten(0, -4) if lead else x.unsqueeze(0)))))
        return self.head(maps.flatten(1)).reshape(*lead, 3)


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_convolutions_that_merge_the_batch_dims(shape):
    net = TensorDictModule(Convolutions().eval(), ["x"], ["y"])
    td = TensorDict(x=torch.randn(*shape, 1, 6, 6), batch_size=shape)
    wrts = ["x", Site("conv"), Site("head", "input"), Site("conv", index=(1, slice(0, 2)))]
    if not shape:
        wrts = ["x"]  # what the network adds in front is not a batch dim
    many = Pullback(net, Target("y", [2, 0]), wrts).gradients(td)
    torch.testing.assert_close(many[0], slow(lambda x: net.module(x)[..., [2, 0]], td["x"], len(shape)))
    for i, column in enumerate((2, 0)):
        one = Pullback(net, Target("y", column), wrts).gradients(td)
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a.select(len(shape), i), b)
    if shape:
        head = net.module.head.weight[[2, 0]].detach()
        torch.testing.assert_close(many[2], head.expand(*shape, 2, 8))
        assert many[1].shape == (*shape, 2, 2, 4, 4)
        assert many[3].equal(many[1][..., 1, 0:2, :])


def test_neurons_of_a_convolution():
    net = TensorDictModule(Convolutions().eval(), ["x"], ["y"])
    td = TensorDict(x=torch.randn(2, 3, 1, 6, 6), batch_size=[2, 3])
    found = Pullback(net, Target(Site("conv"), [(0, 1, 2), (1, 3, 3)])).gradients(td)[0]
    expected = torch.zeros(2, 1, 6, 6)
    expected[0, :, 1:4, 2:5] = net.module.conv.weight[0].detach()
    expected[1, :, 3:6, 3:6] = net.module.conv.weight[1].detach()
    torch.testing.assert_close(found, expected.expand(2, 3, 2, 1, 6, 6))


class Agents(nn.Module):
    """One network for each agent, by a vmap inside the model, as torchrl's MultiAgentMLP(share_params=False)."""

    def __init__(self, agents):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.weights = nn.ParameterList([torch.randn(agents, *p.shape) for p in self.body.parameters()])

    def forward(self, x):
        names = [name for name, _ in self.body.named_parameters()]

        def one(weights, x):
            return torch.func.functional_call(self.body, dict(zip(names, weights, strict=True)), (x,))

        return torch.vmap(one, (0, -2), -2)(tuple(self.weights), x)

    def by_hand(self, x):
        w0, b0, w1, b1 = self.weights
        h = torch.einsum("...ai,aoi->...ao", x, w0) + b0
        return h, torch.einsum("...ai,aoi->...ao", torch.tanh(h), w1) + b1


@pytest.mark.parametrize("rows", [5, 3])
@pytest.mark.parametrize("select", [(1, 0), [(1, 0), (2, 1)]])
def test_modules_under_a_vmap_inside_the_model(rows, select):
    """With as many rows as agents a mistake about which is which would not be seen by the shapes."""
    net = TensorDictModule(Agents(3), ["x"], ["y"])
    td = TensorDict(x=torch.randn(rows, 3, 4), batch_size=[rows])
    x = td["x"].clone().requires_grad_()
    h, y = net.module.by_hand(x)
    torch.testing.assert_close(net(td)["y"], y)
    pulled = Pullback(net, Target("y", select), ["x", Site("body.0"), Site("body.1", "input")])(td, snapshot=True)
    each = [select] if isinstance(select, tuple) else select
    expected = [torch.autograd.grad(y[:, a, o].sum(), [x, h], retain_graph=True) for a, o in each]
    of_x, of_h = (torch.stack(parts, 1) for parts in zip(*expected, strict=True))
    if isinstance(select, tuple):
        of_x, of_h = of_x[:, 0], of_h[:, 0]
    torch.testing.assert_close(pulled.gradients[0], of_x)
    torch.testing.assert_close(pulled.gradients[1], of_h)
    torch.testing.assert_close(pulled.gradients[2], of_h)
    torch.testing.assert_close(pulled.points[1], h.detach())


@pytest.mark.parametrize("rows", [6, 3])
def test_torchrl_agents_without_shared_parameters(rows):
    modules = pytest.importorskip("torchrl.modules")
    torch.manual_seed(0)
    agents = modules.MultiAgentMLP(
        n_agent_inputs=4, n_agent_outputs=2, n_agents=3, centralized=False, share_params=False, depth=1, num_cells=5
    )
    net = TensorDictModule(agents, [("agents", "x")], [("agents", "q")])
    td = TensorDict(batch_size=[rows]).set(("agents", "x"), torch.randn(rows, 3, 4))
    site = Site(next(path for path, m in agents.named_modules() if isinstance(m, nn.Tanh)))
    pull = Pullback(net, Target(("agents", "q"), [(0, 1), (2, 0)]), [("agents", "x"), site])
    of_x, of_site = pull.gradients(td)
    torch.testing.assert_close(of_x, slow(lambda x: agents(x)[:, [0, 2], [1, 0]], td["agents", "x"], 1))
    assert of_site.shape == (rows, 2, 3, 5)
    for target, agent in enumerate((0, 2)):
        others = [i for i in range(3) if i != agent]
        assert of_site[:, target, agent].any()
        assert not of_site[:, target, others].any(), "an agent depends on its own network"


def test_a_module_used_twice():
    net, layer, tail = twice(), Twice().layer, Twice().tail
    x = torch.randn(4, 3)
    for call in (0, 1, -1):
        found = Pullback(net, Target("y", [0, 1]), Site("layer", call=call)).gradients(TensorDict(x=x, batch_size=[4]))[
            0
        ]
        if call == 0:
            expected = slow(lambda h: tail(layer(torch.tanh(h))), layer(x), 1)
        else:
            expected = slow(tail, layer(torch.tanh(layer(x))), 1)
        torch.testing.assert_close(found, expected)
