"""Which transitions of the training made the agent what it is: TracIn over a replay buffer."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue, nearest
from tdconcepts.hooks import Target, check_module, check_td, dispatch_rows
from tdconcepts.hooks.batching import check_chunk_size, slices
from tdconcepts.keys import NestedKey, as_key, key_text
from tdconcepts.rl.targets import log_prob

__all__ = ["PolicyGradient", "SquaredError", "TracIn"]

_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class SquaredError:
    r"""The loss of a value network in a transition: :math:`(V(s) - y)^2`.

    Args:
        of: what the network writes, ``[*B, 1]`` or ``[*B]``.
        label: the entry with what it was trained towards (the return, a TD target), of the same shape.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict(state_value=torch.tensor([[3.0]]), value_target=torch.tensor([[1.0]]), batch_size=[1])
        >>> SquaredError()(td)
        tensor([4.])
    """

    of: NestedKey = "state_value"
    label: NestedKey = "value_target"

    @property
    def in_keys(self) -> list[NestedKey]:
        return [as_key(self.label)]

    def __call__(self, td: TensorDictBase) -> Tensor:
        value, label = td.get(self.of), td.get(self.label)
        if value.shape != label.shape:
            needed = f"{list(value.shape)}, as {key_text(self.of)}"
            raise BadValue(f"the label {key_text(self.label)}", got=f"shape {list(label.shape)}", needed=needed)
        return (
            (value - label).square().flatten(td.batch_dims).sum(-1)
            if value.ndim > td.batch_dims
            else (value - label).square()
        )


class PolicyGradient:
    r"""The loss of a policy in a transition: :math:`-\log \pi(a|s)\, \hat A`.

    Args:
        policy: as for :func:`~tdconcepts.rl.log_prob`.
        advantage: the entry with the advantage of the logged action, ``[*B, 1]`` or ``[*B]``.
        action: the logged action.

    Examples:
        >>> from tdconcepts.rl import cartpole_policy
        >>> PolicyGradient(cartpole_policy()).in_keys
        ['action', 'advantage']
    """

    def __init__(
        self, policy: TensorDictModuleBase, advantage: NestedKey = "advantage", action: NestedKey = "action"
    ) -> None:
        self.target, self.advantage = log_prob(policy, action), as_key(advantage)

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*self.target.in_keys, self.advantage]

    def __call__(self, td: TensorDictBase) -> Tensor:
        found, _ = self.target.read(td.get(self.target.of), td, td.batch_dims)
        return -found * td.get(self.advantage).reshape(found.shape)


class TracIn(TensorDictModuleBase):
    r"""How much a training step on each transition moved a quantity of the agent.

    .. math::
        I(z) = \sum_t \eta_t\, \nabla_\theta y(s; \theta_t) \cdot \nabla_\theta \ell(z; \theta_t)

    Positive: descending on the transition's loss made y *smaller* (for y a loss of a test state, the transition
    helped); negative: larger. The sum runs over checkpoints of the training.

    | reads | writes |
    |---|---|
    | what the module and the loss read, ``[*B, ...]`` | ``"influence"`` ``[*B, K]``: on each of the K test states |

    No gradient of a single transition is ever stored: for each test state the losses of all transitions are
    differentiated *along* its gradient, by a backward through the backward, which gives the same numbers. A replay
    buffer is explained by ``TracIn(...)(buffer[:])``, or, batch by batch, as its transform.

    Args:
        module: the network.
        loss: ``td -> [*B]``: each row's loss from what the module wrote and the entries in its ``in_keys``
            (:class:`SquaredError`, :class:`PolicyGradient`).
        target: y, one number a row: :func:`~tdconcepts.rl.state_value`, :func:`~tdconcepts.rl.log_prob`, ...
        tests: the test states, a TensorDict ``[K]`` with what the module and the target read.
        checkpoints: ``(state_dict, learning rate)`` pairs; default: the module as it is, with rate 1.
        parameters: globs of the parameters that count (``["*.2.*"]``: one layer, faster and often as good); default:
            all that require grad.
        chunk_size: transitions in flight; default 4096.

    Raises:
        BadKey: an entry or a parameter that is not there. BadValue: a loss or target that is not one number a row.

    Source: Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent", equation 1; for
    agents Hu et al. 2025, "A snapshot of influence: a local data attribution framework for online reinforcement
    learning".

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(torch.nn.Linear(1, 1, bias=False), ["observation"], ["state_value"])
        >>> state = {"module.weight": torch.ones(1, 1)}
        >>> tests = TensorDict(observation=torch.tensor([[3.0]]), batch_size=[1])
        >>> trace = TracIn(critic, SquaredError(), Target("state_value"), tests, checkpoints=[(state, 0.1)])
        >>> td = TensorDict(observation=torch.tensor([[2.0]]), value_target=torch.tensor([[1.0]]), batch_size=[1])
        >>> trace(td)["influence"]  # 0.1 * 3 * 2 (2 - 1) 2
        tensor([[1.2000]])
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        loss: Callable[[TensorDictBase], Tensor],
        target: Target,
        tests: TensorDictBase,
        checkpoints: Sequence[tuple[Mapping[str, Tensor], float]] | None = None,
        parameters: Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.module, self.loss, self.target = check_module(module), loss, target
        if not isinstance(target, Target) or not callable(loss):
            raise BadType("a loss and a target", got=f"{loss!r}, {target!r}", needed="td -> [*B], and a Target")
        target.check_goals(module.out_keys)
        if tests.batch_dims != 1 or not len(tests):
            got = f"batch_size {list(tests.batch_size)}"
            raise BadValue("no test states", got=got, needed="[K], K >= 1", fix="tests.reshape(-1)")
        for key in (*module.in_keys, *target.in_keys):
            if tests.get(key, None) is None:
                have = list(tests.keys(True, True))
                raise BadKey(f"no entry {key_text(key)} in the test states", got=f"{have}", needed=nearest(key, have))
        known = dict(module.named_parameters())
        chosen = [name for name, p in known.items() if p.requires_grad]
        if parameters is not None:
            chosen = [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in parameters)]
        if not chosen:
            raise BadKey("no parameters count", got=f"parameters={parameters}", needed=f"some of {list(known)[:8]}")
        self._chosen, self._tests = chosen, tests.copy()
        self._checkpoints = None if checkpoints is None else [_checked(known, *pair) for pair in checkpoints]
        self._rows = check_chunk_size(chunk_size) or _ROWS
        given = [as_key(key) for key in getattr(loss, "in_keys", [])]
        self.in_keys: list[Any] = list(dict.fromkeys([*module.in_keys, *given]))
        self._given: list[Any] = given
        self.out_keys: list[Any] = ["influence"]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Trace every row of ``tensordict``."""
        check_td(tensordict)
        for key in self.in_keys:
            if tensordict.get(key, None) is None:
                have = list(tensordict.keys(True, True))
                raise BadKey(f"no entry {key_text(key)} in the TensorDict", got=f"{have}", needed=nearest(key, have))
        own = {name: p.detach() for name, p in self.module.named_parameters()}
        runs = [({}, 1.0)] if self._checkpoints is None else self._checkpoints
        total: Tensor | None = None
        with set_interaction_type(InteractionType.DETERMINISTIC), torch.enable_grad():
            for state, rate in runs:
                weights = {name: state.get(name, value).to(value) for name, value in own.items()}
                found = rate * self._at(weights, tensordict)
                total = found if total is None else total + found
        assert total is not None
        return tensordict.set("influence", total.detach())

    def _at(self, weights: dict[str, Tensor], td: TensorDictBase) -> Tensor:
        """The dot products of gradients at one checkpoint, ``[*B, K]``."""
        chosen = {name: weights.pop(name) for name in self._chosen}

        def wrote(some: dict[str, Tensor], rows: TensorDictBase, given: list[NestedKey]) -> TensorDictBase:
            inputs = rows.select(*self.module.in_keys, strict=False).detach()
            out = torch.func.functional_call(self.module, {**weights, **some}, (inputs,))
            for key in given:  # what was logged, also where the module has written it anew
                out.set(key, rows.get(key).detach() if rows.get(key).is_floating_point() else rows.get(key))
            return out

        def explained(some: dict[str, Tensor]) -> Tensor:
            out = wrote(some, self._tests, self.target.in_keys)
            found, several = self.target.read(out.get(self.target.of), out, 1)
            if several:
                raise BadValue("several targets", got=repr(self.target), needed="one number a row")
            return found

        values, pull = torch.func.vjp(explained, chosen)  # type: ignore[misc]
        directions = [pull(one)[0] for one in torch.eye(len(values), dtype=values.dtype, device=values.device)]
        parts = []
        for _, rows in slices(td, self._rows):

            def losses(some: dict[str, Tensor], rows: TensorDictBase = rows) -> Tensor:
                found = self.loss(wrote(some, rows, self._given))
                if found.shape != rows.batch_size:
                    got, needed = f"shape {list(found.shape)}", f"{list(rows.batch_size)}: one number a row"
                    raise BadValue("the loss does not fit", got=got, needed=needed)
                return found

            # back is linear in its weights: what is pulled back through it is a directional derivative of each loss
            weighted, back = torch.func.vjp(losses, chosen)  # type: ignore[misc]
            _, along = torch.func.vjp(lambda u, back=back: back(u)[0], torch.ones_like(weighted))  # type: ignore[misc]
            parts.append(torch.stack([along(way)[0].detach() for way in directions], -1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _checked(known: Mapping[str, Any], state: Mapping[str, Tensor], rate: float) -> tuple[dict[str, Tensor], float]:
    missing = [name for name in known if name not in state]
    if missing:
        raise BadKey("a checkpoint lacks parameters", got=f"without {missing[:4]}", needed="the module's state_dict()")
    return {name: state[name].detach().clone() for name in known}, float(rate)
