"""A bare module under a program: called as the module is, with tensors."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tdconcepts.hooks.contexts import enter, leave, run_under
from tdconcepts.hooks.plans import Plan, Run

__all__ = ["Wrapped"]


class Wrapped(nn.Module):
    """``module`` under a program: a context manager, called as ``module`` is.

    Inside ``with``, direct calls of the original on this thread obey the program too; outside, a call of this module
    enters for its own time. For a module without keys; a TensorDictModule has :class:`~tdconcepts.hooks.Hooked`.

    Examples:
        >>> import torch
        >>> from tdconcepts.lrp import PassRule
        >>> relu = nn.ReLU()
        >>> with PassRule().on(relu, convention="relevance") as m:
        ...     x = torch.tensor([-1.0, 2.0], requires_grad=True)
        ...     torch.autograd.grad(m(x).sum(), x)[0]
        tensor([1., 1.])
    """

    def __init__(self, module: nn.Module, program: Any) -> None:
        super().__init__()
        self.module, self.program = module, program
        steps = tuple(step for bound in program.bind(module) for step in bound.steps)
        self._plan = Plan(module, steps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module once under the program."""
        return run_under(Run(self._plan, owner=self), functools.partial(self.module, *args, **kwargs))

    def __enter__(self) -> Wrapped:
        enter(Run(self._plan, owner=self, standing=True))
        return self

    def __exit__(self, *exc: object) -> None:
        leave(self)
