"""What a step does at a place that is read: record the value and where its gradient can be taken; what comes of it."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.plans import Run

__all__ = ["Pulled", "Read", "Record", "Seen", "Watch", "settle"]


class Seen(NamedTuple):
    """A value that was recorded, its version at that time (None for a copy), and what autograd takes as an input.

    ``mapped``: the dim of the value that a ``vmap`` inside the model maps over.
    """

    value: Tensor
    version: int | None = None
    handle: Any = None
    mapped: int | None = None


class Pulled(NamedTuple):
    """What one pull-back gives.

    Args:
        values: the explained numbers, ``[*B]``, with several targets ``[*B, T]``.
        points: where each gradient was taken, ``[*B, ...]``.
        gradients: one for each *wrt*, ``[*B, ...]``, with several targets ``[*B, T, ...]``.
        outputs: everything that the model wrote.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.hooks import Pullback, Target
        >>> net = TensorDictModule(torch.nn.Linear(4, 2), in_keys=["x"], out_keys=["y"])
        >>> pulled = Pullback(net, Target("y", [0, 1]))(TensorDict(x=torch.zeros(3, 4), batch_size=[3]))
        >>> pulled.values.shape, pulled.gradients[0].shape
        (torch.Size([3, 2]), torch.Size([3, 2, 4]))
    """

    values: Tensor
    points: list[Tensor]
    gradients: list[Tensor]
    outputs: TensorDictBase


class Read:
    """Record a value as it is, for a target: with its graph. In-place operations later don't change what was read."""

    def __init__(self, key: object) -> None:
        self.key = ("target", key)

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        run.store[self.key] = value.clone()
        return value


class _Explained(torch.autograd.Function):
    """A value as it is, with a leaf that is no parameter in its graph: rules leave alone what parameters alone make."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, leaf: Tensor) -> Tensor:
        return value.detach()  # the storage of value: no copy, and free for in-place operations

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, None]:
        return flow, None


_LEAF = torch.empty(0, requires_grad=True)


class Watch:
    """Record where the gradient with respect to a site can be taken, and put a given point in its place.

    Where the caller of a run says ``"unchanged"``, nothing is known to overwrite the value, which is then not copied.

    The graph's *edge* is kept, not the tensor, so an in-place ReLU that follows changes nothing. A value without a
    graph becomes a leaf that requires grad.
    """

    def __init__(self, key: object) -> None:
        self.key = key

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        store, given = run.store, run.store.get("points", {}).get(self.key)
        if given is not None:
            value = given.reshape(value.shape).to(value.dtype)
        if "zeros" in store:
            moved = value + store["zeros"][self.key]
            store[self.key] = Seen(moved.clone())  # an in-place operation may follow
            return moved
        if store.get("shapes"):
            store[self.key] = Seen(value.clone())
            return value
        base = unwrapped(value)
        if base.requires_grad and (given is None or store.get("create_graph")):
            if run.plan.around and base is value:
                base = value = _Explained.apply(value, _LEAF)
            kept = base if store.get("create_graph") else base.detach()
            kept = kept.clone() if store.get("snapshot") or store.get("create_graph") else kept
            version = kept._version if store.get("unchanged") else None
            mapped = None if base is value else torch._C._functorch.maybe_get_bdim(value)
            store[self.key] = Seen(kept, version, get_gradient_edge(base), mapped)
            return value.clone() if base._is_view() else value  # an in-place operation would rebase a view's history
        if base is not value:
            raise BadValue(
                f"the site {self.key} runs inside vmap and has no graph",
                needed="parameters that require grad, or an input that is explained",
            )
        if not (value.is_floating_point() or value.is_complex()):
            needed = "floating point numbers, which have gradients"
            raise BadType(f"no gradient of {self.key}", got=str(value.dtype), needed=needed, fix="name other sites")
        leaf = value.detach().requires_grad_() if not value.is_inference() else value.clone().requires_grad_()
        if store.get("unchanged"):
            store[self.key] = Seen(leaf, leaf._version, leaf)
            return _Explained.apply(leaf, _LEAF)
        store[self.key] = Seen(leaf, handle=leaf)
        return leaf.clone()  # a leaf that requires grad must not be changed in place


class Record:
    """Record a value for a capture: without a copy where its version can be checked at the end."""

    def __init__(self, key: object, keep: int | None, clone: bool, detach: bool) -> None:
        self.key, self.keep, self.clone, self.detach = key, keep, clone, detach

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        copied = self.clone or is_compiling() or value.is_inference()
        kept = _copy(value) if copied else value
        seen = Seen(kept.detach() if self.detach else kept, None if copied else value._version)
        if self.keep is None:
            run.store[self.key] = [*run.store.get(self.key, ()), seen]
        else:
            run.store[self.key] = [*run.store.get(self.key, ())[1 - self.keep :], seen] if self.keep > 1 else [seen]
        return value


def _copy(value: Tensor) -> Tensor:
    """A copy that autograd can use later, also of an inference tensor."""
    with normal_tensors():
        return value.clone()


def normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """Where results are made that autograd can use later, whatever mode the caller is in."""
    inference = not is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else contextlib.nullcontext()


def check_version(seen: Seen, name: str) -> Tensor:
    """The recorded value, if nothing has overwritten it since.

    Raises:
        BadValue: when an in-place operation followed.
    """
    if seen.version is not None and seen.value._version != seen.version:
        raise BadValue(
            f"the value captured at {name!r} was overwritten by an in-place operation after it",
            needed="a copy",
            fix=f"capture(model, {name!r}, clone=True)",
        )
    return seen.value


def unwrapped(value: Tensor) -> Tensor:
    """The real tensor under a batched one of a ``vmap`` inside the model, with the mapped dim where vmap keeps it."""
    functorch = torch._C._functorch
    return functorch.get_unwrapped(value) if not is_compiling() and functorch.is_batchedtensor(value) else value


def settle(value: Tensor, batch: torch.Size) -> Tensor:
    """A value that left a ``vmap`` inside the model, with the mapped dim right after the batch dims."""
    functorch = torch._C._functorch
    if is_compiling() or not functorch.is_batchedtensor(value):
        return value
    level, current = functorch.maybe_get_level(value), functorch.maybe_current_level()
    if current is not None and (level is None or level <= current):
        return value  # the caller's own vmap
    mapped = functorch.maybe_get_bdim(value)
    return functorch.get_unwrapped(value).movedim(mapped, len(batch))
