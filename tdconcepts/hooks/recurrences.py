"""Recurrent layers of torch written out in simple operations, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdconcepts.errors import BadValue

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell"]

State = tuple[Tensor, ...]
Step = Callable[..., State]


def lstm_cell(
    x: Tensor, state: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> tuple[Tensor, Tensor]:
    """``lstm_cell``: the next ``h`` and ``c``."""
    h, c = state
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    """``gru_cell``: the next ``h``."""
    (r, z, n), (hr, hz, hn) = (F.linear(value, w, b).chunk(3, -1) for value, w, b in ((x, w_ih, b_ih), (h, w_hh, b_hh)))
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return n + z * (h - n)


def lstm(x: Tensor, state: Any, weights: Any, *how: Any) -> tuple[Tensor, ...]:
    """``lstm``: all outputs, and the last ``h`` and ``c`` of each layer."""
    return _layers("lstm", lstm_cell, x, (state,) if isinstance(state, Tensor) else state, weights, *how)


def gru(x: Tensor, state: Any, weights: Any, *how: Any) -> tuple[Tensor, ...]:
    """``gru``: all outputs, and the last ``h`` of each layer."""

    def step(x: Tensor, state: State, *weights: Tensor) -> State:
        return (gru_cell(x, state[0], *weights),)

    return _layers("gru", step, x, (state,) if isinstance(state, Tensor) else state, weights, *how)


def _layers(
    name: str,
    step: Step,
    x: Tensor,
    state: Any,
    weights: Any,
    has_bias: Any,
    n_layers: int,
    dropout: float = 0.0,
    training: bool = False,
    both_ways: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    if not state[0].is_floating_point():
        raise BadValue(f"{name!r} of a packed sequence can't be followed", needed="a padded sequence")
    ways, each = 1 + both_ways, 4 if has_bias else 2
    if len(weights) != n_layers * ways * each:
        raise BadValue(f"{name!r} with a projection can't be followed", got="proj_size", needed="proj_size=0")
    if dropout and training and n_layers > 1:
        raise BadValue(f"{name!r} drops at random", got=f"p={dropout}", needed="evaluation mode", fix="model.eval()")
    steps = list((x.transpose(0, 1) if batch_first else x).unbind(0))
    last: list[State] = []
    for layer in range(n_layers):
        found: list[list[Tensor]] = []
        for way in range(ways):
            at = layer * ways + way
            now: State = tuple(part[at] for part in state)
            written: list[Tensor] = []
            for value in reversed(steps) if way else steps:
                now = step(value, now, *weights[at * each : (at + 1) * each])
                written.append(now[0])
            found.append(written[::-1] if way else written)
            last.append(now)
        steps = [torch.cat(parts, -1) for parts in zip(*found, strict=True)] if both_ways else found[0]
    out = torch.stack(steps, 1 if batch_first else 0)
    return out, *(torch.stack(parts) for parts in zip(*last, strict=True))
