"""Is a probe good: scores on groups that were held out, next to a control task."""

from __future__ import annotations

import dataclasses

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks.calling import missing_entries
from tdconcepts.hooks.drawing import Source
from tdconcepts.keys import NestedKey, as_key, key_text
from tdconcepts.representations.fitting import Fitted, Probe
from tdconcepts.representations.reading import Data, Reader, Rows, Stream, batches

__all__ = ["ProbeScores", "cross_validate", "score"]


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeScores:
    """What a cross-validation found. Each field is a TensorDict with the probe's entries as its keys.

    Args:
        score: :math:`R^2`, or the share of right classes, on held-out rows: ``[]``, or ``[K]`` for K labels.
        folds: the same, fold by fold: ``[folds]`` or ``[folds, K]``.
        control: the score of the same probe on the control task, or None.
        selectivity: ``score - control``, or None.
        rows: how many rows counted.

    Examples:
        >>> from tdconcepts.representations import LinearProbe
        >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        >>> scores = cross_validate(LinearProbe("x", "y"), TensorDict(x=x, y=x[:, 0], batch_size=[60]), folds=3)
        >>> scores.score["x"] > 0.99, scores.folds["x"].shape, scores.control is None
        (tensor(True), torch.Size([3]), True)
    """

    score: TensorDictBase
    folds: TensorDictBase
    control: TensorDictBase | None
    selectivity: TensorDictBase | None
    rows: int

    def __repr__(self) -> str:
        lines = []
        for key in self.score.keys(True, True):
            text = f"{key_text(key)}: {_text(self.score.get(key))}"
            if self.control is not None:
                text += f", control {_text(self.control.get(key))}"
            lines.append(text)
        return f"ProbeScores({'; '.join(lines)}; {self.rows} rows)"


def cross_validate(
    probe: Probe,
    data: Data,
    *,
    folds: int = 5,
    groups: NestedKey | int | None = None,
    control: NestedKey | None = None,
    mask: NestedKey | None = None,
    generator: torch.Generator | None = None,
) -> ProbeScores:
    r"""Score a probe on rows that it was not fitted to; the probe itself stays as it is.

    The groups are dealt into folds, and each fold is predicted by a probe fitted to the others, so that no group (an
    episode, a speaker, an image) is on both sides: neighbouring steps are near copies, and held-out *steps* would
    flatter. :math:`R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y_\mathrm{train})^2`, and accuracies, are taken over
    all held-out rows together.

    A control task gives each *type* of row a label at random, drawn from the labels that there are; a probe that is as
    good at it reads its own memory, not the representation.

    Args:
        probe: a probe of any kind.
        data: a TensorDict ``[*B]``, or an iterable of them.
        folds: how many, 2 or more; never more than there are groups.
        groups: an integer entry ``[*B]`` that names each row's group; or a batch dim whose slices are the groups (0 for
            ``[episodes, steps]``); default: each row is its own, which is right for independent rows only.
        control: an integer entry ``[*B]`` with each row's type (a word, a position, a state), for the control task.
        mask: an entry ``[*B]``, True where a row counts.
        generator: deals the groups and draws the control labels; default: groups in order, torch's own draws.

    Raises:
        BadValue: fewer than two folds or groups, a label that is constant, labels that the probe can't learn.

    Source: Hewitt and Liang, *Designing and interpreting probes with control tasks*, 2019 (selectivity); McGrath et
    al., *Acquisition of chess knowledge in AlphaZero*, 2022 (held-out games).

    Examples:
        >>> from tdconcepts.representations import LinearProbe
        >>> x = torch.randn(6, 20, 3, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(x=x, y=x[..., 0], batch_size=[6, 20])
        >>> cross_validate(LinearProbe("x", "y", ridge=1e-3), td, groups=0, folds=3)
        ProbeScores('x': 1.000; 120 rows)
    """
    _check_probe(probe)
    if type(folds) is not int or folds < 2:
        raise BadValue("not a number of folds", got=repr(folds), needed="2 or more")
    reader = Reader(probe.keys_read, probe.label, mask)
    table = _table(reader, data, groups, control, probe)
    fold = _dealt(table.group, folds, generator)
    folds = int(fold.max()) + 1
    y = table.y
    if table.type is not None:
        y = torch.cat([y, _control(y, table.type, generator)], -1)
    spread = _spread(y, fold, folds, probe)

    def deal(rows: Rows) -> Rows:
        some = slice(rows.start, rows.start + len(rows.y))
        return Rows(rows.x, y[some].to(rows.y), rows.start, fold[some].to(rows.y.device))

    stream = Stream(reader, data, "a cross-validation", probe.check_labels).changed(deal)
    sets = probe.solve(stream, folds)
    missed = _missed(probe, stream, sets)
    total, each = missed.sum(0), torch.bincount(fold, minlength=folds).to(y)
    if probe.classifies:
        found = 1.0 - total / len(y)
        by_fold = 1.0 - missed / each.to(missed.device)[:, None, None]
    else:
        found = 1.0 - total / spread.sum(0)
        by_fold = 1.0 - missed / spread.unsqueeze(1)
    k = table.y.shape[-1]
    one = not reader.vector

    def entries(values: Tensor, dim: int) -> TensorDict:
        """``values`` with the entry at ``dim`` and the label last."""
        td = TensorDict({}, batch_size=[])
        for i, key in enumerate(probe.keys):
            value = values.select(dim, i)
            td.set(key, value.squeeze(-1) if one else value)
        return td

    scores, held = entries(found[:, :k], 0), entries(by_fold[..., :k], 1)
    if table.type is None:
        return ProbeScores(scores, held, None, None, len(y))
    return ProbeScores(scores, held, entries(found[:, k:], 0), entries(found[:, :k] - found[:, k:], 0), len(y))


def score(probe: Probe, data: Data, *, mask: NestedKey | None = None) -> TensorDict:
    """How well a *fitted* probe does on other data: :math:`R^2` (about the label's mean there), or the accuracy.

    Args:
        probe: a fitted probe.
        data: a TensorDict, or an iterable of them.
        mask: an entry ``[*B]``, True where a row counts.

    Returns:
        A TensorDict with the probe's entries as its keys: ``[]``, or ``[K]`` for K labels.

    Raises:
        BadValue: the probe is not fitted, or the label is constant (where it is a number).

    Examples:
        >>> from tdconcepts.representations import LinearProbe
        >>> td = TensorDict(x=torch.eye(4), y=torch.arange(4.0), batch_size=[4])
        >>> round(float(score(LinearProbe("x", "y", ridge=1e-9).fit(td), td)["x"]), 4)
        1.0
    """
    _check_probe(probe)
    reader = Reader(probe.keys_read, probe.label, mask)
    table = _table(reader, data, None, None, probe)
    lead = 2 if len(probe.sources(0)) > 1 else 1

    def widened(one: Fitted) -> Fitted:
        return one if reader.vector else Fitted(one.weight.unsqueeze(lead), one.bias.unsqueeze(0), one.mean)

    sets = [[widened(probe.of(key)) for key in probe.keys]]
    stream = Stream(reader, data, "a score", probe.check_labels)
    missed = _missed(probe, stream, sets)[0]
    if probe.classifies:
        found = 1.0 - missed / len(table.y)
    else:
        spread = (table.y - table.y.mean(0)).square().sum(0)
        _varies(spread)
        found = 1.0 - missed / spread
    td = TensorDict({}, batch_size=[])
    for i, key in enumerate(probe.keys):
        td.set(key, found[i] if reader.vector else found[i].squeeze(-1))
    return td


def _check_probe(probe: object) -> None:
    if not isinstance(probe, Probe):
        raise BadType("not a probe", got=type(probe).__name__, needed="a probe", fix='LinearProbe("x", "label")')


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """What one pass over the data collects: labels, groups and types of the rows that count."""

    y: Tensor
    group: Tensor
    type: Tensor | None


def _table(
    reader: Reader, data: Data, groups: NestedKey | int | None, control: NestedKey | None, probe: Probe
) -> _Table:
    labels, names, types = [], [], []
    seen = 0
    for td in batches(data, "a score"):
        labels.append(reader.labels(td))
        probe.check_labels(labels[-1])
        if groups is None:
            ids = torch.arange(td.numel()) + seen
            seen += td.numel()
        elif type(groups) is int:
            if not -td.batch_dims <= groups < td.batch_dims:
                got = f"groups={groups} of batch size {list(td.batch_size)}"
                raise BadValue("there is no such batch dim", got=got, needed=f"a dim below {td.batch_dims}")
            size = td.batch_size[groups]
            shape = [size if dim == groups % td.batch_dims else 1 for dim in range(td.batch_dims)]
            ids = (torch.arange(size) + seen).view(shape).expand(td.batch_size).reshape(-1)
            seen += size
        else:
            ids = _integers(td, as_key(groups))
        names.append(reader.counted(ids.to(labels[-1].device), td))
        if control is not None:
            types.append(reader.counted(_integers(td, as_key(control)).to(labels[-1].device), td))
    y = torch.cat(labels)
    if not len(y):
        raise BadValue("no rows", got="none that count", needed="one or more")
    return _Table(y, torch.cat(names), torch.cat(types) if types else None)


def _integers(td: TensorDictBase, key: NestedKey) -> Tensor:
    value = td.get(key)
    if value is None:
        raise missing_entries([key], td)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.numel() != td.numel():
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadValue(f"{key_text(key)} names no groups", got=got, needed=f"integers, {list(td.batch_size)}")
    return value.reshape(-1)


def _dealt(group: Tensor, folds: int, generator: torch.Generator | None) -> Tensor:
    """The fold of each row: groups dealt out in turn, in order or as the generator shuffles them."""
    names, place = group.unique(return_inverse=True)
    if len(names) < 2:
        raise BadValue("one group can't be held out from itself", got=f"{len(names)} groups", needed="2 or more")
    turn = torch.arange(len(names))
    if generator is not None:
        turn = Source(generator).permutations(1, len(names))[0].cpu()
    return (turn % min(folds, len(names))).to(group.device)[place]


def _control(y: Tensor, types: Tensor, generator: torch.Generator | None) -> Tensor:
    """For each type the label of a row at random, ``[N, K]``."""
    names, place = types.unique(return_inverse=True)
    drawn = Source(generator).uniform(len(names), y.shape[-1]).to(y.device)
    rows = (drawn.double() * len(y)).long().clamp(max=len(y) - 1)
    return y.gather(0, rows)[place]


def _spread(y: Tensor, fold: Tensor, folds: int, probe: Probe) -> Tensor:
    """The squared distance from the mean of the other folds, summed over each fold: ``[folds, K]``."""
    onehot = torch.nn.functional.one_hot(fold, folds).to(y)
    count, total = onehot.sum(0), onehot.T @ y
    centre = (y.sum(0) - total) / (len(y) - count).unsqueeze(-1)
    spread = onehot.T @ (y - centre[fold]).square()
    if not probe.classifies:
        _varies(spread.sum(0))
    return spread


def _varies(spread: Tensor) -> None:
    if not bool((spread > 0).all()):
        labels = (~(spread > 0)).nonzero().flatten().tolist()
        raise BadValue("the label is constant", got=f"label {labels} has one value", needed="a label that varies")


def _missed(probe: Probe, stream: Stream, sets: list[list[Fitted]]) -> Tensor:
    """For each fold, entry and label the squared error, or the number of wrong classes: ``[folds, S, K]``."""
    found: Tensor | None = None
    for rows in stream():
        assigned = torch.zeros_like(rows.y[:, 0]) if rows.fold is None else rows.fold
        here = [rows.only(assigned == fold) for fold in range(len(sets))]
        part = torch.stack(
            [
                torch.stack([_errors(probe, some, i, one) for i, one in enumerate(fitted)])
                for some, fitted in zip(here, sets, strict=True)
            ]
        )
        found = part if found is None else found + part
    return found  # type: ignore[return-value]


def _errors(probe: Probe, rows: Rows, i: int, one: Fitted) -> Tensor:
    at = [probe.keys_read.index(key) for key in probe.sources(i)]
    z = probe.read([rows.x[j] for j in at], Fitted(*(tensor.to(rows.y) for tensor in one)))
    if not probe.classifies:
        return (rows.y - z).square().sum(0)
    chosen = z > 0 if z.ndim == rows.y.ndim else z.argmax(-1)
    return (chosen.to(rows.y) != rows.y).sum(0).to(rows.y)


def _text(value: Tensor) -> str:
    if not value.ndim:
        return f"{float(value):.3f}"
    return f"{float(value.mean()):.3f} on average over {value.numel()}"
