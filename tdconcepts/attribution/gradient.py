"""Gradients of a target: as they are, their size, and times the input."""

from __future__ import annotations

from typing import Unpack

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.hooks import Options, Target, dispatch_rows
from tdconcepts.hooks.explaining import Explaining
from tdconcepts.hooks.pullback import Wrt
from tdconcepts.keys import NestedKey
from tdconcepts.tunables import Replaceable

__all__ = ["Gradient", "InputXGradient", "Saliency"]


class Gradient(Replaceable, TensorDictModuleBase):
    r"""The gradient of a target: :math:`\partial y / \partial w`.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    With several targets there is one more dim of size T right after the batch dims. For a site, ``k`` is its text.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: with respect to what: entries and sites, one or a list; default: all entries that the module reads.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: a bare ``nn.Module``, or an integer entry. BadKey: an entry or site that does not exist.
        BadValue: a target out of range, or one that no gradient reaches.

    Source: Simonyan et al., *Deep inside convolutional networks*, 2013 (section 3); for the gradient of a neuron take
    ``Target(Site(...), index)``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> policy = TensorDictModule(torch.nn.Linear(4, 2), in_keys=["observation"], out_keys=["action_value"])
        >>> td = TensorDict(observation=torch.randn(3, 4), action=torch.tensor([0, 1, 1]), batch_size=[3])
        >>> td = Gradient(policy, Target("action_value", by="action"))(td)
        >>> torch.equal(td["attribution", "observation"], policy.module.weight[td["action"]])
        True
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: Wrt | list[Wrt] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._explaining = Explaining(module, target, wrt, options)
        self.module = module
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here, for methods that look at several points."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this = self._explaining
        pulled = this.pullback(
            td, create_graph=this.create_graph, snapshot=self._needs_points, held=held, width=this.width(td)
        )
        several = pulled.values.ndim > td.batch_dims
        results = {
            key: self._combine(gradient, point.unsqueeze(td.batch_dims) if several else point)
            for key, gradient, point in zip(this.attribution_keys, pulled.gradients, pulled.points, strict=True)
        }
        return results | this.written(pulled.outputs)

    _needs_points = False

    def _combine(self, gradient: Tensor, point: Tensor) -> Tensor:
        return self._explaining.own(gradient)


class Saliency(Gradient):
    r"""The size of the gradient: :math:`|\partial y / \partial w|`.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    With several targets there is one more dim of size T right after the batch dims, as of :class:`Gradient`.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: with respect to what: entries and sites, one or a list; default: all entries that the module reads.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: a bare ``nn.Module``, or an integer entry. BadKey: an entry or site that does not exist.
        BadValue: a target out of range, or one that no gradient reaches.

    Source: Simonyan et al., *Deep inside convolutional networks*, 2013 (section 3.1).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), in_keys=["x"], out_keys=["logits"])
        >>> td = Saliency(net, Target("logits", "argmax"))(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> bool((td["attribution", "x"] >= 0).all())
        True
    """

    def _combine(self, gradient: Tensor, point: Tensor) -> Tensor:
        return gradient.abs()


class InputXGradient(Gradient):
    r"""The value times the gradient: :math:`w \cdot \partial y / \partial w`, for entries and for activations at sites.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |

    It sums to ``y`` for a network that is linear without a bias. With several targets there is one more dim of size T
    right after the batch dims.

    Args:
        module: a TensorDictModule.
        target: what is explained.
        wrt: with respect to what: entries and sites, one or a list; default: all entries that the module reads.
        options: ``chunk_size``, ``outputs``, ``create_graph``, ``out_key``; see :class:`~tdconcepts.hooks.Options`.

    Raises:
        BadType: a bare ``nn.Module``, or an integer entry. BadKey: an entry or site that does not exist.
        BadValue: a target out of range, or one that no gradient reaches.

    Source: Shrikumar et al., *Not just a black box*, 2016.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(4, 2, bias=False), in_keys=["x"], out_keys=["logits"])
        >>> td = InputXGradient(net, Target("logits", 1))(net(TensorDict(x=torch.randn(3, 4), batch_size=[3])))
        >>> torch.allclose(td["attribution", "x"].sum(-1), td["logits"][:, 1], atol=1e-6)
        True
    """

    _needs_points = True

    def _combine(self, gradient: Tensor, point: Tensor) -> Tensor:
        return point * gradient
