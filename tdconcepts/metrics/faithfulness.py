"""Does the agent need what an explanation calls important? AIM, AUM, PGI and PGU, state by state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.hooks import Pullback, Target, check_td, dispatch_rows
from tdconcepts.hooks.batching import check_chunk_size, expand, gather, groups, rows_of, spread
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import ATTRIBUTION, METRIC, NestedKey, as_key, as_keys, join, key_text

__all__ = ["AIM", "AUM", "PGI", "PGU", "hide", "ranked"]


class AIM(TensorDictModuleBase):
    r"""Accuracy on important features masked: :math:`\mathbb 1[\arg\max u(s_{\setminus \mathrm{top}\,k}) = a]`.

    Its mean over states is how often the agent still does what it did without the k most important features: *lower*
    is better. One step, open loop; what it does to the return says
    :func:`~tdconcepts.rl.return_curve`.

    | reads | writes |
    |---|---|
    | what ``of`` depends on; ``("attribution", *k)`` for each ``k`` in ``wrt`` | ``("metric", "aim")`` ``[*B]`` |

    Features are ranked by the size of their attribution, over all entries together; of equal ones the first.

    Args:
        module: the policy.
        of: the entry with a value or logit for each action, ``[*B, A]``. What the agent did is its largest.
        wrt: the entries that were explained; default: all that the module reads.
        k: how many features, or the fraction of them where it is a float in (0, 1].
        baseline: what a hidden feature is replaced by; 0.0 by default, or a tensor in the shape of the entry's rows.
        attribution: the first part of the attributions' keys.

    Raises:
        BadValue: a k out of range; attributions of another shape. BadKey: an entry that is not there.

    Source: Xiong et al. 2024, "XRL-Bench: a benchmark for evaluating and comparing explainable reinforcement learning
    techniques", section 4.2.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> policy = TensorDictModule(lambda x: torch.stack([x[..., 0], x[..., 1]], -1), ["observation"], ["logits"])
        >>> td = TensorDict(observation=torch.tensor([[3.0, 1.0, 0.0]]), batch_size=[1])
        >>> td["attribution", "observation"] = torch.tensor([[0.9, 0.1, 0.0]])
        >>> AIM(policy)(td)["metric", "aim"], AUM(policy)(td)["metric", "aum"]
        (tensor([0.]), tensor([1.]))
    """

    name, least = "aim", False

    def __init__(
        self,
        module: TensorDictModuleBase,
        of: NestedKey = "logits",
        wrt: NestedKey | list[NestedKey] | None = None,
        *,
        k: int | float = 1,
        baseline: float | Tensor = 0.0,
        attribution: NestedKey = ATTRIBUTION,
    ) -> None:
        super().__init__()
        self.module, self.k, self.baseline = module, _checked(k), baseline
        self._pull = Pullback(module, Target(of, slice(None)), _entries(module, wrt))
        self._scores = [as_key(join(attribution, key)) for key in self._pull.names]
        self.in_keys = [*self._pull.in_keys, *self._scores]
        self.out_keys = [as_key(join(METRIC, self.name))]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Measure every row of ``tensordict``."""
        check_td(tensordict)
        values, masks = _read(tensordict, list(self._pull.names), self._scores, self.k, self.least)
        with torch.no_grad():
            before, _ = self._pull.evaluate(tensordict)
            after, _ = self._pull.evaluate(tensordict, hide(values, masks, self.baseline))
        same = before.argmax(-1) == after.argmax(-1)
        return tensordict.set(self.out_keys[0], same.to(before.dtype))


class AUM(AIM):
    """Accuracy on unimportant features masked: as :class:`AIM`, for the k *least* important; higher is better.

    | reads | writes |
    |---|---|
    | what ``of`` depends on; ``("attribution", *k)`` for each ``k`` in ``wrt`` | ``("metric", "aum")`` ``[*B]`` |

    Args:
        module, of, wrt, k, baseline, attribution: as for :class:`AIM`.

    Raises:
        BadValue, BadKey: as :class:`AIM`.

    Source: Xiong et al. 2024, "XRL-Bench", section 4.2.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> policy = TensorDictModule(lambda x: x[..., :2], ["observation"], ["logits"])
        >>> td = TensorDict(observation=torch.tensor([[3.0, 1.0, 0.0]]), batch_size=[1])
        >>> td["attribution", "observation"] = torch.tensor([[0.0, 0.1, 0.9]])
        >>> AUM(policy)(td)["metric", "aum"]  # what the attribution calls unimportant decides
        tensor([0.])
    """

    name, least = "aum", True


class PGI(TensorDictModuleBase):
    r"""Prediction gap on important features: :math:`E_\epsilon\, |y(s) - y(s + \epsilon_{\mathrm{top}\,k})|`.

    Noise on the k most important features: *higher* is better.

    | reads | writes |
    |---|---|
    | what the target depends on; ``("attribution", *k)`` for each ``k`` in ``wrt`` | ``("metric", "pgi")`` ``[*B]`` |

    Args:
        module: the policy or critic.
        target: one number a row; :func:`~tdconcepts.rl.chosen_value` for the logged action typically.
        wrt, k, attribution: as for :class:`AIM`; ``attribution`` by ``options``.
        noise_level: the standard deviation of the Gaussian noise, in the units of the entry.
        n_samples: how many draws.
        generator: where they come from; all rows share them, so a row gets what it gets alone. Default: torch's own.
        options: ``attribution``, ``chunk_size`` (rows in flight).

    Raises:
        BadValue: a k or noise out of range; attributions of another shape. BadKey: an entry that is not there.

    Source: Xiong et al. 2024, "XRL-Bench", section 4.2; Agarwal et al. 2022, "OpenXAI", section 3.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda x: 2 * x[..., :1], ["observation"], ["state_value"])
        >>> td = TensorDict(observation=torch.zeros(1, 2), batch_size=[1])
        >>> td["attribution", "observation"] = torch.tensor([[1.0, 0.0]])
        >>> gap = PGI(critic, Target("state_value"), n_samples=20_000, generator=torch.Generator().manual_seed(0))
        >>> round(gap(td)["metric", "pgi"].item(), 1), PGU(critic, Target("state_value"))(td)["metric", "pgu"].item()
        (0.2, 0.0)
    """

    name, least = "pgi", False

    def __init__(
        self,
        module: TensorDictModuleBase,
        target: Target,
        wrt: NestedKey | list[NestedKey] | None = None,
        *,
        k: int | float = 1,
        noise_level: float = 0.1,
        n_samples: int = 20,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        for option in options:
            if option not in ("attribution", "chunk_size"):
                raise BadType(f"no option {option!r}", needed="attribution or chunk_size")
        if not noise_level > 0 or type(n_samples) is not int or n_samples < 1:
            got = f"noise_level={noise_level}, n_samples={n_samples}"
            raise BadValue("no noise to draw", got=got, needed="a positive level, one draw or more")
        self.module, self.k, self.noise_level, self.n_samples = module, _checked(k), noise_level, n_samples
        self._pull = Pullback(module, target, _entries(module, wrt))
        self._source, self._chunk = Source(generator), check_chunk_size(options.get("chunk_size"))  # type: ignore[arg-type]
        attribution = options.get("attribution", ATTRIBUTION)
        self._scores = [as_key(join(attribution, key)) for key in self._pull.names]
        self.in_keys = [*self._pull.in_keys, *self._scores]
        self.out_keys = [as_key(join(METRIC, self.name))]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Measure every row of ``tensordict``."""
        check_td(tensordict)
        td, lead, pull = tensordict, tensordict.batch_dims, self._pull
        values, masks = _read(td, list(pull.names), self._scores, self.k, self.least)
        noise = {key: self._source.normal(self.n_samples, *value.shape[lead:]) for key, value in values.items()}
        others = [key for key in pull.in_keys if key not in values]
        total = None
        with torch.no_grad():
            held = pull.hold(td)
            before, _ = pull.evaluate(td, held=held)
            for some in groups(self.n_samples, rows_of(td, self._chunk, list(values)), td.numel()):
                m, points = len(some), dict[Any, Tensor]()
                for key, value in values.items():
                    draw = noise[key][some.start : some.stop].to(value) * self.noise_level
                    moved = value + draw.reshape(m, *[1] * lead, *value.shape[lead:]) * masks[key].to(value.dtype)
                    points[key] = spread(moved, m, td.batch_size)
                kept = None if held is None else spread(held.expand(m, *held.shape), m, td.batch_size)
                after, _ = pull.evaluate(expand(td, m, others), points, kept)
                gap = (gather(after, m, td.batch_size) - before).abs().sum(0)
                total = gap if total is None else total + gap
        assert total is not None
        return tensordict.set(self.out_keys[0], total / self.n_samples)


class PGU(PGI):
    """Prediction gap on unimportant features: as :class:`PGI`, for the k *least* important; lower is better.

    | reads | writes |
    |---|---|
    | what the target depends on; ``("attribution", *k)`` for each ``k`` in ``wrt`` | ``("metric", "pgu")`` ``[*B]`` |

    Args:
        module, target, wrt, k, noise_level, n_samples, generator, options: as for :class:`PGI`.

    Raises:
        BadValue, BadKey: as :class:`PGI`.

    Source: Xiong et al. 2024, "XRL-Bench", section 4.2.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda x: 2 * x[..., :1], ["observation"], ["state_value"])
        >>> td = TensorDict(observation=torch.zeros(1, 2), batch_size=[1])
        >>> td["attribution", "observation"] = torch.tensor([[0.1, 0.9]])
        >>> gap = PGU(critic, Target("state_value"), n_samples=20_000, generator=torch.Generator().manual_seed(0))
        >>> round(gap(td)["metric", "pgu"].item(), 1)  # the value moves with what is called unimportant
        0.2
    """

    name, least = "pgu", True


def ranked(scores: Sequence[Tensor], lead: int) -> Tensor:
    """The rank of every element over all entries together, ``[*B, n]``: 0 for the largest size; ties by position."""
    sizes = torch.cat(
        [score.detach().abs().flatten(lead) if score.ndim > lead else score.abs().unsqueeze(-1) for score in scores], -1
    )
    return sizes.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def hide(
    values: dict[NestedKey, Tensor], masks: dict[NestedKey, Tensor], baseline: float | Tensor
) -> dict[Any, Tensor]:
    """The entries with what is masked replaced by the baseline."""
    return {key: torch.where(masks[key], torch.as_tensor(baseline).to(value), value) for key, value in values.items()}


def _read(
    td: TensorDictBase, keys: list[NestedKey], scores: list[NestedKey], k: int | float, least: bool
) -> tuple[dict[NestedKey, Tensor], dict[NestedKey, Tensor]]:
    """The entries, and which of their elements are the k most (or least) important."""
    lead, values, sizes = td.batch_dims, {}, []
    for key, score in zip(keys, scores, strict=True):
        value, size = td.get(key), td.get(score)
        for name, entry in ((key, value), (score, size)):
            if entry is None:
                raise BadKey(f"no entry {key_text(name)} in the TensorDict", got=f"{list(td.keys(True, True))}")
        if size.shape != value.shape:
            raise BadValue(
                f"the attribution {key_text(score)} has another shape",
                got=f"{list(size.shape)}",
                needed=f"{list(value.shape)}: one target, explained with respect to {key_text(key)}",
            )
        values[key] = value
        sizes.append(size)
    rank = ranked(sizes, lead)
    count = rank.shape[-1]
    chosen = max(1, round(k * count)) if isinstance(k, float) else k
    if chosen > count:
        raise BadValue("more features than there are", got=f"k={k}", needed=f"at most {count}")
    mask = rank >= count - chosen if least else rank < chosen
    parts = mask.split([max(1, value.shape[lead:].numel()) for value in values.values()], -1)
    return values, {key: part.reshape(value.shape) for (key, value), part in zip(values.items(), parts, strict=True)}


def _entries(module: TensorDictModuleBase, wrt: NestedKey | list[NestedKey] | None) -> list[Any] | None:
    keys = None if wrt is None else as_keys(wrt)
    for key in keys or []:
        if key not in module.in_keys:
            raise BadKey(f"the module reads no entry {key_text(key)}", needed=f"one of {list(module.in_keys)}")
    return keys


def _checked(k: int | float) -> int | float:
    if not (type(k) is int and k >= 1) and not (type(k) is float and 0.0 < k <= 1.0):
        raise BadValue("not a number of features", got=f"k={k!r}", needed="an int >= 1, or a fraction in (0, 1]")
    return k
