"""Path patching: what flows from senders to receivers, and on to the output."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdconcepts.errors import BadValue
from tdconcepts.experiments.patching import Patching, Split
from tdconcepts.experiments.plans import Steps
from tdconcepts.experiments.runs import concrete, donors, entry_of, place_all, runs_of
from tdconcepts.experiments.sweep import Sweep
from tdconcepts.experiments.table import Experiments, Where, each, product, together, where_text
from tdconcepts.hooks import Hooked, Patch, Replace, Target, locate
from tdconcepts.hooks.batching import expand, gather, spread
from tdconcepts.hooks.plans import Run, Step

__all__ = ["PathPatching", "Paths", "path_patching"]

HELD, RECEIVED = "activation of the run", "activation that is received"


class Paths(NamedTuple):
    """The ends of the paths, and what lies beside them: each a site or an entry, or a list of these."""

    senders: Where | list[Where]
    receivers: Where | list[Where]
    frozen: Where | list[Where]


class PathPatching(Patching):
    """Patch receivers with what senders alone make of them; see :func:`path_patching`."""

    def __init__(
        self,
        model: TensorDictModuleBase,
        paths: Paths,
        target: Target | None,
        split: Split,
        runs: tuple[str, str],
        chunk_size: int | None,
    ) -> None:
        super().__init__(model, paths.senders, target, split, runs, None, chunk_size)
        self.receivers = concrete(model, paths.receivers)
        beside = [] if paths.frozen == [] else concrete(model, paths.frozen)
        self.frozen = [site for site in beside if site not in self.receivers]
        for site in self.receivers:
            if site in self.sites:
                raise BadValue("a sender is a receiver too", got=repr(site), needed="paths between two places")
        edits = {site: Replace(entry_of(RECEIVED, site)) for site in self.receivers}
        self._received = Hooked(model, Patch(edits))
        self._in_order = False

    def _prepared(self, td: TensorDictBase) -> tuple[TensorDict, TensorDictBase, Sweep]:
        run, donor_out, sweep = super()._prepared(td)
        if not self._in_order:
            self._check_order(run)
        taken, _ = donors(self.model, self._input(td, self._runs[0]), self.frozen)
        place_all(run, HELD, taken, once=True)
        return run, donor_out, sweep

    def _check_order(self, run: TensorDictBase) -> None:
        """Raise for a sender that runs after all receivers: no path leads back."""
        order: list[Where] = []
        watched = [where for where in (*self.sites, *self.receivers) if where not in self.model.in_keys]
        steps = [
            Step(place, _Seen(where, order), every=True) for where in watched for place in locate(self.model, where)
        ]
        Hooked(self.model, Steps(steps))(run.copy())
        last = max(order.index(where) for where in self.receivers)
        late = [where_text(where) for where in self.sites if where in order and order.index(where) > last]
        if late:
            raise BadValue(
                "nothing flows from a sender to the receivers",
                got=f"{late} after {[where_text(where) for where in self.receivers]}",
                needed="senders that run before a receiver",
            )
        self._in_order = True

    def _described(self, total: Experiments) -> Sweep:
        beside = [each(site, Replace(entry_of(HELD, site))) for site in self.frozen]
        experiments = product(together(*beside), total) if beside else total
        return Sweep(self.model, experiments, outputs=list(self.receivers), chunk_size=self.chunk_size)

    def _beside(self) -> list[str]:
        return [where_text(site) for site in self.frozen]

    def _swept(self, sweep: Sweep, run: TensorDict) -> list[Tensor]:
        lead, found = run.batch_dims, sweep(run.copy())
        values = [found.get(key) for key in sweep.out_keys]
        n = values[0].shape[lead]
        step = n if self.chunk_size is None else max(1, self.chunk_size // max(1, run.numel()))
        parts = [
            self._passed_on([v[i : i + step] for v in (v.movedim(lead, 0) for v in values)], run)
            for i in range(0, n, step)
        ]
        return [torch.cat(several).movedim(0, lead) for several in zip(*parts, strict=True)]

    def _passed_on(self, values: list[Tensor], run: TensorDict) -> list[Tensor]:
        """The outputs ``[n, *B, ...]`` where the receivers have the values ``[n, *B, ...]``."""
        n, batch = len(values[0]), run.batch_size
        many = expand(run, n, self.model.in_keys)
        for site, value in zip(self.receivers, values, strict=True):
            many.set(entry_of(RECEIVED, site), spread(value, n, batch))
        out = self._received(many)
        return [gather(out.get(key), n, batch) for key in self._outputs]


class _Seen:
    def __init__(self, where: Where, order: list[Where]) -> None:
        self.where, self.order = where, order

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        self.order.append(self.where)
        return value


def path_patching(
    model: TensorDictModuleBase,
    senders: Where | list[Where],
    receivers: Where | list[Where],
    target: Target | None = None,
    *,
    frozen: Where | list[Where] | None = None,
    split: Split = each,
    direction: Literal["denoise", "noise"] = "denoise",
    chunk_size: int | None = None,
) -> PathPatching:
    r"""Which senders act on the output *through the receivers*, by the ways that nothing frozen lies on?

    Three passes: (1) the donor's activations at the senders, and the run's own at all frozen sites; (2) the run, for
    each experiment with one sender from the donor and everything frozen as it was: what comes to the receivers is kept;
    (3) the run with the receivers at those values, all else computed as usual.

    .. math:: r_n = r(\mathrm{run} \mid a_n \leftarrow a_n^{\mathrm{donor}}, F \leftarrow F^{\mathrm{run}}), \qquad
              \mathrm{effect}_n = \frac{y(\mathrm{run} \mid r \leftarrow r_n) - y(\mathrm{run})}
                                        {y(\mathrm{donor}) - y(\mathrm{run})}

    | reads | writes |
    |---|---|
    | ``("clean", *k)``, ``("corrupt", *k)`` for each input k of the model | ``("sweep", *key)`` ``[*B, N, ...]`` |
    | what the target reads | ``("patching", "effect")`` ``[*B, N]``, ``[*B, N, T]`` with several targets |

    Args:
        model: a TensorDictModule.
        senders: where the paths begin: sites and entries, one or a list, globs too.
        receivers: where they end, all at once.
        target: the number y, as for :func:`activation_patching`.
        frozen: what the paths don't pass through, as the run has it; default: the senders (the one that is patched
            excepted). ``["blocks.*.attn", "blocks.*.mlp"]`` leaves the residual stream alone: direct paths.
        split: how a sender falls into experiments: ``each`` (default), ``functools.partial(every, groups=12)`` for
            heads.
        direction: ``"denoise"``: clean senders in the corrupt run; ``"noise"``: corrupt ones in the clean run.
        chunk_size: how many rows may be in flight.

    Raises:
        BadKey: a site or an entry that does not exist. BadValue: a sender that is a receiver, or runs after all of
        them; a receiver or something frozen that runs several times, without ``call=``.

    Source: Wang et al. 2023 (IOI), section 3.1 and appendix B; Goldowsky-Dill et al. 2023.

    Examples:
        >>> from tdconcepts import Site
        >>> from tensordict.nn import TensorDictModule
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
        >>> model = TensorDictModule(net, ["x"], ["y"])
        >>> clean, corrupt = torch.randn(5, 4), torch.randn(5, 4)
        >>> td = TensorDict(clean=dict(x=clean), corrupt=dict(x=corrupt), batch_size=[5])
        >>> through = path_patching(model, Site("0"), Site("2"), Target("y", 0))
        >>> torch.allclose(through(td.copy())["patching", "effect"], torch.ones(5, 1), atol=1e-4)
        True
        >>> around = path_patching(model, Site("0"), Site("2"), Target("y", 0), frozen=Site("1"))
        >>> torch.allclose(around(td.copy())["patching", "effect"], torch.zeros(5, 1), atol=1e-4)  # 1 lies on the way
        True
    """
    paths = Paths(senders, receivers, senders if frozen is None else frozen)
    return PathPatching(model, paths, target, split, runs_of(direction), chunk_size).checked()
