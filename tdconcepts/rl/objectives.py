"""Concept-bottleneck policies in torchrl's losses: the labels of the concepts, beside the reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, set_skip_existing
from torch import Tensor

from tdconcepts.concepts import ConceptLoss, ConceptSpec
from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import check_module, check_td, cut
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["ConceptObjective"]

LABELS = "labels"


class ConceptObjective(TensorDictModuleBase):
    r"""A loss of torchrl's with the loss of the policy's concepts: :math:`L = L_\mathrm{RL} + w\, \mathrm{CE}(c, y)`.

    ======  =======================================  ========================================================
    reads   what the loss and the policy read        a minibatch ``[*B]``, as the loss has it
    reads   the labels                               ``[*B, K]`` numbers, NaN where one is not known
    writes  what the loss writes                     ``[]`` each
    writes  ``"loss_concept"``                       ``[]``: w times the mean cross-entropy of the concepts
    ======  =======================================  ========================================================

    It takes the loss's place in a training loop that adds up ``loss_*``: PPO's, DQN's, SAC's, any ``LossModule``'s.
    The policy must be the one that was given to the loss, so that both train the same parameters.

    Args:
        loss: a torchrl ``LossModule``, or any module that writes losses.
        policy: the policy (or Q-network) with a stage that writes the concepts' logits.
        concepts: what the columns mean.
        labels: the entry of the labels (the environment's info, say), or a callable of the minibatch that gives them.
        weight: w, 1 by default.
        key: the entry of the concepts' logits, ``"concepts_logits"`` by default.

    Raises:
        BadKey: no stage of the policy writes ``key``; at the call, without labels. BadType: for what is no label.
        BadValue: a negative weight; labels of another shape.

    Source: Koh et al. 2020, "Concept bottleneck models", joint training; Zabounidis et al. 2023 for policies.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import QValueModule
        >>> from torchrl.objectives import DQNLoss
        >>> from tdconcepts.concepts import ConceptActivation
        >>> from tdconcepts.rl import CARTPOLE_CONCEPTS, cartpole_concepts, cartpole_env
        >>> policy = TensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(4, 4), ["observation"], ["concepts_logits"]),
        ...     ConceptActivation(CARTPOLE_CONCEPTS, "concepts_logits", "concepts"),
        ...     TensorDictModule(torch.nn.Linear(4, 2), ["concepts"], ["action_value"]),
        ...     QValueModule(action_space="categorical"),
        ... )
        >>> loss = DQNLoss(policy, action_space="categorical", delay_value=False)
        >>> objective = ConceptObjective(loss, policy, CARTPOLE_CONCEPTS, cartpole_concepts)
        >>> steps = cartpole_env(2, seed=0).rollout(3, policy).reshape(-1)
        >>> sorted(name for name in objective(steps).keys() if name.startswith("loss"))
        ['loss', 'loss_concept']
    """

    def __init__(
        self,
        loss: Any,
        policy: TensorDictModuleBase,
        concepts: ConceptSpec,
        labels: NestedKey | Callable[[TensorDictBase], Tensor],
        *,
        weight: float = 1.0,
        key: NestedKey = "concepts_logits",
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise BadValue("a negative weight", got=weight, needed="0 or more")
        if not isinstance(labels, (str, tuple)) and not callable(labels):
            raise BadType("not labels", got=repr(labels), needed="a key, or a callable of the minibatch")
        self.loss, self.weight = loss, float(weight)
        self.labels: Any = as_key(labels) if isinstance(labels, (str, tuple)) else labels
        key = as_key(key)
        before, _ = cut(check_module(policy, "policy"), key)
        self.__dict__["_before"] = TensorDictSequential(*before)  # not registered: the loss has its parameters
        self.terms = ConceptLoss(concepts, {key: LABELS}, "concept")
        own = [self.labels] if isinstance(self.labels, (str, tuple)) else []
        self.in_keys = list(dict.fromkeys([*loss.in_keys, *self._before.in_keys, *own]))
        self.out_keys = [*loss.out_keys, "loss_concept"]

    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss's own losses, and that of the concepts."""
        check_td(tensordict)
        losses = self.loss(tensordict)
        batch = tensordict.batch_size
        run = TensorDict({}, batch_size=batch, device=tensordict.device)
        for name in self._before.in_keys:
            run.set(name, tensordict.get(name))
        labels = self.labels(tensordict) if callable(self.labels) else tensordict.get(self.labels)
        if labels is None:
            raise BadKey(f"no entry {key_text(self.labels)} with labels", got=f"entries {list(tensordict.keys())}")
        out = self.terms(self._before(run).set(LABELS, labels))
        return losses.set("loss_concept", self.weight * out.get(("loss", "concept")).mean())
