"""Rules at nodes: what flows is changed where a finished graph holds a function, so that no call is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from tdconcepts.hooks.jacobian import vector_jacobian

__all__ = ["AtNodes"]


class _Unsure:
    """Stands for the rule of a node of which nobody knows what it is of; a class is itself in every copy."""


class AtNodes:
    """Pulls back under rules that are hung on the nodes of a graph after the forward, and taken down again.

    Where all rules are ``on_nodes`` this gives what rules at calls give, and a model runs as it does without rules.

    Args:
        operations: names of functions with their rules.
        unknown: as of :class:`~tdconcepts.hooks.rules.Rules`.

    Examples:
        >>> import torch
        >>> from tdconcepts.hooks.rectifiers import DeconvNetRule
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = x.relu()
        >>> AtNodes({"relu": DeconvNetRule()}, None).pull([y], y.sum(), [x], False, False, None, "y")
        [tensor([1., 1.])]
    """

    def __init__(self, operations: Any, unknown: Any) -> None:
        self.operations, self.unknown = operations, unknown
        self._found: dict[str, Any] = {}

    @classmethod
    def of(cls, rules: Any) -> AtNodes | None:
        """The same for a program of rules, if it needs nothing else."""
        if not getattr(rules, "on_nodes", False) or not _NODES.issuperset(rules.operations):
            return None
        return cls(rules.operations, rules.unknown)

    def pull(self, made: Iterable[Any], values: Tensor, *how: Any) -> list[Tensor | None] | None:
        """As :func:`~tdconcepts.hooks.jacobian.vector_jacobian`; None where a call has to tell what a node is of.

        Args:
            made: what the model has made: no rule is for what a target makes of it.
            values, how: as of ``vector_jacobian``.
        """
        hung: list[tuple[Any, Node]] = []
        for node in _above(made):
            rule = self._rule(type(node).__name__)
            if rule is None:
                continue
            if rule is _Unsure:
                return None
            hung.append((rule, node))
        handles = []
        try:
            for rule, node in hung:
                handles.append(rule.hang(node))
            return vector_jacobian(values, *how)
        finally:
            for handle in handles:
                handle.remove()

    def _rule(self, kind: str) -> Any:
        """The rule for nodes of a kind, None for none, or that nobody knows."""
        if kind not in self._found:
            names = _names(kind)
            found = next((self.operations[name] for name in names if name in self.operations), None)
            unknown = self.unknown is not None and not all(map(self.unknown.knows, names))
            self._found[kind] = _Unsure if kind in _HIDE or (found is None and unknown) else found
        return self._found[kind]


_NODES = frozenset({"relu"})  # functions that have nodes of their own, of one kind
_OTHERS = {"prelu_kernel": ("prelu",), "rrelu_with_noise": ("rrelu",), "elu": ("elu", "selu")}
_OTHERS |= {"hardtanh": ("hardtanh", "relu6")}
_HIDE = frozenset({"CopySlices"})  # what wrote over a view


def _names(kind: str) -> tuple[str, ...]:
    """The operations that may have made a node of this kind: ``"LeakyReluBackward0"`` is of ``"leaky_relu"``."""
    plain = re.sub(r"Backward\d*$", "", kind)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plain).lower()
    return _OTHERS.get(name, (name,))


def _above(made: Iterable[Any]) -> list[Node]:
    """The nodes of some tensors, and all that lie before them in the forward."""
    found: dict[Node, None] = {}
    waiting = [value.grad_fn for value in made if isinstance(value, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [below for below, _ in node.next_functions]
    return list(found)
