"""The small models of the hook tests, what it means that a model is as it was, and gradients one by one."""

import itertools

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def mlp(**keywords):
    """x [4] -> "0" Linear [3] -> "1" Tanh -> "2" Linear -> y [2]; always the same weights."""
    layers = [linear(4, 3, 0), keywords.get("act", nn.Tanh()), linear(3, 2, 1)]
    return TensorDictModule(nn.Sequential(*layers), in_keys=["x"], out_keys=["y"])


def pipeline():
    """The same network as mlp(), in stages: x -> h -> z -> y."""
    return TensorDictSequential(
        TensorDictModule(linear(4, 3, 0), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Tanh(), in_keys=["h"], out_keys=["z"]),
        TensorDictModule(linear(3, 2, 1), in_keys=["z"], out_keys=["y"]),
    )


class Twice(nn.Module):
    """A module that uses one layer twice: y = tail(layer(tanh(layer(x))))."""

    def __init__(self):
        super().__init__()
        self.layer, self.tail = linear(3, 3, 0), linear(3, 2, 1)

    def forward(self, x):
        return self.tail(self.layer(torch.tanh(self.layer(x))))


def twice():
    return TensorDictModule(Twice(), in_keys=["x"], out_keys=["y"])


def linear(n_in, n_out, seed):
    layer = nn.Linear(n_in, n_out)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=generator))
        layer.bias.copy_(torch.randn(n_out, generator=generator))
    return layer


def batch(*shape, features=4, seed=7, **entries):
    """A TensorDict of batch size ``shape`` ([5] by default) with x [*B, features], and further entries."""
    shape = shape or (5,)
    x = torch.randn(*shape, features, generator=torch.Generator().manual_seed(seed))
    return TensorDict(x=x, **entries, batch_size=shape)


def snapshot(model):
    """Everything that a context must leave as it was: hooks, tree, flags, attributes, tensors and where they lie."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tree": [(name, id(module)) for name, module in model.named_modules()],
        "hooks": [{h: dict(getattr(m, h)) for h in HOOKS} for m in model.modules()],
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if k not in ("_forward_hooks", "_forward_pre_hooks")}
            for m in model.modules()
        ],
        "training": [m.training for m in model.modules()],
        "tensors": {k: (v.data_ptr(), v.requires_grad, v._version, v.detach().tolist()) for k, v in tensors.items()},
        "gradients": {k: None if v.grad is None else v.grad.tolist() for k, v in tensors.items()},
        "state_dict": list(model.state_dict()),
    }


def hook_count(model):
    return sum(len(getattr(m, h)) for m in model.modules() for h in HOOKS)


def entries(td):
    """The entries of a TensorDict with their values and identities, to compare before and after."""
    return {key: (id(td.get(key)), td.get(key)._version, td.get(key).tolist()) for key in td.keys(True, True)}


def slow(function, point, lead):
    """Each target of each row by an autograd call of its own: ``[*B, ...]``, or ``[*B, T, ...]``."""
    point = point.detach().clone().requires_grad_()
    values = function(point)
    found = torch.zeros(*values.shape, *point.shape[lead:])
    for where in itertools.product(*map(range, values.shape)):
        gradient = torch.autograd.grad(values[where], point, retain_graph=True, allow_unused=True)[0]
        if gradient is not None:
            found[where] = gradient[where[:lead]]
    return found
