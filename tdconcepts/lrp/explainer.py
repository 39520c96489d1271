"""The explainer: a target's value, propagated back to entries and sites by a composite of rules."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointError

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Options, Pulled, Site, Target, dispatch_rows
from tdconcepts.hooks.explaining import Explaining, check_options
from tdconcepts.hooks.pullback import Pullback, Wrt
from tdconcepts.hooks.rules import Convention, Rule
from tdconcepts.hooks.twice import differentiable_once_more
from tdconcepts.keys import CONVERGENCE_DELTA, NestedKey, join
from tdconcepts.lrp.boundary import nonzero
from tdconcepts.lrp.composites import Composite
from tdconcepts.lrp.conditions import Conditions
from tdconcepts.lrp.report import Conservation
from tdconcepts.lrp.starts import Started
from tdconcepts.tunables import Replaceable

__all__ = ["LRP", "LRPOptions"]


class LRPOptions(Options, total=False):
    """The options of :class:`LRP`, besides those of every explainer.

    Args:
        convention: what flows; default: the composite's own.
        start: what the relevance starts from: the target's ``"value"``, or ``"ones"``.
        check: whether :attr:`LRP.report`, a :class:`~tdconcepts.lrp.Conservation`, tells what each rule did with its
            relevance, and what has no rule.
        condition: ``{site: units}``: only relevance that passes these units (of a row's first dim) goes on. Units are
            ints, or the key of an entry with a mask ``[*B, C]`` or numbers ``[*B]``. A list of such conditions is
            explained in one pass, along one more dim as several targets are.
        convergence_delta: also write :math:`\\sum_i R_i - R`, what was added to the relevance that the propagation
            started with (a negative number where biases and stabilisers absorbed some).
    """

    convention: Convention
    start: Literal["value", "ones"]
    check: bool
    condition: Any
    convergence_delta: bool


class LRP(Replaceable, TensorDictModuleBase):
    r"""Layer-wise relevance propagation of a target: :math:`R` at entries and sites, with :math:`\sum R \approx y`.

    | reads | writes |
    |---|---|
    | what the target depends on, and its ``by`` | ``("attribution", *k)`` ``[*B, ...]`` for each ``k`` in ``wrt`` |
    | | ``("convergence_delta", *k)`` ``[*B]``, on request |

    Entries share one delta, under ``("convergence_delta", "joint")`` where there are several; each site has its own.
    With several targets there is one more dim of size T right after the batch dims; they share the forward. The model
    is used as it is: rules are installed for the call only.

    Args:
        module: a TensorDictModule.
        composite: which module and operation gets which rule; for one bare rule, ``Composite({kind: rule})``.
        target: what is explained.
        wrt: entries and sites, one or a list; default: all entries that the module reads.
        options: see :class:`LRPOptions`.

    The ``tunables`` are those of the composite (``epsilon``, ``gamma``), and ``replace`` passes its arguments on.

    Raises:
        BadType: no composite, a bare ``nn.Module``, or an integer entry (explain at the embedding: ``wrt=Site(...)``).
        BadKey: an entry or a site that does not exist. BadValue: parts of the model without a rule, and mixed
            conventions.

    Source: Bach et al., *On pixel-wise explanations*, 2015; the gradient convention Achtibat et al., 2024.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from tdconcepts.lrp import EpsilonPlus
        >>> layers = torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False)
        >>> net = TensorDictModule(torch.nn.Sequential(*layers), in_keys=["x"], out_keys=["logits"])
        >>> td = net(TensorDict(x=torch.randn(3, 4), batch_size=[3]))
        >>> td = LRP(net, EpsilonPlus(), Target("logits", 1))(td)
        >>> torch.allclose(td["attribution", "x"].sum(-1), td["logits"][:, 1], atol=1e-4)
        True
    """

    looks_first = True  # for ``Compiled``: a graph can't see that a terminal rule is in the middle of the model

    def __init__(
        self,
        module: TensorDictModuleBase,
        composite: Composite | None = None,
        target: Target | None = None,
        wrt: Wrt | list[Wrt] | None = None,
        **options: Unpack[LRPOptions],
    ) -> None:
        super().__init__()
        check_options(options, {**Options.__annotations__, **LRPOptions.__annotations__})
        if not isinstance(composite, Composite):
            hint = f"Composite({{nn.Linear: {composite!r}}})" if isinstance(composite, Rule) else "EpsilonPlus()"
            raise BadType(
                "LRP needs a composite, which says what rule is for whom",
                got=repr(composite),
                needed="a Composite of rules",
                fix=f"LRP(module, {hint}, Target(...))",
            )
        self.convention: Convention = options.get("convention") or composite.convention
        start = options.get("start", "value")
        if start not in ("value", "ones"):
            raise BadValue("no such start", got=f"start={start!r}", needed='"value" or "ones"')
        self.report = Conservation() if options.get("check") else None
        lean = not options.get("create_graph", False)
        rules = composite.rules_for(module, self.convention, ends="ratio", report=self.report, lean=lean)
        self._ends = any(rule.terminal for _, rule in rules.modules) or (
            rules.first is not None and rules.first[1].terminal
        )
        self._delta = bool(options.get("convergence_delta", False))
        self._conditions = Conditions(rules, options.get("condition"))
        relevance = self.convention == "relevance"
        plain = not self._conditions.many and start == ("ones" if relevance else "value")
        what: Any = target
        if isinstance(target, Target) and (not plain or (relevance and (self._delta or self.report is not None))):
            what = Started(target, start, relevance)
        self._explaining = Explaining(module, what, wrt, options, self._delta_keys, rules=self._conditions)
        self.module, self.composite = module, composite
        self.in_keys, self.out_keys = self._explaining.in_keys, self._explaining.out_keys

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain every row of ``tensordict``."""
        if self.report is not None:
            if is_compiling():
                raise BadValue("check=True reports numbers, which a compiled graph has not: LRP(..., check=False)")
            self.report.clear()
        return self._explaining.run(tensordict, self._attribute)

    def hold(self, tensordict: TensorDictBase) -> Tensor | None:
        """The index that the target's ``"argmax"`` chooses here, for methods that look at several points."""
        return self._explaining.pullback.hold(tensordict)

    def _attribute(self, td: TensorDictBase, held: Tensor | None) -> dict[NestedKey, Tensor]:
        this, by_point = self._explaining, self.convention == "gradient"
        each = [self._pulled(td, held, only) for only in self._conditions.apart]
        pulled = each[0] if len(each) == 1 else _together(each, td.batch_dims)
        several = pulled.values.ndim > td.batch_dims
        results: dict[NestedKey, Tensor] = {}
        for key, flow, point in zip(this.attribution_keys, pulled.gradients, pulled.points, strict=True):
            if by_point:
                point = nonzero(point) if self._ends else point
                results[key] = flow * (point.unsqueeze(td.batch_dims) if several else point)
            else:
                results[key] = flow.clone()
        if self._delta:
            results |= self._deltas(results, pulled.values)
        if self.report is not None:
            entries = [results[this.attribution_keys[i]] for i in _entries(this.pullback)]
            self.report.began(float(pulled.values.sum()), sum(float(r.sum()) for r in entries) if entries else None)
        return results | this.written(pulled.outputs)

    def _pulled(self, td: TensorDictBase, held: Tensor | None, only: int | None) -> Pulled:
        this = self._explaining
        width = this.width(td) if self.report is None else 1  # the report adds up numbers, one target after the other
        options: dict[str, Any] = {"create_graph": this.create_graph, "held": held, "width": width}
        with self._conditions.acting(only), differentiable_once_more(this.create_graph):
            try:
                return this.pullback(td, snapshot=self.convention == "gradient", **options)
            except CheckpointError as error:
                raise BadValue(
                    "the model recomputes activations in its backward pass, where no rule sees them",
                    got="torch.utils.checkpoint",
                    needed="a forward that keeps them",
                    fix="model.gradient_checkpointing_disable(), or model.eval() if that ends it",
                ) from error

    def _deltas(self, found: dict[NestedKey, Tensor], start: Tensor) -> dict[NestedKey, Tensor]:
        keys, deltas = self._explaining.attribution_keys, {}
        for key, group in self._groups(self._explaining):
            parts = [found[keys[i]] for i in group]
            total = sum(r.flatten(start.ndim).sum(-1) if r.ndim > start.ndim else r for r in parts)
            deltas[key] = (total - start).detach()
        return deltas

    def _delta_keys(self, this: Explaining) -> list[NestedKey]:
        return [key for key, _ in self._groups(this)] if self._delta else []

    def _groups(self, this: Explaining) -> list[tuple[NestedKey, list[int]]]:
        """What shares a delta, by numbers: the entries together, every other place for itself."""
        pullback, inputs = this.pullback, _entries(this.pullback)
        groups = ([inputs] if inputs else []) + [[i] for i in range(len(pullback.wrt)) if i not in inputs]
        names = ["joint" if len(group) > 1 else pullback.names[group[0]] for group in groups]
        return [(join(CONVERGENCE_DELTA, name), group) for name, group in zip(names, groups, strict=True)]


def _together(each: list[Pulled], dim: int) -> Pulled:
    """Pull-backs for one condition each as one for all: each has a dim of one for it, right after the batch dims."""
    gradients = [torch.cat(parts, dim) for parts in zip(*(pulled.gradients for pulled in each), strict=True)]
    return each[0]._replace(values=torch.cat([pulled.values for pulled in each], dim), gradients=gradients)


def _entries(pullback: Pullback) -> list[int]:
    """Which of *wrt* are entries that the module reads."""
    return [i for i, w in enumerate(pullback.wrt) if not isinstance(w, Site) and w in pullback.module.in_keys]
