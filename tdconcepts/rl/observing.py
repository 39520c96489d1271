"""Interventions on what the agent observes: in every step, and in the first observation after a reset."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, import_extra
from tdconcepts.hooks import Edit
from tdconcepts.hooks.programs import EditLike, checked_edit
from tdconcepts.keys import NestedKey, as_key, key_text
from tdconcepts.rl.episodes import check_env

__all__ = ["edit_observation"]


def edit_observation(env: Any, key: NestedKey, edit: EditLike) -> Any:
    r"""An environment whose observation is changed before anybody sees it, the first one after a reset too.

    :math:`o'_t = \mathrm{edit}(o_t)` for t = 0, 1, ... The policy, the critic, the replay buffer and the next
    transforms all get the changed observation, as if the sensor had read it; rewards and the simulator's state are what
    they are. A ``patch`` of the policy's input changes what the policy reads, and leaves the logged observation alone.

    Args:
        env: a torchrl environment; it is wrapped, not changed.
        key: the observation's key.
        edit: ``Ablate([2])``, ``Add(vector)``, ``When(Scale(0.0), Steps(100))``, any callable ``(value, td) -> value``.
            ``td`` holds what the environment wrote in this step.

    Returns:
        A ``TransformedEnv``; it pickles if the edit does.

    Raises:
        BadKey: the environment has no such observation. BadType: for what is no environment, or no edit.
        MissingExtra: torchrl is not installed.

    Examples:
        >>> from tdconcepts import Ablate, rl
        >>> env = rl.edit_observation(rl.cartpole_env(2, seed=0), "observation", Ablate([2]))
        >>> env.rollout(5)["observation"][..., 2].abs().sum()  # no pole angle, at no step
        tensor(0.)
    """
    if not callable(edit) or isinstance(edit, type):
        raise BadType(
            "not an edit", got=repr(edit), needed="Ablate(), Replace(...), or a callable (value, td) -> value"
        )
    envs = import_extra("torchrl.envs", "rl")
    key = as_key(key)
    check_env(env)
    known = list(env.observation_spec.keys(True, True))
    if key not in known:
        raise BadKey(f"the environment has no observation {key_text(key)}", got=f"{known}", needed="one of them")
    return envs.TransformedEnv(env, _transform()(key, edit), auto_unwrap=False)


def __getattr__(name: str) -> Any:  # so that the class is found where a pickle names it
    if name == "EditObservation":
        return _transform()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _transform() -> type:
    """The transform's class, made when torchrl is wanted."""
    base: Any = import_extra("torchrl.envs", "rl").Transform

    class EditObservation(base):
        """What :func:`edit_observation` puts behind an environment."""

        def __init__(self, key: NestedKey, edit: EditLike) -> None:
            super().__init__(in_keys=[key], out_keys=[key])
            self.edit = edit

        def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
            return next_tensordict.set(self.in_keys[0], self._edited(next_tensordict))

        def _reset(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> TensorDictBase:
            new, old = self._edited(tensordict_reset), tensordict_reset.get(self.in_keys[0])
            mask = None if tensordict is None else tensordict.get("_reset", None)
            if mask is not None:  # of the slots; the others hold an observation that was edited when it came
                rows = mask.reshape(tensordict_reset.batch_size)
                new = torch.where(rows.reshape(*rows.shape, *[1] * (new.ndim - rows.ndim)), new, old)
            return tensordict_reset.set(self.in_keys[0], new)

        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            return self._call(tensordict)

        def _edited(self, td: TensorDictBase) -> Tensor:
            value = td.get(self.in_keys[0])
            own = value if isinstance(self.edit, Edit) else value.clone()
            new = self.edit(own, td)
            return checked_edit(own if new is None else new, value, key_text(self.in_keys[0]))

    EditObservation.__qualname__ = "EditObservation"
    return EditObservation
