"""Weighted sums of gradients over copies of a batch, taken behind the first layer where that layer is linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tdconcepts.errors import BadValue
from tdconcepts.hooks.jacobian import vector_jacobian

__all__ = ["PathSum", "traced"]

_WORTH = 2**14  # numbers of an entry, times targets: for fewer there is little to gain
_MOST = 2**20  # numbers that wait behind a layer, where they are those of more than four copies of the batch


class PathSum:
    r"""Gradients summed over copies of a batch, :math:`\sum_k w_k\,\partial y / \partial x (x_k)`, a few at a time.

    Where one convolution or matrix product reads an entry, and nothing else does, what flows back is summed at its
    output and pulled through it once, at the end: it is the same linear map for all copies. That is seen in the graph,
    so nothing has to be known of the network.

    Args:
        module: what is explained.
        shapes: of the entries, ``[*B, ...]``.
        rows: how many rows go through such a layer at once.

    Raises:
        BadValue: when the weights of such a layer are overwritten between the copies.

    Examples:
        >>> net, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
        >>> total, many = PathSum(net, [x.shape], rows=8), torch.cat([x, 2 * x]).requires_grad_()
        >>> total.of(lambda dtype, device: torch.tensor([0.5, 1.5], dtype=dtype, device=device))
        >>> total.pull(net(many)[:, 1], [many], False, False, None, "y")
        []
        >>> torch.allclose(total.result(1)[0], 2 * net.weight[1].expand(3, 4))
        True
    """

    def __init__(self, module: nn.Module, shapes: Sequence[torch.Size], rows: int) -> None:
        self._sums = [_Sum(shape, rows) for shape in shapes]
        # a backward hook of the old kind may change what comes out of a layer, not what goes in
        self._looks = not any(one._is_full_backward_hook is False for one in module.modules())
        self._weights: Callable[[torch.dtype, torch.device], Tensor] | None = None
        self._several = False

    def of(self, weights: Callable[[torch.dtype, torch.device], Tensor]) -> None:
        """What the copies that come next weigh: gives it in at least a dtype, on a device."""
        self._weights = weights

    def pull(
        self, values: Tensor, leaves: Sequence[Tensor], several: bool, create_graph: bool, width: int | None, name: str
    ) -> list[Tensor | None]:
        """Add what :func:`~tdconcepts.hooks.jacobian.vector_jacobian` gives for these copies; nothing is returned."""
        self._several, targets = several, values.shape[-1] if several else 1
        look = self._looks and values.grad_fn is not None and any(targets * leaf.numel() >= _WORTH for leaf in leaves)
        readers = _readers(values, leaves) if look else [[] for _ in leaves]
        inputs = [
            one.begin(leaf, _layer(leaf, nodes) if targets * leaf.numel() >= _WORTH else None, targets)
            for one, leaf, nodes in zip(self._sums, leaves, readers, strict=True)
        ]
        vector_jacobian(values, inputs, several, create_graph, width, name, self._add)
        return []

    def result(self, batch_dims: int) -> list[Tensor]:
        """The sums, ``[*B, ...]``, with several targets ``[*B, T, ...]``; in float32 at least."""
        found = [one.finish() for one in self._sums]
        return [one.movedim(0, batch_dims).contiguous() if self._several else one[0] for one in found]

    def _add(self, i: int, at: slice, gradient: Tensor) -> None:
        assert self._weights is not None
        self._sums[i].add(at, gradient, self._weights(gradient.dtype, gradient.device))


def traced() -> bool:
    """Inside ``torch.compile`` or a function transform, where a graph can't be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


class _Layer(NamedTuple):
    """What reads an entry: where flows arrive, the shape there, that of a row of the entry, the weight, and how."""

    edge: GradientEdge
    shape: torch.Size
    row: torch.Size
    weight: Tensor
    version: int
    how: tuple[Any, ...] | None  # None for a matrix product

    def pulled(self, flow: Tensor) -> Tensor:
        """``flow`` ``[rows, ...]`` at its output, at its input."""
        if self.weight._version != self.version:
            raise BadValue(
                "a weight of the first layer was overwritten while copies of the batch went through it",
                got=f"a weight of shape {list(self.weight.shape)}, version {self.weight._version}",
                needed="weights that stay, for one explanation",
                fix="module.eval(), or chunk_size= as large as all copies",
            )
        flow = flow.view(-1, *self.shape[1:]).to(self.weight.dtype)
        if self.how is None:
            return flow @ self.weight.t()
        x = self.weight.new_empty(1).expand(len(flow), *self.row)  # only its shape counts
        stride, padding, dilation, transposed, more, groups = self.how
        how = (stride, padding, dilation, transposed, more, groups, [True, False, False])
        found: Tensor = torch.ops.aten.convolution_backward(flow, x, self.weight, None, *how)[0]
        return found

    def equals(self, other: _Layer | None) -> bool:
        """Whether it is the same linear map."""
        if other is None or self.how != other.how or self.row != other.row or self.shape[1:] != other.shape[1:]:
            return False
        a, b = self.weight, other.weight
        same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        return same or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


class _Sum:
    """The sum for one entry ``[*B, ...]``: what waits behind a layer, and what went through one."""

    def __init__(self, shape: torch.Size, rows: int) -> None:
        self.shape, self.rows, self.targets = shape, rows, 1
        self.layer: _Layer | None = None
        self.waiting: Tensor | None = None  # [T, all numbers of a batch, there]
        self.done: Tensor | None = None  # [T, *B, ...]

    def begin(self, leaf: Tensor, layer: _Layer | None, targets: int) -> Any:
        """Where the gradient of these copies is to be taken: at ``leaf``, or where it is better."""
        copies = max(1, leaf.numel() // max(1, self.shape.numel()))
        if layer is not None and targets > 4 * copies and targets * layer.shape.numel() > _MOST * copies:
            layer = None
        if self.waiting is not None and not (layer.equals(self.layer) if layer else self.layer is None):
            self.finish()
        self.layer, self.targets = layer, targets
        if self.waiting is None:
            size = self.shape.numel() if layer is None else layer.shape.numel() // copies
            self.waiting = leaf.new_zeros(targets, size, dtype=torch.promote_types(leaf.dtype, torch.float32))
        return leaf if layer is None else layer.edge

    def add(self, at: slice, gradient: Tensor, weights: Tensor) -> None:
        """Add the ``gradient`` ``[t, n * B, ...]`` of some targets."""
        assert self.waiting is not None
        count, copies, size = len(gradient), len(weights), self.waiting.shape[-1]
        flat = gradient.reshape(count, copies, size).to(weights.dtype)
        if count == 1:
            self.waiting[at.start].addmv_(flat[0].t(), weights)
        else:
            self.waiting[at] += torch.matmul(weights, flat)

    def finish(self) -> Tensor:
        """The sum as far as it goes; nothing waits."""
        if self.waiting is not None:
            found, self.waiting = self.waiting, None
            if self.layer is not None:
                flows = found.view(-1, *self.layer.shape[1:]).split(self.rows)
                found = torch.cat([self.layer.pulled(flow).to(found.dtype) for flow in flows])
            found = found.view(self.targets, *self.shape)
            self.done = found if self.done is None else self.done + found
        assert self.done is not None
        return self.done


def _readers(values: Tensor, leaves: Sequence[Tensor]) -> list[list[tuple[Node, int]]]:
    """For each leaf the nodes of the graph of ``values`` that read it, each with the number of its argument."""
    ends: dict[Any, list[tuple[Node, int]]] = {get_gradient_edge(leaf).node: [] for leaf in leaves}
    known: set[Any] = {values.grad_fn}
    rest: list[Any] = [values.grad_fn]
    while rest:
        node = rest.pop()
        for number, (after, _) in enumerate(node.next_functions):
            if after in ends:
                ends[after].append((node, number))
            elif after is not None and after not in known:
                known.add(after)
                rest.append(after)
    return list(ends.values())


def _layer(leaf: Tensor, readers: list[tuple[Node, int]]) -> _Layer | None:
    """The layer that reads ``leaf``, if there is one alone, which is linear in it row by row."""
    if len(readers) != 1 or leaf._backward_hooks:
        return None
    (found, number), how = readers[0], None
    node: Any = found
    if node.name() == "ConvolutionBackward0" and number == 0:
        weight = node._saved_weight
        how = tuple(getattr(node, f"_saved_{name}") for name in _CONVOLUTION)
    elif (node.name() == "AddmmBackward0" and number == 1 and node._saved_alpha == 1) or (
        node.name() == "MmBackward0" and number == 0
    ):
        weight = node._saved_mat2
    else:
        return None
    shape = torch.Size(node._input_metadata[0].shape)
    if weight.requires_grad:
        weight = weight.detach()
    if len(shape) != leaf.ndim or shape[0] != leaf.shape[0]:
        return None
    return _Layer(GradientEdge(found, 0), shape, leaf.shape[1:], weight, weight._version, how)


_CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
