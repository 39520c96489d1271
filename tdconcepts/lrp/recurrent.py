"""The rules of LSTM, GRU and plain recurrent layers: gates are constants, the signal takes all."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tdconcepts.hooks.flows import backward_by, depends
from tdconcepts.hooks.rules import Call, Rule
from tdconcepts.lrp.passing import constant
from tdconcepts.lrp.stabilizers import Stabilizing, check_stabilizer, stabilized

__all__ = ["GRURule", "LSTMRule", "RNNRule"]


class _Recurrent(Rule):
    """The loop over layers, directions and steps: the module's own outputs, with the graph of the cells' rule."""

    kinds: ClassVar[Any]
    epsilon: Stabilizing

    def carry(self, call: Call) -> Any:
        """The module, or its cell."""
        m: Any = call.module
        if not isinstance(m, self.kinds):
            raise call.cannot(self, f"it is none of {[kind.__name__ for kind in self.kinds]}")
        x, state = (*call.args, *call.kwargs.values(), None)[:2]
        if isinstance(m, self.kinds[1]):
            return self._one_step(call, m, x, state)
        if isinstance(x, PackedSequence):
            raise call.cannot(self, "a packed sequence", "a padded batch")
        if getattr(m, "proj_size", 0):
            raise call.cannot(self, "it projects its state (proj_size)", "EpsilonRule for this module")
        if m.training and m.dropout and m.num_layers > 1:
            raise call.cannot(self, "dropout in training mode", "model.eval()")
        return self._sequence(call, m, x, state)

    def _one_step(self, call: Call, m: Any, x: Tensor, state: Any) -> Any:
        raise NotImplementedError

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], weights: Any, call: Call) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _sequence(self, call: Call, m: Any, x: Tensor, given: Any) -> Any:
        batched, directions = x.ndim == 3, 2 if m.bidirectional else 1
        rows = x if batched else x.unsqueeze(1)
        rows = rows.transpose(0, 1) if m.batch_first and batched else rows
        starts = self._starts(m, rows, given, batched, directions)
        ends = []
        for layer in range(m.num_layers):
            passes = []
            for direction in range(directions):
                number = layer * directions + direction
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                weights = [
                    getattr(m, f"{name}{suffix}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                state: tuple[Tensor, ...] = tuple(part[number] for part in starts)
                outs = []
                for step in reversed(range(len(rows))) if direction else range(len(rows)):
                    state = self._cell(rows[step], state, weights, call)
                    outs.append(state[0])
                passes.append(torch.stack(outs[::-1] if direction else outs))
                ends.append(state)
            rows = torch.cat(passes, -1)
        out, last = rows, [torch.stack(parts) for parts in zip(*ends, strict=True)]
        out = out.transpose(0, 1) if m.batch_first and batched else out
        if not batched:
            out, last = out.squeeze(1), [part.squeeze(1) for part in last]
        values, hidden = call.output
        finals = hidden if isinstance(hidden, tuple) else (hidden,)
        finals = tuple(_replaced(value, graph) for value, graph in zip(finals, last, strict=True))
        return _replaced(values, out), finals if isinstance(hidden, tuple) else finals[0]

    def _starts(self, m: Any, rows: Tensor, given: Any, batched: bool, directions: int) -> tuple[Tensor, ...]:
        count = 2 if isinstance(m, nn.LSTM) else 1
        if given is None:
            zeros = rows.new_zeros(m.num_layers * directions, rows.shape[1], m.hidden_size)
            return (zeros,) * count
        parts = given if isinstance(given, tuple) else (given,)
        return tuple(part if batched else part.unsqueeze(1) for part in parts)

    def _linear(self, call: Call, pairs: Any, *biases: Tensor | None) -> Tensor:
        """``sum of W x + b`` with the epsilon rule: each part in proportion to its contribution."""
        z = sum(F.linear(_in(x, call), w) for x, w in pairs)
        for bias in biases:
            z = z if bias is None else z + bias
        return _over(z, z, self.epsilon, call)  # type: ignore[arg-type]


def _in(x: Tensor, call: Call) -> Tensor:
    """A value that enters a sum: in the relevance convention, what flows into it is multiplied by it."""
    return backward_by(_times, x, [x]) if call.carries_relevance and depends(x) else x


def _times(flow: Tensor, x: Tensor) -> tuple[Tensor]:
    return (flow * x,)


def _over(value: Tensor, z: Tensor, by: Stabilizing, call: Call) -> Tensor:
    """A sum under the epsilon rule: its flow, divided (relevance) or corrected (ratio) by its stabilised value."""
    if not depends(z):
        return value
    relevance = call.carries_relevance

    def formula(flow: Tensor, z: Tensor) -> tuple[Tensor]:
        return (flow / stabilized(z, by) if relevance else flow * (z / stabilized(z, by)),)

    return backward_by(formula, value, [z])


def _signal(value: Tensor, signal: Tensor, call: Call) -> Tensor:
    """``value``, all of whose relevance goes to ``signal``, elementwise."""
    if not depends(signal):
        return value
    if call.carries_relevance:
        return backward_by(lambda flow: (flow,), value, [signal], keep=False)
    return backward_by(
        lambda flow, s, v: (flow * torch.where(s == 0, 0.0, v / torch.where(s == 0, 1.0, s)),), value, [signal], value
    )


def _replaced(value: Tensor, graph: Tensor) -> Tensor:
    return backward_by(lambda flow: (flow,), value, [graph], keep=False)


@dataclasses.dataclass(frozen=True)
class LSTMRule(_Recurrent):
    r"""LSTM, signal-take-all: gates are constants.

    For :math:`c = f c_0 + i g`, :math:`h = o \tanh(c)`, :math:`g = \tanh(a_g)`: :math:`R_c = R_c + R_h`,
    :math:`R_{c_0} = f c_0 R_c \oslash \mathrm{stab}(c)`, :math:`R_{a_g} = i g R_c \oslash \mathrm{stab}(c)`, and
    :math:`a_g = W x + U h_0 + b` by :class:`~tdconcepts.lrp.EpsilonRule`. For ``nn.LSTM`` (layers, both directions)
    and ``nn.LSTMCell``. In the gradient convention the same, as ratios.

    Args:
        epsilon: a number or a stabiliser.

    Raises:
        BadValue: at the call, for another module, a packed sequence, or dropout in training mode.

    Source: Arras et al., *Explaining and interpreting LSTMs*, 2019 (LRP-all).

    Examples:
        >>> cell, x = nn.LSTMCell(3, 4, bias=False), torch.randn(2, 3, requires_grad=True)
        >>> with LSTMRule(1e-9).on(cell, convention="relevance") as m:
        ...     h, c = m(x)
        ...     relevance = torch.autograd.grad(h, x, h)[0]
        >>> torch.allclose(relevance.sum(), h.sum(), atol=1e-4)
        True
    """

    epsilon: Stabilizing = 1e-6
    kinds: ClassVar[Any] = (nn.LSTM, nn.LSTMCell)

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], weights: Any, call: Call) -> tuple[Tensor, ...]:
        (h0, c0), (w, u, b, d) = state, weights
        gates = F.linear(constant(x), w, b) + F.linear(constant(h0), u, d)
        i, f, _, o = constant(gates).chunk(4, -1)
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        part = lambda t: None if t is None else t.chunk(4)[2]  # noqa: E731
        a = self._linear(call, [(x, part(w)), (h0, part(u))], part(b), part(d))
        g = _signal(torch.tanh(a), a, call)
        c = f * _in(c0, call) + i * _in(g, call)
        c = _over(c, c, self.epsilon, call)
        return _signal(o * torch.tanh(c), c, call), c

    def _one_step(self, call: Call, m: Any, x: Tensor, state: Any) -> Any:
        zeros = x.new_zeros(*x.shape[:-1], m.hidden_size)
        found = self._cell(x, state or (zeros, zeros), (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh), call)
        return tuple(_replaced(value, graph) for value, graph in zip(call.output, found, strict=True))


@dataclasses.dataclass(frozen=True)
class GRURule(_Recurrent):
    r"""GRU, signal-take-all: gates are constants.

    For :math:`h = (1-u) n + u h_0`, :math:`n = \tanh(a_n)`, :math:`a_n = W x + b + r (U h_0 + d)`:
    :math:`R_{a_n} = (1-u) n R \oslash \mathrm{stab}(h)`, :math:`R_{h_0} = u h_0 R \oslash \mathrm{stab}(h)`, and
    :math:`a_n` by :class:`~tdconcepts.lrp.EpsilonRule`. For ``nn.GRU`` and ``nn.GRUCell``.

    Args:
        epsilon: a number or a stabiliser.

    Raises:
        BadValue: at the call, for another module, a packed sequence, or dropout in training mode.

    Source: Arras et al., *Explaining and interpreting LSTMs*, 2019 (LRP-all), carried over to the GRU.

    Examples:
        >>> cell, x = nn.GRUCell(3, 4, bias=False), torch.randn(2, 3, requires_grad=True)
        >>> with GRURule(1e-9).on(cell, convention="relevance") as m:
        ...     h = m(x)
        ...     relevance = torch.autograd.grad(h, x, h)[0]
        >>> torch.allclose(relevance.sum(), h.sum(), atol=1e-4)
        True
    """

    epsilon: Stabilizing = 1e-6
    kinds: ClassVar[Any] = (nn.GRU, nn.GRUCell)

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], weights: Any, call: Call) -> tuple[Tensor, ...]:
        (h0,), (w, u, b, d) = state, weights
        (wr, wz, wn), (ur, uz, un) = w.chunk(3), u.chunk(3)
        br, bz, bn = (None,) * 3 if b is None else b.chunk(3)
        dr, dz, dn = (None,) * 3 if d is None else d.chunk(3)
        x0, h = constant(x), constant(h0)
        r = constant((F.linear(x0, wr, br) + F.linear(h, ur, dr)).sigmoid())
        z = constant((F.linear(x0, wz, bz) + F.linear(h, uz, dz)).sigmoid())
        total = F.linear(_in(x, call), wn, bn) + r * F.linear(_in(h0, call), un, dn)
        a = _over(total, total, self.epsilon, call)
        n = _signal(torch.tanh(a), a, call)
        new = (1 - z) * _in(n, call) + z * _in(h0, call)
        return (_over(new, new, self.epsilon, call),)

    def _one_step(self, call: Call, m: Any, x: Tensor, state: Any) -> Any:
        start = x.new_zeros(*x.shape[:-1], m.hidden_size) if state is None else state
        (found,) = self._cell(x, (start,), (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh), call)
        return _replaced(call.output, found)


@dataclasses.dataclass(frozen=True)
class RNNRule(_Recurrent):
    r"""A plain recurrent layer, :math:`h = f(a)` with :math:`a = W x + b + U h_0 + d`, without gates.

    :math:`R_a = R_h`, and :math:`a` by :class:`~tdconcepts.lrp.EpsilonRule`. For ``nn.RNN`` and ``nn.RNNCell``.

    Args:
        epsilon: a number or a stabiliser.

    Raises:
        BadValue: at the call, for another module, a packed sequence, or dropout in training mode.

    Source: Arras et al., *Explaining recurrent neural network predictions in sentiment analysis*, 2017.

    Examples:
        >>> cell, x = nn.RNNCell(3, 4, bias=False), torch.randn(2, 3, requires_grad=True)
        >>> with RNNRule(1e-9).on(cell, convention="relevance") as m:
        ...     h = m(x)
        ...     relevance = torch.autograd.grad(h, x, h)[0]
        >>> torch.allclose(relevance.sum(), h.sum(), atol=1e-4)
        True
    """

    epsilon: Stabilizing = 1e-6
    kinds: ClassVar[Any] = (nn.RNN, nn.RNNCell)

    def __post_init__(self) -> None:
        check_stabilizer(self.epsilon)

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], weights: Any, call: Call) -> tuple[Tensor, ...]:
        (h0,), (w, u, b, d) = state, weights
        a = self._linear(call, [(x, w), (h0, u)], b, d)
        relu = getattr(call.module, "nonlinearity", "tanh") == "relu"
        return (_signal(torch.relu(a) if relu else torch.tanh(a), a, call),)

    def _one_step(self, call: Call, m: Any, x: Tensor, state: Any) -> Any:
        start = x.new_zeros(*x.shape[:-1], m.hidden_size) if state is None else state
        (found,) = self._cell(x, (start,), (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh), call)
        return _replaced(call.output, found)
