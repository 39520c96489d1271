"""Logic rules over concepts: a memory of rules, which one is chosen, what it says, and how well it was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from tdconcepts.concepts.encoders import mlp, one_pair
from tdconcepts.concepts.spec import ConceptSpec
from tdconcepts.concepts.stage import BlockStage, as_size, as_spec, check_block
from tdconcepts.errors import BadValue
from tdconcepts.hooks.flows import overwritable
from tdconcepts.keys import NestedKey, join

__all__ = ["LogicRules", "RuleLikelihood", "RuleSelector"]

Roles: TypeAlias = Literal["soft", "argmax"]
_FACTORS = 2**18  # at once: what caches hold


class RuleSelector(BlockStage):
    r"""Which rule is meant for this row: :math:`p(m \mid z) = \mathrm{softmax}_m\, \mathrm{MLP}(z)` for each task.

    =======  ===============  ====================
    reads    ``"latent"``     ``[*B, in_features]``
    writes   ``"selection"``  ``[*B, T, M]``
    =======  ===============  ====================

    Args:
        in_features: width of the latent.
        memory_size: number of rules for each task, M.
        tasks: number of tasks, T.
        hidden: widths of the hidden layers.
        keys: the entry to read and the entry to write.

    Raises:
        BadValue: for a size below 1, or a latent of another width.

    Source: Debot et al., Interpretable Concept-Based Memory Reasoning, NeurIPS 2024, section 3.

    Examples:
        >>> selection = RuleSelector(8, 3, 2)(latent=torch.zeros(5, 8))
        >>> selection.shape, torch.allclose(selection.sum(-1), torch.ones(5, 2))
        (torch.Size([5, 2, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        memory_size: int,
        tasks: int,
        hidden: Sequence[int] = (),
        keys: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        as_size(memory_size=memory_size, tasks=tasks)
        in_key, out_key = one_pair(keys or {"latent": "selection"})
        super().__init__([in_key], [out_key])
        self.in_features, self._shape = in_features, (tasks, memory_size)
        self.layers = mlp(in_features, hidden, tasks * memory_size)

    def compute(self, *entries: Tensor) -> Tensor:
        latent = check_block(entries[0], (self.in_features,), self._read[0])
        scores = self.layers(latent).unflatten(-1, self._shape)
        powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()  # for a few rules four times a softmax's speed
        return powers / powers.sum(-1, keepdim=True)


class LogicRules(BlockStage):
    r"""A memory of M conjunctions for each of T tasks; each is decoded to a role for every concept and evaluated.

    In rule m of task t the concept c is *positive*, *negative* or *irrelevant* with the probabilities
    :math:`w_{tmc} \in \Delta^3`, the softmax of a decoder of the rule's embedding. The rule holds with

    :math:`y_{tm} = \prod_c (w^{irr}_{tmc} + c\, w^{pos}_{tmc} + (1 - c)\, w^{neg}_{tmc}),\quad
    p_t = \sum_m p(m)\, y_{tm}`,

    which is exact for independent concepts and roles: a rule of certain roles whose concepts are certain holds with 1,
    whatever their number. ``"argmax"`` takes each concept's most probable role, with the gradient of the soft ones.

    =======  =================  ================
    reads    ``"concepts"``     ``[*B, C]``, probabilities
    reads    ``"selection"``    ``[*B, T, M]``
    writes   ``"rules"``        ``[*B, T, M]``
    writes   ``"probs"``        ``[*B, T]``
    =======  =================  ================

    Args:
        concepts: what the columns mean; none of them continuous.
        tasks: number of tasks, T.
        memory_size: number of rules for each task, M.
        rule_size: width of a rule's embedding.
        roles: ``"soft"`` (default) or ``"argmax"``; or a pair, the one in training and the one at evaluation.
        keys: the entries, by the names above.

    Raises:
        BadValue: for a size below 1, continuous concepts, another kind of roles, or entries of another shape.

    Source: Debot et al., Interpretable Concept-Based Memory Reasoning, NeurIPS 2024, section 3.

    Examples:
        >>> rules = LogicRules(["wing", "beak"], tasks=1, memory_size=2)
        >>> truth, probs = rules(concepts=torch.ones(5, 2), selection=torch.full((5, 1, 2), 0.5))
        >>> truth.shape, probs.shape, len(rules.text()[0])
        (torch.Size([5, 1, 2]), torch.Size([5, 1]), 2)
    """

    def __init__(
        self,
        concepts: ConceptSpec | Sequence[str],
        tasks: int,
        memory_size: int,
        rule_size: int = 32,
        roles: Roles | tuple[Roles, Roles] = "soft",
        keys: Mapping[str, NestedKey] | None = None,
    ) -> None:
        as_size(tasks=tasks, memory_size=memory_size, rule_size=rule_size)
        self_concepts = as_spec(concepts)
        if any(run.kind == "continuous" for run in self_concepts.runs):
            raise BadValue("a rule is about true and false", got="continuous concepts", needed="binary or categorical")
        names: dict[str, NestedKey] = {n: n for n in ("concepts", "selection", "rules", "probs")}
        if set(keys or {}) - set(names):
            raise BadValue("not the entries of this stage", got=repr(keys), needed=f"keys for {list(names)}")
        names |= keys or {}
        super().__init__([names["concepts"], names["selection"]], [names["rules"], names["probs"]])
        self.concepts, self.tasks, self.memory_size = self_concepts, tasks, memory_size
        self.set_roles(roles)
        self.memory = nn.Parameter(torch.randn(tasks, memory_size, rule_size))
        self.decoder = mlp(rule_size, [rule_size], 3 * self.concepts.size)

    def set_roles(self, roles: Roles | tuple[Roles, Roles]) -> None:
        """Change which roles are used, as the constructor's ``roles``."""
        pair = roles if isinstance(roles, tuple) else (roles, roles)
        if len(pair) != 2 or not set(pair) <= {"soft", "argmax"}:
            raise BadValue("not a kind of roles", got=repr(roles), needed='"soft", "argmax", or a pair of these')
        self._pair = pair

    def roles(self, kind: Roles | None = None) -> Tensor:
        """The probabilities of the roles positive, negative, irrelevant: ``[T, M, C, 3]``."""
        kind = kind or self._pair[0 if self.training else 1]
        soft = self._decoded().softmax(-2)
        if kind == "argmax":
            positive, negative = _certain(soft)
            certain = torch.stack((positive, negative, 1 - positive - negative), -2)
            soft = certain + (soft - soft.detach())
        return soft.mT

    def text(self) -> list[list[str]]:
        """What each rule says, ``[T][M]``, by the most probable roles: ``"wing & ~beak"``, or ``"true"``."""
        names = [
            name if n == 1 else f"{name} = {state}"
            for name, n in zip(self.concepts.names, self.concepts.cardinalities, strict=True)
            for state in range(n)
        ]
        signs = {0: "", 1: "~"}
        best = self.roles("soft").argmax(-1).tolist()
        terms = [[[signs[r] + n for n, r in zip(names, row, strict=True) if r < 2] for row in task] for task in best]
        return [[" & ".join(row) or "true" for row in task] for task in terms]

    def _decoded(self) -> Tensor:
        """The logits of the roles, ``[T, M, 3, C]``."""
        return self.decoder(self.memory).unflatten(-1, (3, self.concepts.size))

    def compute(self, *entries: Tensor) -> tuple[Tensor, ...]:
        block = check_block(entries[0], (self.concepts.size,), self._read[0])
        selection = check_block(entries[1], (self.tasks, self.memory_size), self._read[1])
        if block.shape[:-1] != selection.shape[:-2]:
            got = f"{list(block.shape)} and {list(selection.shape)}"
            raise BadValue("concepts and selection of different batches", got=got, needed="[*B, C] and [*B, T, M]")
        kind = self._pair[0 if self.training else 1]
        if kind == "argmax" and not torch.is_grad_enabled():
            truth = _by_logarithms(block, *(role.flatten(0, 1) for role in _certain(self._decoded())))
        else:
            positive, negative, irrelevant = self.roles(kind).flatten(0, 1).unbind(-1)
            truth = _by_products(block, irrelevant + negative, irrelevant + positive)
        truth = truth.unflatten(-1, (self.tasks, self.memory_size))
        return truth, (selection * truth).sum(-1)


class RuleLikelihood(BlockStage):
    r"""How unlikely the labels are under the rules: the loss that a memory reasoner is trained with.

    :math:`\ell = -\sum_t \log \sum_m p(m)\, p(y_t \mid m, c)\, \rho_{tm}^{\beta y_t}` with the true concepts c. The
    *reconstruction* :math:`\rho_{tm} = \prod_c r_c^{c} (1 - r_c)^{1 - c},\ r_c = w^{pos} + w^{irr} / 2`, makes a rule
    that explains a row a prototype of it: without it all rules could be "true". A missing concept (NaN) takes no part,
    nor does a missing task. Sums of logarithms are matrix products: memory does not grow with rows x rules x concepts.

    =======  ===================  ======================================
    reads    ``"selection"``      ``[*B, T, M]``
    reads    ``"labels"``         ``[*B, K]`` or ``[*B, C]``
    reads    ``"task"``           ``[*B, T]`` (``[*B]`` for one), 0 or 1
    writes   ``("loss", name)``   ``[*B]``
    =======  ===================  ======================================

    Args:
        rules: the rules, whose parameters are shared.
        keys: the entries of selection, labels and task, in this order.
        reconstruction: :math:`\beta`, 0 leaves it out.
        name: what the loss is called.

    Raises:
        BadValue: for other than three keys, a negative weight, and entries of another shape.

    Source: Debot et al., Interpretable Concept-Based Memory Reasoning, NeurIPS 2024, eq. 5 and 6.

    Examples:
        >>> rules = LogicRules(["wing", "beak"], tasks=1, memory_size=2)
        >>> loss = RuleLikelihood(rules)
        >>> loss(torch.full((1, 2), 0.5), torch.tensor([1.0, 0.0]), torch.tensor([1.0])).ndim
        0
    """

    def __init__(
        self,
        rules: LogicRules,
        keys: Sequence[NestedKey] = ("selection", "labels", "task"),
        reconstruction: float = 1.0,
        name: str = "rules",
    ) -> None:
        if len(keys) != 3:
            raise BadValue("a likelihood of three entries", got=repr(keys), needed="selection, labels, task")
        if not reconstruction >= 0:
            raise BadValue("not a weight", got=repr(reconstruction), needed="a number of 0 or more")
        super().__init__(keys, [join("loss", name)])
        self.rules, self.reconstruction = rules, float(reconstruction)

    def compute(self, *entries: Tensor) -> Tensor:
        rules = self.rules
        selection = check_block(entries[0], (rules.tasks, rules.memory_size), self._read[0])
        batch = selection.shape[:-2]
        labels = rules.concepts.targets(entries[1], selection.new_empty((*batch, rules.concepts.size)))
        task = ConceptSpec(rules.tasks).targets(entries[2], selection.new_empty((*batch, rules.tasks)))
        positive, negative, irrelevant = rules.roles("soft").flatten(0, 1).unbind(-1)
        tiny = torch.finfo(selection.dtype).tiny
        logs = [(irrelevant + part).clamp(min=tiny).log() for part in (positive, negative)]
        logs += [(part + irrelevant / 2).clamp(min=tiny).log() for part in (positive, negative)]
        known = torch.cat([labels, 1 - labels], -1).nan_to_num(0.0)
        shape = (rules.tasks, rules.memory_size)
        truth, rebuilt = ((known @ torch.cat(logs[i : i + 2], -1).mT).unflatten(-1, shape) for i in (0, 2))
        picked = selection.clamp(min=tiny).log()
        yes = (picked + truth + self.reconstruction * rebuilt).logsumexp(-1)
        no = (selection * -torch.expm1(truth)).sum(-1).clamp(min=torch.finfo(selection.dtype).eps).log()
        likely = torch.where(task > 0.5, yes, no)
        return -torch.where(task.isnan(), 0, likely).sum(-1)


def _by_products(block: Tensor, false: Tensor, true: Tensor) -> Tensor:
    """How far each rule holds, ``[*B, R]``, where a concept ``[*B, C]`` that is false or true adds a factor ``[R, C]``.

    Rows take turns, so that their factors stay in the cache: all at once take five times as long, also backward. Where
    no graph keeps the factors, all turns have the same memory: new memory for each can take longer than the rest.
    """
    rows = block.flatten(0, -2) if block.ndim > 1 else block.unsqueeze(0)
    step = max(1, _FACTORS // max(1, false.numel()))
    if torch.compiler.is_compiling() or step >= len(rows):
        return torch.lerp(false, true, block.unsqueeze(-2)).prod(-1)
    parts = rows.unsqueeze(-2).split(step)
    if overwritable(block) and overwritable(false) and all(unpack_dual(t).tangent is None for t in (block, false)):
        factors = false.new_empty(step, *false.shape)
        truth = torch.cat([torch.lerp(false, true, part, out=factors[: len(part)]).prod(-1) for part in parts])
    else:
        truth = torch.cat([torch.lerp(false, true, part).prod(-1) for part in parts])
    return truth.view(*block.shape[:-1], len(false))


def _by_logarithms(block: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The same for certain roles ``[R, C]``, 0 or 1: two products of matrices, and memory for one of the logarithms."""
    least = math.log(torch.finfo(block.dtype).tiny)
    rows = block.flatten(0, -2) if block.ndim > 1 else block.unsqueeze(0)
    logs = rows.neg()
    found = negative.to(block.dtype) @ logs.log1p_().clamp_min_(least).mT  # this way round it is faster
    found += positive.to(block.dtype) @ logs.copy_(rows).log_().clamp_min_(least).mT
    found.clamp_min_(min(least, -87.0) + 1.0).exp_()  # what would round to 0 takes over ten times as long
    return found.mT.reshape(*block.shape[:-1], len(positive))


def _certain(scores: Tensor) -> tuple[Tensor, Tensor]:
    """1 where a concept's role with the largest score (the first of several) is positive, and where it is negative.

    ``[T, M, 3, C]`` -> two of ``[T, M, C]``, in the dtype of the scores: in place they take half the time of masks.
    """
    positive, negative, irrelevant = scores.detach().unbind(-2)
    first = torch.maximum(negative, irrelevant).le_(positive)
    return first, torch.maximum(positive, irrelevant).le_(negative).gt_(first)
