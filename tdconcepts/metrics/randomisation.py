"""Does an explanation depend on what the model has learnt? The parameter-randomisation check, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import check_module
from tdconcepts.hooks.drawing import Source
from tdconcepts.hooks.sites import module_paths
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Randomised", "parameter_randomisation", "spearman"]


@dataclasses.dataclass(frozen=True)
class Randomised:
    """What :func:`parameter_randomisation` found: the layers that were randomised, and each row's similarity.

    An explanation that depends on the model falls to 0.

    Args:
        layers: the paths of the L layers, in the order in which they were drawn anew.
        similarity: ``[L, *B]``, the rank correlation between the explanation of the model as it is and the one after
            the layer (and, cascading, all layers after it) was drawn anew.

    Examples:
        >>> found = Randomised(("2", "0"), torch.tensor([[0.75, 0.25], [0.5, 0.0]]))
        >>> found.mean
        {'2': 0.5, '0': 0.25}
    """

    layers: tuple[str, ...]
    similarity: Tensor

    @property
    def mean(self) -> dict[str, float]:
        """The mean over rows by layer."""
        flat = self.similarity.flatten(1) if self.similarity.ndim > 1 else self.similarity.unsqueeze(-1)
        return dict(zip(self.layers, flat.mean(-1).tolist(), strict=True))


def parameter_randomisation(
    explain: Callable[[TensorDictModuleBase], TensorDictModuleBase],
    module: TensorDictModuleBase,
    td: TensorDictBase,
    *,
    layers: Sequence[str] | None = None,
    cascading: bool = True,
    key: NestedKey | None = None,
    generator: torch.Generator | None = None,
) -> Randomised:
    """Explain again and again while the model's layers are drawn anew, from the last to the first.

    The module is left alone: copies are randomised. Weights are shuffled within each parameter, so that their
    distribution stays and only what was learnt goes; the biases with them.

    Args:
        explain: makes the explainer of a module: ``lambda m: Gradient(m, chosen_value())``.
        module: the trained policy or critic.
        td: the states, ``[*B]``; the logged action is held.
        layers: paths of layers with parameters, the first to be randomised first; default: all, from the last that was
            registered to the first.
        cascading: randomise each layer *on top of* those before (default), or alone.
        key: the attribution that is compared; default: the explainer's first.
        generator: of the shuffles. Default: torch's own.

    Raises:
        BadKey: a layer or key that is not there. BadType: ``explain`` makes no TensorDictModule.

    Source: Adebayo et al. 2018, "Sanity checks for saliency maps", section 3.1; for agents Huber et al. 2022,
    "Benchmarking perturbation-based saliency maps for explaining Atari agents".

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts import Gradient, Target
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), ["x"], ["q"])
        >>> td = TensorDict(x=torch.randn(5, 4), batch_size=[5])
        >>> found = parameter_randomisation(lambda m: Gradient(m, Target("q", 0)), net, td)
        >>> found.layers, found.similarity.shape
        (('2', '0'), torch.Size([2, 5]))
    """
    check_module(module)
    if not isinstance(td, TensorDictBase):
        raise BadType("not states", got=type(td).__name__, needed="a TensorDict of states [*B]")
    if not callable(explain):
        raise BadType("what makes the explainer?", got=repr(explain), needed="lambda m: Gradient(m, chosen_value())")
    known = _layers(module)
    if not known:
        raise BadValue("nothing to randomise", got=f"{type(module).__name__} without parameters")
    names = list(known)[::-1] if layers is None else list(layers)
    for name in names:
        if name not in known:
            raise BadKey(f"no layer {name!r} with parameters", got=name, needed=nearest(name, list(known)))
    source, explainer = Source(generator), explain(module)
    check_module(explainer, "the explainer")
    key = explainer.out_keys[0] if key is None else as_key(key)
    if key not in explainer.out_keys:
        raise BadKey(f"the explainer writes no {key_text(key)}", needed=nearest(key, explainer.out_keys))
    before, twin, found = explainer(td.copy()).get(key), module, []
    if before.shape[td.batch_dims :].numel() < 2:
        raise BadType("nothing to rank", got=f"attributions of shape {list(before.shape)}", needed="two numbers a row")
    for name in names:
        twin = copy.deepcopy(twin if cascading else module)
        _shuffle(_layers(twin)[name], source)
        found.append(spearman(before.flatten(td.batch_dims), explain(twin)(td.copy()).get(key).flatten(td.batch_dims)))
    return Randomised(tuple(names), torch.stack(found))


def spearman(one: Tensor, other: Tensor, signed: bool = False) -> Tensor:
    """The rank correlation along the last dim, of sizes by default; ties share their mean rank. NaN where all tie.

    Examples:
        >>> spearman(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]))
        tensor(1.)
    """
    left, right = (_ranks(value if signed else value.abs()) for value in (one, other))
    left, right = left - left.mean(-1, keepdim=True), right - right.mean(-1, keepdim=True)
    return ((left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))).to(one.dtype)


def _ranks(value: Tensor) -> Tensor:
    below = (value.unsqueeze(-1) > value.unsqueeze(-2)).sum(-1)
    same = (value.unsqueeze(-1) == value.unsqueeze(-2)).sum(-1)
    return below.double() + (same.double() - 1) / 2


def _layers(module: TensorDictModuleBase) -> dict[str, nn.Module]:
    """The layers with parameters of their own, by path; one that a TensorDictModule wraps has the wrapper's path."""
    found = {}
    for path, layer in module_paths(module).items():
        while isinstance(layer, TensorDictModuleBase) and isinstance(inner := layer._modules.get("module"), nn.Module):
            layer = inner
        if any(True for _ in layer.parameters(recurse=False)):
            found[path] = layer
    return found


def _shuffle(layer: nn.Module, source: Source) -> None:
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            order = source.permutations(1, parameter.numel())[0].to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
