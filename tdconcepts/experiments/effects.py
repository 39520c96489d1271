"""What each unit does: effects of ablations, and their first-order estimate for all units at once."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, set_skip_existing
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.experiments.patching import Split, check_split
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
from tdconcepts.experiments.table import Where, every
from tdconcepts.hooks import Ablate, Pullback, Replace, Target, check_module, check_td, dispatch_rows
from tdconcepts.hooks.batching import expand
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import SWEEP, as_key, join, key_text

__all__ = ["AblationEffects", "AttributionPatching", "ablation_effects", "attribution_patching"]

EFFECT = ("ablation", "effect")


class AblationEffects(TensorDictModuleBase):
    r"""How the target changes with each ablation; see :func:`ablation_effects`."""

    def __init__(
        self,
        model: TensorDictModuleBase,
        sites: Where | list[Where],
        target: Target,
        edit: EditLike,
        split: Split,
        generator: torch.Generator | None,
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.model, self.target, self.generator = check_module(model, "model"), target, generator
        check_target(model, target)
        self.sites = concrete(model, sites)
        self.resample = isinstance(generator, torch.Generator)
        if not self.resample and generator is not None:
            raise BadType("not a generator", got=repr(generator), needed="a torch.Generator")
        check_split(split)
        parts = [split(site, Replace(entry_of(DONOR, site)) if self.resample else edit) for site in self.sites]
        experiments = parts[0]
        for part in parts[1:]:
            experiments = experiments + part
        self.sweep = Sweep(model, experiments, outputs=list[Where](target.goals), chunk_size=chunk_size)
        read = [key for key in self.sweep.in_keys if join(key)[0] != DONOR]
        self.in_keys = list(dict.fromkeys([*read, *target.in_keys]))
        self.out_keys = [EFFECT]

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the model as it is, and each ablation."""
        check_td(tensordict)
        lead, target = tensordict.batch_dims, self.target
        with torch.no_grad():
            run, out = self._prepared(tensordict)
            swept = self.sweep(run)[SWEEP]
            held = target.hold(out.get(target.of), lead) if target.moves else None
            y = measured(target, out, tensordict, lead, held).unsqueeze(lead)
            y_n = measured(target, swept, tensordict, lead, held, experiments=True)
        return tensordict.set(EFFECT, y_n - y)

    def names(self, tensordict: TensorDictBase) -> tuple[str, ...]:
        """What each experiment ablates, in their order on a batch like this one."""
        with torch.no_grad():
            return self.sweep.names(self._prepared(tensordict)[0])

    def _prepared(self, td: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """The batch with what is resampled in it, and what the model makes of it."""
        run, lead = td.select(*self.in_keys, strict=False), td.batch_dims
        taken, out = donors(self.model, run, self.sites if self.resample else [])
        shuffled = {site: [self._shuffled(value, lead) for value in values] for site, values in taken.items()}
        place_all(run, DONOR, shuffled, once=True)
        return run, out

    def _shuffled(self, value: Tensor, lead: int) -> Tensor:
        if not lead:
            raise BadValue("one row has no others to resample from", needed="a batch", fix="td.unsqueeze(0)")
        generator = self.generator
        rows = value.flatten(0, lead - 1)
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(rows.shape[0], generator=generator, device=device).to(value.device)
        return rows[order].view(value.shape)


class AttributionPatching(TensorDictModuleBase):
    r"""The first-order estimate of activation patching; see :func:`attribution_patching`."""

    def __init__(
        self, model: TensorDictModuleBase, sites: Where | list[Where], target: Target, direction: str, n_steps: int
    ) -> None:
        super().__init__()
        self.model, self.target, self.n_steps = check_module(model, "model"), target, n_steps
        self._runs = runs_of(direction)
        if type(n_steps) is not int or n_steps < 1:
            raise BadValue("not a number of steps", got=repr(n_steps), needed="1 or more")
        check_target(model, target)
        self.sites = concrete(model, sites)
        self._pull = Pullback(model, target, list(self.sites))
        self._read = [as_key(key) for key in model.in_keys]
        inputs = [as_key(join(name, key)) for key in self._read for name in ("clean", "corrupt")]
        self.in_keys = list(dict.fromkeys([*inputs, *target.in_keys]))
        self._written = [as_key(join(PATCHING, name)) for name in self._pull.names]
        self.out_keys = list(self._written)

    @dispatch_rows
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Two forwards and one backward."""
        check_td(tensordict)
        run, donor = (self._input(tensordict, name) for name in self._runs)
        batch, lead = tensordict.batch_size, tensordict.batch_dims
        with torch.no_grad():
            taken, donor_out = donors(self.model, donor, self.sites)
            held = None
            if self.target.moves:
                clean = donor_out if self._runs[1] == "clean" else self.model(run.copy())
                held = self.target.hold(clean.get(self.target.of), lead)
        path = self._path(run, donor) if self.n_steps > 1 else run
        n = self.n_steps
        several = None if held is None else held.expand(n, *batch).reshape(path.batch_size)
        pulled = self._pull(path, held=several, snapshot=True)
        for key, values, point, gradient in zip(
            self._written, taken.values(), pulled.points, pulled.gradients, strict=True
        ):
            if n > 1:
                gradient = gradient.reshape(n, *batch, *gradient.shape[max(1, lead) :]).mean(0)
                point = point.reshape(n, *batch, *point.shape[max(1, lead) :])[0]
            moved = values[0].to(point.dtype) - point
            extra = gradient.ndim - moved.ndim
            tensordict.set(key, (moved.unsqueeze(lead) if extra else moved) * gradient)
        return tensordict

    def _path(self, run: TensorDictBase, donor: TensorDictBase) -> TensorDict:
        """Points on the way from the run's inputs to the donor's, the run's own first."""
        many = expand(run, self.n_steps, list(run.keys(True, True)))
        for key in self._read:
            start, end = run.get(key), donor.get(key)
            if not start.is_floating_point():
                raise BadType(
                    f"there is no way between two values of {key_text(key)}",
                    got=str(start.dtype),
                    needed="floating-point inputs",
                    fix="n_steps=1, or a model that reads embeddings",
                )
            share = torch.arange(self.n_steps, device=start.device, dtype=start.dtype) / self.n_steps
            points = start + share.view(-1, *[1] * start.ndim) * (end - start)
            many.set(key, points.reshape(*many.batch_size, *start.shape[run.batch_dims :]))
        return many

    def _input(self, td: TensorDictBase, name: str) -> TensorDict:
        found = input_of(self.model, td, name)
        for key in self.target.in_keys:
            if key not in self._read:
                found.set(key, td.get(key))
        return found


def ablation_effects(
    model: TensorDictModuleBase,
    sites: Where | list[Where],
    target: Target,
    edit: EditLike | None = None,
    *,
    split: Split = every,
    resample: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> AblationEffects:
    r"""What the target loses or gains without each unit: :math:`\mathrm{effect}_n = y(\mathrm{do}_n) - y`.

    | reads | writes |
    |---|---|
    | the model's ``in_keys``, what the edit and the target read | ``("ablation", "effect")`` ``[*B, N]`` |

    With several targets ``[*B, N, T]``.

    Args:
        model: a TensorDictModule.
        sites: sites and entries, one or a list, globs too.
        target: the number y; ``"argmax"`` is chosen in the model as it is, for all.
        edit: what takes the place of a unit: ``Ablate()``, zero (default); ``Ablate(to="mean")``; ``Ablate(to=key)``.
        split: how a site falls into experiments: ``every`` unit (default), ``each`` site as a whole,
            ``functools.partial(every, groups=12)`` for heads, ``functools.partial(every, dim=-3)`` for channels.
        resample: a generator: the unit takes the value that it has in another row, drawn at random; not with ``edit``.
        chunk_size: how many rows may be in flight.

    Raises:
        BadKey: a site or an entry that does not exist. BadValue: ``edit`` and ``resample``; one row to resample from.

    Source: zero, mean and resample ablation as in Chan et al. 2022 (causal scrubbing), Wang et al. 2023.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Linear(3, 1, bias=False), ["x"], ["y"])
        >>> effects = ablation_effects(net, "x", Target("y"))
        >>> td = effects(TensorDict(x=torch.randn(5, 3), batch_size=[5]))
        >>> torch.allclose(td["ablation", "effect"], -td["x"] * net.module.weight, atol=1e-6)
        True
    """
    if edit is not None and resample is not None:
        raise BadValue("a unit takes one value", got="edit= and resample=", needed="one of them")
    return AblationEffects(model, sites, target, Ablate() if edit is None else edit, split, resample, chunk_size)


def attribution_patching(
    model: TensorDictModuleBase,
    sites: Where | list[Where],
    target: Target,
    *,
    direction: str = "denoise",
    n_steps: int = 1,
) -> AttributionPatching:
    r"""Activation patching of every unit at every site, to first order: two forwards and one backward.

    .. math:: (a^{\mathrm{donor}} - a^{\mathrm{run}}) \cdot \frac{1}{m} \sum_{k=0}^{m-1}
              \left.\frac{\partial y}{\partial a}\right|_{x + \frac{k}{m} (x^{\mathrm{donor}} - x)}

    The change of y that :func:`activation_patching` would see, not divided by the difference of the runs. A sum over
    features is the estimate for a position, over everything that for a site. With ``n_steps=1`` it is attribution
    patching, with more EAP-IG, whose points go through the model as one batch.

    | reads | writes |
    |---|---|
    | ``("clean", *k)``, ``("corrupt", *k)`` | ``("patching", *site)``, the shape of the activation |
    | what the target reads | with several targets ``[*B, T, ...]`` |

    Args:
        model: a TensorDictModule.
        sites: sites and entries, one or a list, globs too.
        target: the number y.
        direction: as for :func:`activation_patching`.
        n_steps: points on the way between the inputs.

    Raises:
        BadKey: a site or an entry that does not exist. BadType: inputs that are no floating-point numbers, for
        ``n_steps`` above 1. BadValue: a module that runs several times, without ``call=``.

    Source: Nanda 2023, Attribution Patching; Hanna et al. 2024, eq. 3 (EAP-IG).

    Examples:
        >>> from tdconcepts import Site
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)), ["x"], ["y"])
        >>> patching = attribution_patching(net, Site("0"), Target("y"))
        >>> clean, corrupt = torch.randn(5, 3), torch.randn(5, 3)
        >>> td = patching(TensorDict(clean=dict(x=clean), corrupt=dict(x=corrupt), batch_size=[5]))
        >>> change = net.module(clean) - net.module(corrupt)  # it is exact for a linear model
        >>> torch.allclose(td["patching", "0"].sum(-1, keepdim=True), change, atol=1e-6)
        True
    """
    return AttributionPatching(model, sites, target, direction, n_steps)
