"""Two runs of one model: what one of them wrote, and how it is brought into the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadKey, BadType, BadValue
from tdconcepts.experiments.plans import Steps
from tdconcepts.experiments.table import Where, each, where_text
from tdconcepts.hooks import Hooked, Replace, Site, Target, capture, locate
from tdconcepts.keys import NestedKey, as_key, join, key_text

__all__ = ["check_target", "concrete", "donors", "entry_of", "input_of", "measured", "place_all", "runs_of"]

DONOR, PATCHING = "activation of the donor", "patching"


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
) -> tuple[dict[Where, list[Tensor]], TensorDictBase]:
    """One forward: the activation at each site, at each of its calls, and what the model wrote."""
    inner = {site: _every_call(site) for site in sites if isinstance(site, Site)}
    found: dict[Where, list[Tensor]] = {}
    if not inner:
        out = Hooked(model, Steps([]))(td.copy())
    else:
        with capture(model, *inner.values(), clone=True) as m:
            out = m(td.copy())
    for site in sites:
        if isinstance(site, Site):
            value = out["activation", str(inner[site])]
            found[site] = list(value.unbind(td.batch_dims)) if site.call in (None, "all") else [value]
        else:
            found[site] = [out.get(site)]
    return found, out


def input_of(model: TensorDictModuleBase, td: TensorDictBase, name: str | None = None) -> TensorDict:
    """What the model reads: the entries below ``name``, or those of the TensorDict itself.

    Raises:
        BadKey: one of them is missing.
    """
    found = TensorDict({}, batch_size=td.batch_size, device=td.device)
    for key in map(as_key, model.in_keys):
        source = key if name is None else as_key(join(name, key))
        value = td.get(source)
        if value is None:
            raise BadKey(f"no entry {key_text(source)} to run on", got=f"entries {list(td.keys(True, True))}")
        found.set(key, value)
    return found


def runs_of(direction: str) -> tuple[str, str]:
    """The run that is changed and its donor."""
    if direction not in ("denoise", "noise"):
        raise BadValue("no such direction", got=repr(direction), needed='"denoise" or "noise"')
    return ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")


def check_target(model: TensorDictModuleBase, target: object) -> None:
    """Raise for what is no target of an entry of the model."""
    if not isinstance(target, Target):
        raise BadType("not a Target", got=repr(target), needed='Target("logits", 3)')
    if isinstance(target.of, Site) or target.of not in model.out_keys:
        raise BadKey("the target is no entry that the model writes", got=repr(target), needed=f"{model.out_keys}")
    target.check_goals(model.out_keys)


def measured(
    target: Target,
    written: Any,
    td: TensorDictBase,
    lead: int,
    held: Tensor | None,
    experiments: bool = False,
) -> Tensor:
    """The target's numbers of what was written, ``[*B, ...]``, or ``[*B, N, ...]`` where there are experiments.

    Args:
        target: what is measured.
        written: the entries that the model wrote, the target's ``goals`` among them; a TensorDict or a dict.
        td: what else the target reads.
        lead: how many dims are the batch.
        held: what the target's ``"argmax"`` chose.
        experiments: whether there is one dim of them after the batch.
    """
    value = written.get(target.of)
    rows = td.copy() if not experiments else TensorDict({}, batch_size=value.shape[: lead + 1], device=td.device)
    if experiments:
        held = None if held is None else held.unsqueeze(lead).expand(rows.batch_size)
        for key in target.in_keys:
            entry = td.get(key)
            if isinstance(entry, Tensor):
                rows.set(key, entry.unsqueeze(lead).expand(*rows.batch_size, *entry.shape[lead:]))
    for key in target.goals:
        rows.set(key, written.get(key))
    return target.read(value, rows, rows.batch_dims, held)[0]


def _every_call(site: Site) -> Site:
    return site if site.call is not None else Site(site.path, site.side, site.index, "all", site.leaf)


def entry_of(group: str, site: Where, call: int = 0, m: int = 1) -> NestedKey:
    """The entry that holds an activation of another run."""
    return (group, where_text(site) if m == 1 else f"{where_text(site)}@{call}")


def place_all(run: TensorDictBase, group: str, taken: dict[Where, list[Tensor]], *, once: bool = False) -> None:
    """Write the activations of another run into this one's entries; ``once`` refuses modules that ran several times."""
    for site, values in taken.items():
        if once and len(values) > 1:
            raise BadValue(f"the module at {where_text(site)} runs several times", needed="a site that says which call")
        for call, value in enumerate(values):
            run.set(entry_of(group, site, call, len(values)), value)
