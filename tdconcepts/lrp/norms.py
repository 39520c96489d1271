"""The rules of normalisations: layer norm and RMS norm, with their scale held constant."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tdconcepts.hooks.flows import backward_by, untransformed
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.stabilizers import Stabilizing, stabilized

__all__ = ["LayerNormRule", "RMSNormRule"]

_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclasses.dataclass(frozen=True)
class LayerNormRule(Rule):
    r"""Layer norm with its standard deviation held constant: :math:`G_{in} = J_\sigma^T G`.

    :math:`J_\sigma` is the Jacobian of :math:`(x - \bar x)/\sigma \odot w + b` for constant :math:`\sigma`: subtracting
    the mean, scaling. The forward pass is the module's own, for any ``normalized_shape``. Group norm and instance norm
    in the same way. Relevance convention: :math:`R_{in} = x \odot J_\sigma^T(R \oslash \mathrm{stab}(y))`.

    Args:
        epsilon: for the relevance convention: a number or a stabiliser.

    Raises:
        BadValue: at the call, for what is no layer, group or instance norm.

    Source: Ali et al., *XAI for transformers*, 2022 (LN rule); Achtibat et al., *AttnLRP*, 2024.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> with LayerNormRule().on(nn.LayerNorm(2, eps=0.0)) as m:
        ...     torch.autograd.grad(m(x), x, torch.tensor([[1.0, 0.0]]))[0]
        tensor([[ 0.5000, -0.5000]])
    """

    epsilon: Stabilizing = 1e-6

    def carry(self, call: Call) -> Tensor:
        """``nn.LayerNorm``, ``nn.GroupNorm``, instance norms, and the functions of these names."""
        x = call.inputs[0]
        shape, count, weight, eps = self._layout(call, x)
        rows, dims = x.reshape(shape), tuple(range(-count, 0))
        apart = rows - rows.mean(dims, keepdim=True)
        scale = (apart.square().mean(dims, keepdim=True) + eps).rsqrt()  # var takes ten times as long
        relevance, by = call.carries_relevance, self.epsilon

        def formula(flow: Tensor, scale: Tensor, *kept: Tensor) -> tuple[Tensor]:
            ratio = flow / stabilized(kept[1], by) if relevance else flow
            parts = (ratio if weight is None else ratio * weight).reshape(shape)
            found = ((parts - parts.mean(dims, keepdim=True)) * scale).reshape(flow.shape)
            return (kept[0] * found if relevance else found,)

        kept = [x, call.kept(call.output)] if relevance else []
        return backward_by(formula, call.output, [x], scale, *kept, keep=False)

    def _layout(self, call: Call, x: Tensor) -> tuple[list[int], int, Tensor | None, float]:
        """The shape in which the last dims are normalised together, how many they are, the weight, and eps."""
        m: Any = call.module
        args = dict(zip(("input", "second", "weight", "bias", "eps"), call.args, strict=False)) | call.kwargs
        if isinstance(m, nn.LayerNorm) or call.name == "layer_norm":
            over = m.normalized_shape if m is not None else args.get("normalized_shape", args.get("second"))
            weight = m.weight if m is not None else args.get("weight")
            eps = m.eps if m is not None else args.get("eps", 1e-5)
            return list(x.shape), 1 if isinstance(over, int) else len(over), weight, eps
        lead: list[int] = [x.shape[0]]
        if isinstance(m, nn.GroupNorm) or call.name == "group_norm":
            groups = m.num_groups if m is not None else args.get("num_groups", args.get("second"))
            weight = m.weight if m is not None else args.get("weight")
            eps = m.eps if m is not None else args.get("eps", 1e-5)
        elif isinstance(m, _INSTANCE) and not m.track_running_stats:
            n = next(n for n, kind in enumerate(_INSTANCE, 1) if isinstance(m, kind))
            lead = lead if x.ndim == n + 2 else []  # one row without a batch dim
            groups, weight, eps = x.shape[len(lead)], m.weight, m.eps
        else:
            raise call.cannot(self, "it is no layer norm, group norm or instance norm", "RMSNormRule or EpsilonRule")
        weight = None if weight is None else weight.reshape(-1, *[1] * (x.ndim - 1 - len(lead)))
        return [*lead, groups, -1], 1, weight, eps


@dataclasses.dataclass(frozen=True)
class RMSNormRule(Rule):
    r"""RMS norm with its scale held constant: :math:`G_{in} = G \odot y / x = G \odot w / \mathrm{rms}`.

    Relevance convention: :math:`R_{in} = R`, exactly. It serves any module that scales its input elementwise.

    Raises:
        BadValue: at the call, for an output of another shape than the input.

    Source: Achtibat et al., *AttnLRP*, 2024 (section 3.3, normalisation as identity).

    Examples:
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> with RMSNormRule().on(nn.RMSNorm(2, eps=0.0)) as m:
        ...     torch.autograd.grad(m(x), x, torch.ones(1, 2))[0].round(decimals=4)
        tensor([[0.2828, 0.2828]])
    """

    def carry(self, call: Call) -> Tensor:
        """``nn.RMSNorm``, and modules that do the same."""
        z, inputs = call.output, call.inputs
        if len(inputs) != 1 or not isinstance(z, Tensor) or inputs[0].shape != z.shape:
            raise call.cannot(self, "it does not scale its one input", "LayerNormRule or EpsilonRule")
        if call.carries_relevance:
            return backward_by(lambda flow: (flow,), z, inputs, keep=False)
        (x,), saved = inputs, call.kept(z)
        if untransformed(x) and not bool((x.detach() == 0).any()):
            return backward_by(_scaled, z, [x], saved)
        return backward_by(_scaled_at_zeros, z, [x, z], x, saved, keep=False)  # at 0 its derivative is the scale


def _scaled(flow: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor]:
    return (flow * (z / x),)


def _scaled_at_zeros(flow: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    zero = x == 0
    ratio = torch.where(zero, 0.0, z / torch.where(zero, 1.0, x))
    return flow * ratio, torch.where(zero, flow, 0.0)
