"""Saliency by perturbation: what changes in a policy's outputs where a part of the observation is hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.hooks import Target, dispatch_rows
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey, as_key
from tdconcepts.perturbation.ablation import FeatureAblation
from tdconcepts.perturbation.baselines import Blur
from tdconcepts.perturbation.masks import Masks
from tdconcepts.perturbation.perturbing import Game, Perturbed, Perturbing
from tdconcepts.rl.selections import one_hot

__all__ = ["Greydanus", "Sarfa", "Spots", "object_saliency"]


@dataclasses.dataclass(frozen=True)
class Spots:
    r"""Blurred spots on a grid, for pixels ``[..., H, W]``: :math:`I' = I (1 - M) + \mathrm{blur}(I)\, M`.

    :math:`M` is a Gaussian of standard deviation ``sigma`` and peak 1 around a point of the grid. A pixel's score is
    interpolated (bilinearly) between the grid's points.

    Args:
        sigma: of the spot, in pixels.
        stride: between the grid's points, in pixels.
        blur: the standard deviation of the blur that a spot shows, in pixels.

    Raises:
        BadValue: sizes that are not positive.

    Source: Greydanus et al. 2018, "Visualizing and understanding Atari agents", equation 1 and section 3.1.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> corner = TensorDictModule(lambda x: x[..., :4, :4].mean((-1, -2)).unsqueeze(-1), ["pixels"], ["value"])
        >>> td = TensorDict(pixels=torch.eye(16).expand(1, 16, 16), batch_size=[1])
        >>> spots = Greydanus(corner, "value", features=Spots(sigma=2.0, stride=4, blur=2.0))
        >>> score = spots(td)["attribution", "pixels"]
        >>> bool(score[0, :4, :4].sum() > score[0, 12:, 12:].sum())
        True
    """

    sigma: float = 5.0
    stride: int = 5
    blur: float = 3.0

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and self.blur > 0 and type(self.stride) is int and self.stride >= 1):
            raise BadValue("not spots", got=repr(self), needed="sigma > 0, blur > 0, stride an int >= 1")

    def grid(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The rows and the columns of the points."""
        return torch.arange(0, height, self.stride), torch.arange(0, width, self.stride)


class Greydanus(TensorDictModuleBase):
    r"""How far the outputs move where a part is hidden: :math:`S = \frac12 \lVert u(s) - u(s') \rVert^2`.

    | reads | writes |
    |---|---|
    | what ``of`` depends on; ``("baseline", *k)`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    With logits it is the saliency of the actor, :math:`S_\pi`, with a state value that of the critic, :math:`S_V`. On
    values of actions it mixes both: what moves all values alike ranks high, whether or not it matters for the choice
    (:class:`Sarfa` takes that out). A memory is an entry like any other, held as it is while ``wrt`` is perturbed.

    Args:
        module: a policy or a critic.
        of: the entry whose numbers are compared, ``[*B, n]``.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        features: :class:`Spots` for pixels; default: the groups of ``mask`` (a key where objects are outlined state by
            state), or each element.
        options: ``mask``, ``baseline`` (of spots: what shows in place of the blur), ``progress``; see
            :class:`~tdconcepts.perturbation.Perturbed`; and ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``;
            see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadKey: an entry that is not there. BadValue: features that do not fit what is explained.

    Source: Greydanus et al. 2018, "Visualizing and understanding Atari agents", equations 1 to 3.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x * torch.tensor([1.0, 2.0]), ["observation"], ["logits"])
        >>> td = TensorDict(observation=torch.tensor([[3.0, 1.0]]), batch_size=[1])
        >>> Greydanus(net)(td)["attribution", "observation"]
        tensor([[4.5000, 2.0000]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        of: NestedKey = "logits",
        wrt: Wrt | list[Wrt] | None = None,
        *,
        features: Spots | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        super().__init__()
        self._bind(module, Target(of, slice(None)), wrt, features, options, [])

    def _bind(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None,
        features: Spots | None,
        options: Perturbed,
        keys: list[NestedKey],
    ) -> None:
        if features is not None and "mask" in options:
            raise BadValue("features and a mask", got=f"{features!r} and mask=", needed="one of them")
        self._perturbing = Perturbing(module, target, wrt, options)
        self.module, self.features = module, features
        self.in_keys = list(dict.fromkeys([*self._perturbing.in_keys, *keys]))
        self.out_keys, self.optional_keys = self._perturbing.out_keys, self._perturbing.optional_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._perturbing.run(tensordict, self._play)

    def _play(self, game: Game) -> dict[Wrt, Tensor]:
        return _hidden(game, self.features, self._score)

    def _score(self, values: Tensor, td: TensorDictBase) -> Tensor:
        """``values`` ``[1 + n, *B(, A)]``, of the state itself first; a score for each feature, ``[n, *B]``."""
        return 0.5 * (values[:1] - values[1:]).square().sum(-1)


class Sarfa(Greydanus):
    r"""What matters for the action that was taken, and for it only: :math:`S = 2 K \Delta p / (K + \Delta p)`.

    Reads and writes as :class:`Greydanus`, and reads the action. With :math:`p = \mathrm{softmax}(Q)` (computed from
    differences, so that large values do not overflow): :math:`\Delta p = p(a|s) - p(a|s')`, and
    :math:`K = 1 / (1 + D_\mathrm{KL}(p_\mathrm{rem}(s) \| p_\mathrm{rem}(s')))` over the actions that were not taken.
    Where the action becomes *more* probable, S is zero. With two actions K is always one.

    Args:
        module, wrt, features, options: as for :class:`Greydanus`.
        of: the entry with a value (or logit) for each action, ``[*B, A]``.
        action: the logged action, indices ``[*B]`` or one-hot rows ``[*B, A]``.

    Raises:
        BadKey: an entry that is not there. BadValue: features that do not fit what is explained, no such action.

    Source: Puri et al. 2020, "Explain your move: understanding agent actions using specific and relevant feature
    attribution", equations 1 to 4.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x @ torch.tensor([[1.0, 0.0], [9.0, 9.0]]), ["observation"], ["q"])
        >>> td = TensorDict(observation=torch.tensor([[3.0, 1.0]]), action=torch.tensor([0]), batch_size=[1])
        >>> Sarfa(net, "q", wrt="observation")(td)["attribution", "observation"]  # the second moves both values alike
        tensor([[0.6231, 0.0000]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        of: NestedKey = "action_value",
        action: NestedKey = "action",
        wrt: Wrt | list[Wrt] | None = None,
        *,
        features: Spots | None = None,
        **options: Unpack[Perturbed],
    ) -> None:
        TensorDictModuleBase.__init__(self)
        self.action = as_key(action)
        self._bind(module, Target(of, slice(None)), wrt, features, options, [self.action])

    def _score(self, values: Tensor, td: TensorDictBase) -> Tensor:
        mine = one_hot(values[0], td, self.action)
        log_p = torch.where(mine, values.log_softmax(-1), 0.0).sum(-1)
        change = log_p[:1].exp() - log_p[1:].exp()
        rest = values.masked_fill(mine, -torch.inf).log_softmax(-1)
        gap = torch.where(mine, 0.0, rest[:1] - rest[1:])  # of the action itself both are -inf
        divergence = (torch.where(mine, 0.0, rest[:1].exp()) * gap).sum(-1).clamp(min=0.0)
        same = 1.0 / (1.0 + divergence)
        return torch.where(change > 0, 2.0 * same * change / (same + change), 0.0)


def object_saliency(
    module: TensorDictModuleBase,
    target: Target,
    objects: Masks = "objects",
    wrt: Wrt | list[Wrt] | None = None,
    **options: Any,
) -> FeatureAblation:
    r"""What the target loses without an object: :math:`w_o = y(s) - y(s \text{ without } o)`.

    A :class:`~tdconcepts.perturbation.FeatureAblation` whose features are the objects; each element gets the score of
    the object that it belongs to.

    Args:
        module: a policy or a critic.
        target: what is explained; :func:`~tdconcepts.rl.chosen_value` typically.
        objects: the number of the object at each place (-1: none). A string or tuple is the first part of the keys
            that hold it, state by state: ``("objects", *k)`` ``[*B, ...]`` outlines the objects in the entry ``k``.
        wrt: entries, one or a list; default: all that the module reads.
        options: see :class:`~tdconcepts.perturbation.Perturbed`, without ``mask``.

    Source: Iyer et al. 2018, "Transparency and explanation in deep reinforcement learning neural networks".

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(lambda x: x.sum(-1), ["observation"], ["value"])
        >>> td = TensorDict(observation=torch.ones(1, 3), batch_size=[1])
        >>> td["objects", "observation"] = torch.tensor([[0, 1, 1]])
        >>> object_saliency(net, Target("value"))(td)["attribution", "observation"]
        tensor([[1., 2., 2.]])
    """
    return FeatureAblation(module, target, wrt, mask=objects, **options)


Score = Callable[[Tensor, TensorDictBase], Tensor]


def _hidden(game: Game, features: Spots | None, score: Score) -> dict[Wrt, Tensor]:
    """The score of each feature, spread over its elements."""
    if features is None:
        each = torch.arange(game.count, device=game.device)
        values = game.coalitions(game.count + 1, lambda at: at.unsqueeze(-1) - 1 != each)
        return game.spread(score(values, game.td))
    return {w: _spots(game, features, w, score) for w in game.ends}


def _spots(game: Game, spots: Spots, mine: Wrt, score: Score) -> Tensor:
    end, lead = game.ends[mine], game.lead
    if end.ndim - lead < 2:
        got = f"rows of shape {list(end.shape[lead:])}"
        raise BadValue(f"spots need pixels {['...', 'H', 'W']}", got=got, fix="features=None for plain features")
    height, width = end.shape[-2:]
    rows, columns = (at.to(end.device) for at in spots.grid(height, width))
    shown = Blur(spots.blur)(end, lead) if game.owner.baseline is None else game.starts[mine]
    y, x = (torch.arange(size, device=end.device) for size in (height, width))

    def other(at: Tensor, w: Wrt) -> Tensor:  # experiment 0 is the state itself
        if w != mine:
            return game.ends[w].expand(len(at), *game.ends[w].shape)
        place = (at - 1).clamp(min=0)
        down, right = rows[place // len(columns)].unsqueeze(-1), columns[place % len(columns)].unsqueeze(-1)
        far = (y - down).square().unsqueeze(-1) + (x - right).square().unsqueeze(-2)
        mask = torch.exp(-far.to(end.dtype) / (2 * spots.sigma**2)) * (at > 0).view(-1, 1, 1)
        mask = mask.reshape(len(at), *[1] * (end.ndim - 2), height, width)
        return end + (shown - end) * mask

    scores = score(game.values(len(rows) * len(columns) + 1, _nothing(game), other), game.td)
    grid = scores.reshape(len(rows), len(columns), *scores.shape[1:]).movedim((0, 1), (-2, -1))
    weight_y, weight_x = (_between(n, spots.stride, len(at), end) for n, at in ((height, rows), (width, columns)))
    found = weight_y @ grid @ weight_x.mT
    return game.shaped(
        mine, found.reshape(*found.shape[:lead], *[1] * (end.ndim - lead - 2), height, width).expand_as(end).clone()
    )


def _nothing(game: Game) -> Callable[[Tensor, Wrt], Tensor]:
    """Nothing stays of itself: all is said by what stands in for it."""
    return lambda at, w: torch.zeros((len(at), *[1] * game.ends[w].ndim), dtype=torch.bool, device=game.ends[w].device)


def _between(length: int, stride: int, points: int, like: Tensor) -> Tensor:
    """Linear interpolation between points ``0, stride, ...`` as a matrix ``[length, points]``; flat beyond the last."""
    at = torch.arange(length, dtype=like.dtype, device=like.device) / stride
    low = at.floor().clamp(max=points - 1)
    part = (at - low).clamp(max=1.0) * (low < points - 1)
    eye = torch.eye(points, dtype=like.dtype, device=like.device)
    low = low.long()
    return (1 - part).unsqueeze(-1) * eye[low] + part.unsqueeze(-1) * eye[(low + 1).clamp(max=points - 1)]
