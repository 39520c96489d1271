"""Activation patching and causal tracing: what one run's activations do in another run."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments.plans import Steps
from tdconcepts.experiments.sweep import Sweep
from tdconcepts.experiments.table import Experiments, Where, each, every, product, together
from tdconcepts.hooks import (
    Add,
    Hooked,
    Replace,
    Site,
    Target,
    capture,
    check_module,
    check_td,
    dispatch_rows,
    locate,
    patch,
)
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import SWEEP, NestedKey, as_key, join, key_text

__all__ = ["Patching", "Split", "activation_patching", "causal_trace", "concrete", "donors", "measured"]

PATCHING, DONOR = "patching", "activation of the donor"
Split: TypeAlias = Callable[[Any, EditLike], Experiments]


class Patching(TensorDictModuleBase):
    r"""Put activations of a *donor* run into another run, one experiment at a time; see the functions of this module.

    .. math:: \mathrm{effect}_n = \frac{y(\mathrm{run}, a_n \leftarrow a_n^{\mathrm{donor}}) - y(\mathrm{run})}
                                        {y(\mathrm{donor}) - y(\mathrm{run})}

    Args:
        model: a TensorDictModule.
        sites: what is patched: sites and entries, globs too.
        target: the number y, of an entry that the model writes; None writes the outputs alone.
        split: from a site and an edit to experiments: :func:`each` or :func:`every` with its options.
        direction: ``"denoise"`` (the donor is the clean run) or ``"noise"`` (the donor is the corrupt one).
        noise: for causal tracing, where noise is added and the entry that holds it; there is one input then.
        chunk_size: how many rows may be in flight.
    """

    def __init__(
        self,
        model: TensorDictModuleBase,
        sites: Where | list[Where],
        target: Target | None,
        split: Split,
        direction: Literal["denoise", "noise"],
        noise: tuple[Where, NestedKey] | None,
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.model = check_module(model, "model")
        self.target, self.split, self.noise, self.chunk_size = target, split, noise, chunk_size
        if direction not in ("denoise", "noise"):
            raise BadValue("no such direction", got=repr(direction), needed='"denoise" or "noise"')
        self._runs = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        self.sites = concrete(model, sites)
        if target is not None:
            check_target(model, target)
        self._outputs = list(map(as_key, model.out_keys)) if target is None else [as_key(target.of)]
        extra = [] if target is None else target.in_keys
        read = map(as_key, model.in_keys)
        if noise is None:
            inputs = [as_key(join(name, key)) for key in read for name in ("clean", "corrupt")]
        else:
            inputs = [*read, as_key(noise[1])]
        self.in_keys = list(dict.fromkeys([*inputs, *extra]))
        self.out_keys = [as_key(join(SWEEP, key)) for key in self._outputs]
        self._effect = () if target is None else (PATCHING, "effect")
        self.out_keys += [self._effect] if self._effect else []
        self._sweeps: dict[Any, Sweep] = {}
        self._sweep(tuple([1] * len(self.sites)))  # so that errors come now

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run both, and the experiments."""
        check_td(tensordict)
        with torch.no_grad():
            run, donor = (self._input(tensordict, name) for name in self._runs)
            taken, donor_out = donors(self.model, donor, self.sites)
            sweep = self._sweep(tuple(len(values) for values in taken.values()))
            for name, values in taken.items():
                for call, value in enumerate(values):
                    run.set(_donor(name, call, len(values)), value)
            if self.noise is None:
                out = self.model(run.copy())
            else:
                with patch(self.model, {self.noise[0]: Add(self.noise[1])}) as noisy:
                    out = noisy(run.copy())
            swept = sweep(run.copy())
            results = [swept.get(key) for key in sweep.out_keys]
            if self.target is not None:
                results.append(self._effects(self.target, tensordict, results[0], out, donor_out))
        for key, value in zip(self._written(), results, strict=True):
            tensordict.set(key, value)
        return tensordict

    def names(self, tensordict: TensorDictBase) -> tuple[str, ...]:
        """What each experiment patches, in their order on a batch like this one."""
        with torch.no_grad():
            run, donor = (self._input(tensordict, name) for name in self._runs)
            taken, _ = donors(self.model, donor, self.sites)
            for name, values in taken.items():
                for call, value in enumerate(values):
                    run.set(_donor(name, call, len(values)), value)
            return self._sweep(tuple(len(values) for values in taken.values())).names(run)

    def _effects(
        self, target: Target, td: TensorDictBase, swept: Tensor, out: TensorDictBase, donor_out: TensorDictBase
    ) -> Tensor:
        lead = td.batch_dims
        before, at_donor = out.get(target.of), donor_out.get(target.of)
        held = None
        if target.moves:
            held = target.hold(at_donor if self._runs[1] == "clean" else before, lead)
        y, y_donor = (measured(target, value, td, lead, held) for value in (before, at_donor))
        y_n = measured(target, swept, td, lead, held, experiments=True)
        y, y_donor = y.unsqueeze(lead), y_donor.unsqueeze(lead)
        return (y_n - y) / (y_donor - y)

    def _input(self, td: TensorDictBase, name: str) -> TensorDict:
        found = TensorDict({}, batch_size=td.batch_size, device=td.device)
        for key in map(as_key, self.model.in_keys):
            source = key if self.noise is not None else as_key(join(name, key))
            value = td.get(source)
            if value is None:
                raise BadKey(f"no entry {key_text(source)} to run on", got=f"entries {list(td.keys(True, True))}")
            found.set(key, value)
        if self.noise is not None:
            value = td.get(self.noise[1])
            if value is None:
                raise BadKey(f"no entry {key_text(self.noise[1])} with the noise", fix="torch.randn_like(...) * scale")
            found.set(self.noise[1], value)
        return found

    def _sweep(self, calls: tuple[int, ...]) -> Sweep:
        if calls not in self._sweeps:
            parts = []
            for site, m in zip(self.sites, calls, strict=True):
                several = [self.split(_call(site, call, m), Replace(_donor(_name(site), call, m))) for call in range(m)]
                parts.append(several[0] if m == 1 else together(*several))
            total = functools.reduce(operator.add, parts)
            if self.noise is not None:
                total = product(each(self.noise[0], Add(self.noise[1])), total)
            self._sweeps[calls] = Sweep(self.model, total, outputs=self._outputs, chunk_size=self.chunk_size)
        return self._sweeps[calls]

    def _written(self) -> list[NestedKey]:
        keys: list[NestedKey] = [as_key(join(SWEEP, key)) for key in self._outputs]
        return [*keys, self._effect] if self._effect else keys


def activation_patching(
    model: TensorDictModuleBase,
    sites: Where | list[Where],
    target: Target | None = None,
    *,
    split: Split = each,
    direction: Literal["denoise", "noise"] = "denoise",
    chunk_size: int | None = None,
) -> Patching:
    r"""Which activations carry the difference between a clean and a corrupt run?

    .. math:: \mathrm{effect}_n = \frac{y(\mathrm{run}, a_n \leftarrow a_n^{\mathrm{donor}}) - y(\mathrm{run})}
                                        {y(\mathrm{donor}) - y(\mathrm{run})}

    0: the patch changes nothing; 1: it gives the donor's output; not finite where both runs give the same y.

    | reads | writes |
    |---|---|
    | ``("clean", *k)``, ``("corrupt", *k)`` for each input k of the model | ``("sweep", *key)`` ``[*B, N, ...]`` |
    | what the target reads | ``("patching", "effect")`` ``[*B, N]``, ``[*B, N, T]`` with several targets |

    Args:
        model: a TensorDictModule.
        sites: sites and entries, one or a list, globs too. A module that runs several times is patched at each call,
            each with the donor's value of that call.
        target: the number y. ``"argmax"`` is chosen in the clean run, for all. None writes the outputs alone.
        split: how a site falls into experiments: ``each``, the whole activation (default);
            ``functools.partial(every, dim=-2)``, positions; ``functools.partial(every, groups=12)``, heads.
        direction: ``"denoise"`` puts clean activations into the corrupt run (what is sufficient); ``"noise"`` corrupt
            ones into the clean run (what is necessary).
        chunk_size: how many rows may be in flight.

    Raises:
        BadKey: a site or an entry that does not exist. BadValue: a direction that is none.

    Source: Vig et al. 2020; Meng et al. 2022, section 2; Zhang and Nanda 2024 for the directions and the measure.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        >>> patching = activation_patching(TensorDictModule(net, ["x"], ["y"]), [Site("0"), Site("2")], Target("y", 0))
        >>> clean, corrupt = torch.randn(5, 4), torch.randn(5, 4)
        >>> td = patching(TensorDict(clean=dict(x=clean), corrupt=dict(x=corrupt), batch_size=[5]))
        >>> torch.allclose(td["patching", "effect"], torch.ones(5, 2))  # each of these layers carries all
        True
    """
    return Patching(model, sites, target, split, direction, None, chunk_size)


def causal_trace(
    model: TensorDictModuleBase,
    sites: Where | list[Where],
    target: Target | None = None,
    *,
    at: Where,
    noise: NestedKey = "noise",
    positions: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> Patching:
    r"""Where does the model hold what noise at the input took away? Restore a site at one position at a time.

    The run is the input with ``noise`` added at ``at``; the donor is the input as it is. The effect is that of
    :func:`activation_patching`, over the grid sites x positions, positions varying fastest:
    ``effect.unflatten(-1, (n_sites, -1))`` is the heat map.

    | reads | writes |
    |---|---|
    | the model's ``in_keys``, ``noise`` ``[*B, ...]`` of the shape of ``at`` | ``("sweep", *key)`` ``[*B, N, ...]`` |
    | what the target reads | ``("patching", "effect")`` ``[*B, N]`` |

    Args:
        model: a TensorDictModule.
        sites: what is restored.
        target: the number y.
        at: where the noise is added: the embeddings, or an entry.
        noise: the entry that holds it; 3 standard deviations of the embeddings in the paper, zero at the positions that
            are to stay.
        positions: along dim -2; default: all.
        chunk_size: how many rows may be in flight.

    Source: Meng et al. 2022 (ROME), section 2.1.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Flatten(-2), torch.nn.Linear(18, 2)]
        >>> net = torch.nn.Sequential(*layers)
        >>> trace = causal_trace(TensorDictModule(net, ["x"], ["y"]), [Site("0"), Site("1")], Target("y", 0), at="x")
        >>> td = trace(TensorDict(x=torch.randn(5, 3, 4), noise=torch.randn(5, 3, 4), batch_size=[5]))
        >>> td["patching", "effect"].unflatten(-1, (2, -1)).shape
        torch.Size([5, 2, 3])
    """
    return Patching(model, sites, target, _Positions(positions), "denoise", (at, noise), chunk_size)


class _Positions:
    def __init__(self, positions: Sequence[int] | None) -> None:
        self.positions = positions

    def __call__(self, where: Where, edit: EditLike) -> Experiments:
        return every(where, edit, self.positions, dim=-2)


def concrete(model: TensorDictModuleBase, sites: Where | list[Where]) -> list[Where]:
    """The sites of one model that ``sites`` names, globs resolved; entries that it reads among them."""
    found: list[Where] = []
    for where in each(sites, Replace(0.0)).wheres():
        if not isinstance(where, Site) and where in model.in_keys and where not in model.out_keys:
            found.append(where)
        else:
            found += [place.what for place in locate(model, where)]
    return list(dict.fromkeys(found))


def donors(
    model: TensorDictModuleBase, td: TensorDictBase, sites: Sequence[Where]
) -> tuple[dict[str, list[Tensor]], TensorDictBase]:
    """One forward: the activation at each site, at each of its calls, and what the model wrote."""
    inner = {site: _every_call(site) for site in sites if isinstance(site, Site)}
    found: dict[str, list[Tensor]] = {}
    if not inner:
        out = Hooked(model, Steps([]))(td.copy())
    else:
        with capture(model, *inner.values(), clone=True) as m:
            out = m(td.copy())
    for site in sites:
        if isinstance(site, Site):
            value = out["activation", str(inner[site])]
            found[_name(site)] = list(value.unbind(td.batch_dims)) if site.call in (None, "all") else [value]
        else:
            found[_name(site)] = [out.get(site)]
    return found, out


def check_target(model: TensorDictModuleBase, target: object) -> None:
    """Raise for what is no target of an entry of the model."""
    if not isinstance(target, Target):
        raise BadType("not a Target", got=repr(target), needed='Target("logits", 3)')
    if isinstance(target.of, Site) or target.of not in model.out_keys:
        raise BadKey("the target is no entry that the model writes", got=repr(target), needed=f"{model.out_keys}")


def measured(
    target: Target, value: Tensor, td: TensorDictBase, lead: int, held: Tensor | None, experiments: bool = False
) -> Tensor:
    """The target's numbers of ``value`` ``[*B, ...]``, or of ``[*B, N, ...]`` where there are experiments."""
    if not experiments:
        return target.read(value, td, lead, held)[0]
    shape = value.shape[: lead + 1]
    rows = TensorDict({}, batch_size=shape, device=td.device)
    for key in target.in_keys:
        entry = td.get(key)
        if isinstance(entry, Tensor):
            rows.set(key, entry.unsqueeze(lead).expand(*shape, *entry.shape[lead:]))
    return target.read(value, rows, lead + 1, None if held is None else held.unsqueeze(lead).expand(shape))[0]


def _every_call(site: Site) -> Site:
    return site if site.call is not None else Site(site.path, site.side, site.index, "all", site.leaf)


def _call(site: Where, call: int, m: int) -> Where:
    if not isinstance(site, Site) or isinstance(site.call, int):
        return site
    return Site(site.path, site.side, site.index, None if m == 1 else call, site.leaf)


def _name(site: Where) -> str:
    return str(site) if isinstance(site, Site) else key_text(site)


def _donor(name: str, call: int, m: int) -> NestedKey:
    return (DONOR, name if m == 1 else f"{name}@{call}")
