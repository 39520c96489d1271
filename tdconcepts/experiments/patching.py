"""Activation patching and causal tracing: what one run's activations do in another run."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadKey, BadType
from tdconcepts.experiments.runs import (
    DONOR,
    PATCHING,
    check_target,
    concrete,
    donors,
    entry_of,
    input_of,
    measured,
    place_all,
    runs_of,
)
from tdconcepts.experiments.sweep import Sweep
from tdconcepts.experiments.table import Experiments, Where, each, every, product, together, where_text
from tdconcepts.hooks import (
    Add,
    Replace,
    Site,
    Target,
    check_module,
    check_td,
    dispatch_rows,
    patch,
)
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import SWEEP, NestedKey, as_key, join, key_text

__all__ = ["Patching", "Split", "activation_patching", "called", "causal_trace", "check_split"]

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
        runs: the names of the run and of the donor: ``("corrupt", "clean")``, ``("base", "source")``.
        noise: for causal tracing, where noise is added and the entry that holds it; there is one input then.
        chunk_size: how many rows may be in flight.
    """

    def __init__(
        self,
        model: TensorDictModuleBase,
        sites: Where | list[Where],
        target: Target | None,
        split: Split,
        runs: tuple[str, str],
        noise: tuple[Where, NestedKey] | None,
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.model = check_module(model, "model")
        self.target, self.split, self.noise, self.chunk_size = target, split, noise, chunk_size
        self._runs = runs
        check_split(split)
        self.sites = concrete(model, sites)
        if target is not None:
            check_target(model, target)
        self._outputs = list(map(as_key, model.out_keys if target is None else target.goals))
        extra = [] if target is None else target.in_keys
        read = map(as_key, model.in_keys)
        if noise is None:
            inputs = [as_key(join(name, key)) for key in read for name in sorted(runs)]
        else:
            inputs = [*read, as_key(noise[1])]
        self.in_keys = list(dict.fromkeys([*inputs, *extra]))
        self.out_keys = [as_key(join(SWEEP, key)) for key in self._outputs]
        self._effect = () if target is None else (PATCHING, "effect")
        self.out_keys += [self._effect] if self._effect else []
        self._sweeps: dict[Any, Sweep] = {}

    def checked(self) -> Self:
        """This, after a look at what it describes, so that errors come before the first call."""
        self._sweep((1,) * len(self.sites))
        return self

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run both, and the experiments."""
        check_td(tensordict)
        with torch.no_grad():
            run, donor_out, sweep = self._prepared(tensordict)
            if self.noise is None:
                out = self.model(run.copy())
            else:
                with patch(self.model, {self.noise[0]: Add(self.noise[1])}) as noisy:
                    out = noisy(run.copy())
            results = self._swept(sweep, run)
            if self.target is not None:
                swept = dict(zip(self._outputs, results, strict=True))
                results.append(self._effects(self.target, tensordict, swept, out, donor_out))
        for key, value in zip(self._written(), results, strict=True):
            tensordict.set(key, value)
        return tensordict

    def names(self, tensordict: TensorDictBase) -> tuple[str, ...]:
        """What each experiment patches, in their order on a batch like this one."""
        with torch.no_grad():
            run, _, sweep = self._prepared(tensordict)
            beside = "".join(f"{name} & " for name in self._beside())
            return tuple(name.removeprefix(beside) for name in sweep.names(run))

    def _beside(self) -> list[str]:
        """What is changed in every experiment, by name."""
        return [] if self.noise is None else [where_text(self.noise[0])]

    def _prepared(self, td: TensorDictBase) -> tuple[TensorDict, TensorDictBase, Sweep]:
        """The run with the donor's activations in it, what the donor wrote, and the experiments."""
        run, donor = (self._input(td, name) for name in self._runs)
        taken, donor_out = donors(self.model, donor, self.sites)
        place_all(run, DONOR, taken)
        return run, donor_out, self._sweep(tuple(len(values) for values in taken.values()))

    def _swept(self, sweep: Sweep, run: TensorDict) -> list[Tensor]:
        swept = sweep(run.copy())
        return [swept.get(key) for key in sweep.out_keys]

    def _effects(
        self,
        target: Target,
        td: TensorDictBase,
        swept: dict[NestedKey, Tensor],
        out: TensorDictBase,
        donor_out: TensorDictBase,
    ) -> Tensor:
        lead = td.batch_dims
        held = None
        if target.moves:
            held = target.hold((donor_out if self._runs[1] == "clean" else out).get(target.of), lead)
        y, y_donor = (measured(target, written, td, lead, held) for written in (out, donor_out))
        y_n = measured(target, swept, td, lead, held, experiments=True)
        y, y_donor = y.unsqueeze(lead), y_donor.unsqueeze(lead)
        return (y_n - y) / (y_donor - y)

    def _input(self, td: TensorDictBase, name: str) -> TensorDict:
        found = input_of(self.model, td, name if self.noise is None else None)
        if self.noise is not None:
            value = td.get(self.noise[1])
            if value is None:
                raise BadKey(f"no entry {key_text(self.noise[1])} with the noise", fix="torch.randn_like(...) * scale")
            found.set(self.noise[1], value)
        return found

    def _sweep(self, calls: tuple[int, ...]) -> Sweep:
        if calls not in self._sweeps:
            self._sweeps[calls] = self._described(functools.reduce(operator.add, self._parts(calls)))
        return self._sweeps[calls]

    def _parts(self, calls: tuple[int, ...]) -> Iterator[Experiments]:
        for site, m in zip(self.sites, calls, strict=True):
            several = [self.split(called(site, call, m), Replace(entry_of(DONOR, site, call, m))) for call in range(m)]
            yield several[0] if m == 1 else together(*several)

    def _described(self, total: Experiments) -> Sweep:
        if self.noise is not None:
            total = product(each(self.noise[0], Add(self.noise[1])), total)
        return Sweep(self.model, total, outputs=list(self._outputs), chunk_size=self.chunk_size)

    def _written(self) -> list[NestedKey]:
        keys: list[NestedKey] = [as_key(join(SWEEP, key)) for key in self._outputs]
        return [*keys, self._effect] if self._effect else keys


def check_split(split: object) -> None:
    """Raise for what makes no experiments of a site and an edit."""
    if not callable(split):
        raise BadType("not a way to split sites", got=repr(split), needed="each, every, functools.partial(every, ...)")


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
        >>> from tdconcepts import Site
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        >>> patching = activation_patching(TensorDictModule(net, ["x"], ["y"]), [Site("0"), Site("2")], Target("y", 0))
        >>> clean, corrupt = torch.randn(5, 4), torch.randn(5, 4)
        >>> td = patching(TensorDict(clean=dict(x=clean), corrupt=dict(x=corrupt), batch_size=[5]))
        >>> torch.allclose(td["patching", "effect"], torch.ones(5, 2))  # each of these layers carries all
        True
    """
    return Patching(model, sites, target, split, runs_of(direction), None, chunk_size).checked()


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
        >>> from tdconcepts import Site
        >>> from tensordict.nn import TensorDictModule
        >>> layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Flatten(-2), torch.nn.Linear(18, 2)]
        >>> net = torch.nn.Sequential(*layers)
        >>> trace = causal_trace(TensorDictModule(net, ["x"], ["y"]), [Site("0"), Site("1")], Target("y", 0), at="x")
        >>> td = trace(TensorDict(x=torch.randn(5, 3, 4), noise=torch.randn(5, 3, 4), batch_size=[5]))
        >>> td["patching", "effect"].unflatten(-1, (2, -1)).shape
        torch.Size([5, 2, 3])
    """
    split = _Positions(positions)
    return Patching(model, sites, target, split, runs_of("denoise"), (at, noise), chunk_size).checked()


class _Positions:
    def __init__(self, positions: Sequence[int] | None) -> None:
        self.positions = positions

    def __call__(self, where: Where, edit: EditLike) -> Experiments:
        return every(where, edit, self.positions, dim=-2)


def called(site: Where, call: int, m: int) -> Where:
    """The site at one of its ``m`` calls."""
    if not isinstance(site, Site) or isinstance(site.call, int):
        return site
    return Site(site.path, site.side, site.index, None if m == 1 else call, site.leaf)
