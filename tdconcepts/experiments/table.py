"""Which experiments: descriptions that add and multiply, and the moves that they come to on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdconcepts.errors import BadType, BadValue
from tdconcepts.hooks import Site
from tdconcepts.hooks.edits import Edit
from tdconcepts.hooks.programs import EditLike
from tdconcepts.keys import NestedKey, as_key, key_text

__all__ = ["Experiments", "Shapes", "Table", "each", "every", "grid", "product", "together"]

Where: TypeAlias = NestedKey | Site
Shapes: TypeAlias = Callable[[Where], list[tuple[Where, torch.Size]]]
"""From a site (a glob, too) to the sites of one model and the shapes of their rows."""


class Plain(NamedTuple):
    """One kind of change at one place, in ``m`` experiments: edits, the spans of each dim that they hold in, names.

    ``edits``: one that all share, or ``m`` of them; ``spans``: for a dim (from the end) first and last + 1, ``[m, 2]``;
    ``members``: the numbers of the experiments, ``[m]``.
    """

    where: Where
    edits: tuple[EditLike, ...]
    spans: dict[int, Tensor]
    members: Tensor


class Table(NamedTuple):
    """``n`` experiments on one model: what is changed where, and what each is called."""

    n: int
    moves: tuple[Plain, ...]
    names: tuple[str, ...]


class Experiments:
    """A description of experiments: data, without a model in it. Two of them add with ``+``: first these, then those.

    Examples:
        >>> from tdconcepts.hooks import Ablate, Scale
        >>> every(Site("0"), Ablate()) + each("hidden", Scale(2.0))
        every([Site('0')], Ablate(units=None, to='zero', dim=-1)) + each(['hidden'], [Scale(factor=2.0)])
    """

    def __add__(self, other: Experiments) -> Experiments:
        return _Sum((self, check_experiments(other)))

    def resolve(self, shapes: Shapes) -> Table:
        """The table of the experiments on a model whose activations have these shapes."""
        raise NotImplementedError

    def wheres(self) -> list[Where]:
        """The sites and entries that are changed, globs as they are."""
        raise NotImplementedError

    def edits(self) -> list[EditLike]:
        """All the edits."""
        raise NotImplementedError


def every(
    where: Where | list[Where],
    edit: EditLike,
    units: Sequence[int] | None = None,
    *,
    dim: int = -1,
    groups: int | None = None,
) -> Experiments:
    r"""One experiment for each unit of a site: :math:`x'_j = \mathrm{edit}(x)_j` for ``j = unit``, else :math:`x_j`.

    The edit sees the whole activation (or the part that the site's ``index`` names), and takes effect in one unit.

    Args:
        where: a site, an entry, or a list of these (globs too): then first all units of the first, and so on.
        edit: as for :func:`~tdconcepts.hooks.patch`: ``Ablate()``, ``Scale(0.5)``, ``Replace("donor")``, a callable.
        units: positions along ``dim``; default: all of them.
        dim: the dim of the units, counted from the end: -1 (features), -2 (positions), -3 (channels of images).
        groups: the dim is cut into this many equal blocks, and a unit is a block: the heads of an attention layer, at
            ``Site("attn.out_proj", "input")``.

    Raises:
        BadValue: a dim that is not negative. At the call: units that don't exist, blocks that don't come out even.

    Examples:
        >>> from tdconcepts.hooks import Ablate
        >>> table = every(Site("0"), Ablate()).resolve(lambda where: [(where, torch.Size([3]))])
        >>> table.n, table.names
        (3, ('0[0]', '0[1]', '0[2]'))
    """
    if dim >= 0:
        raise BadValue("the dim of the units is counted from the end", got=f"dim={dim}", needed="-1, -2, ...")
    if groups is not None and (type(groups) is not int or groups < 1):
        raise BadValue("not a number of blocks", got=f"groups={groups!r}", needed="1 or more")
    return _Every(_wheres(where), checked_edit_like(edit), None if units is None else tuple(units), dim, groups)


def each(where: Where | list[Where], edit: EditLike | list[EditLike]) -> Experiments:
    """One experiment for each site and each edit, which changes the whole activation there.

    Args:
        where: a site, an entry, or a list of these (globs too).
        edit: an edit, or a list: then all of them at the first site, and so on.

    Examples:
        >>> from tdconcepts.hooks import Ablate
        >>> each(["hidden", Site("blocks.*")], Ablate())
        each(['hidden', Site('blocks.*')], [Ablate(units=None, to='zero', dim=-1)])
    """
    edits = tuple(map(checked_edit_like, edit if isinstance(edit, list) else [edit]))
    if not edits:
        raise BadValue("no edit", needed="one edit or more")
    return _Each(_wheres(where), edits)


def grid(sites: Where | list[Where], positions: Sequence[int] | None, edit: EditLike, *, dim: int = -2) -> Experiments:
    """One experiment for each site and each position (token, time step): ``every`` over the dim of the positions.

    Args:
        sites: sites or entries, globs too; the outer axis.
        positions: the inner axis; None for all that there are.
        edit: as for :func:`every`.
        dim: the dim of the positions, -2 by default: ``[..., positions, features]``.

    Examples:
        >>> from tdconcepts.hooks import Ablate
        >>> grid(Site("blocks.*"), [0, 1], Ablate()).wheres()
        [Site('blocks.*')]
    """
    return every(sites, edit, positions, dim=dim)


def product(*experiments: Experiments) -> Experiments:
    """Every combination: one experiment of each at the same time, the last varying fastest.

    Args:
        experiments: descriptions, one or more.

    Raises:
        BadValue: none given. BadType: what describes no experiments.

    Examples:
        >>> from tdconcepts.hooks import Ablate
        >>> shapes = lambda where: [(where, torch.Size([2]))]
        >>> product(every("a", Ablate()), every("b", Ablate())).resolve(shapes).names[1]
        "'a'[0] & 'b'[1]"
    """
    if not experiments:
        raise BadValue("nothing to multiply", needed="one description of experiments or more")
    return _Product(tuple(map(check_experiments, experiments)))


def together(*experiments: Experiments) -> Experiments:
    """The first of each at the same time, then the second of each, and so on: as many as one of them has.

    Args:
        experiments: descriptions of equally many experiments, one or more.

    Raises:
        BadValue: none given; at the call, other numbers of experiments. BadType: what describes no experiments.

    Examples:
        >>> from tdconcepts.hooks import Ablate
        >>> shapes = lambda where: [(where, torch.Size([2]))]
        >>> together(every("a", Ablate()), every("b", Ablate())).resolve(shapes).names
        ("'a'[0] & 'b'[0]", "'a'[1] & 'b'[1]")
    """
    if not experiments:
        raise BadValue("nothing to do together", needed="one description of experiments or more")
    return _Together(tuple(map(check_experiments, experiments)))


def check_experiments(given: object) -> Experiments:
    """``given`` if it describes experiments, else an error with the line to write."""
    if isinstance(given, Experiments):
        return given
    raise BadType(
        "not a description of experiments",
        got=repr(given),
        needed="every(...), each(...), grid(...), product(...), or a sum of these",
        fix='every(Site("blocks.3"), Ablate())',
    )


@dataclasses.dataclass(frozen=True)
class _Every(Experiments):
    where: tuple[Where, ...]
    edit: EditLike
    units: tuple[int, ...] | None
    dim: int
    groups: int | None

    def __repr__(self) -> str:
        options = [f", {list(self.units)}"] if self.units is not None else []
        options += [f", dim={self.dim}"] if self.dim != -1 else []
        options += [f", groups={self.groups}"] if self.groups else []
        return f"every({list(self.where)}, {self.edit!r}{''.join(options)})"

    def wheres(self) -> list[Where]:
        return list(self.where)

    def edits(self) -> list[EditLike]:
        return [self.edit]

    def resolve(self, shapes: Shapes) -> Table:
        moves, names, n = [], [], 0
        for where, shape in _found(self.where, shapes):
            blocks, width = self._blocks(where, shape)
            units = torch.tensor(blocks, dtype=torch.long)
            members = torch.arange(n, n + len(blocks))
            moves.append(Plain(where, (self.edit,), {self.dim: torch.stack([units, units + 1], 1) * width}, members))
            names += [f"{where_text(where)}[{', '.join([str(unit), *[':'] * (-1 - self.dim)])}]" for unit in blocks]
            n += len(blocks)
        return Table(n, tuple(moves), tuple(names))

    def _blocks(self, where: Where, shape: torch.Size) -> tuple[list[int], int]:
        if len(shape) < -self.dim:
            raise BadValue(
                f"{where_text(where)} has no dim {self.dim} in its rows",
                got=f"rows of shape {list(shape)}",
                needed="a dim",
            )
        size = shape[self.dim]
        if self.groups is not None and size % self.groups:
            raise BadValue(f"{where_text(where)} does not fall into {self.groups} equal blocks", got=f"{size} units")
        count = self.groups or size
        units = range(count) if self.units is None else self.units
        if not all(type(unit) is int and -count <= unit < count for unit in units):
            raise BadValue(
                "experiments name units that do not exist",
                got=f"{list(units)} at {where_text(where)}",
                needed=f"within [0, {count})",
            )
        return [unit % count for unit in units], size // count


@dataclasses.dataclass(frozen=True)
class _Each(Experiments):
    where: tuple[Where, ...]
    several: tuple[EditLike, ...]

    def __repr__(self) -> str:
        return f"each({list(self.where)}, {list(self.several)})"

    def wheres(self) -> list[Where]:
        return list(self.where)

    def edits(self) -> list[EditLike]:
        return list(self.several)

    def resolve(self, shapes: Shapes) -> Table:
        moves, names, m = [], [], len(self.several)
        for i, (where, _) in enumerate(_found(self.where, shapes)):
            moves.append(Plain(where, self.several, {}, torch.arange(i * m, (i + 1) * m)))
            names += [where_text(where) if m == 1 else f"{where_text(where)} #{j}" for j in range(m)]
        return Table(len(names), tuple(moves), tuple(names))


@dataclasses.dataclass(frozen=True)
class _Sum(Experiments):
    parts: tuple[Experiments, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def wheres(self) -> list[Where]:
        return [where for part in self.parts for where in part.wheres()]

    def edits(self) -> list[EditLike]:
        return [edit for part in self.parts for edit in part.edits()]

    def resolve(self, shapes: Shapes) -> Table:
        n = 0
        moves: list[Plain] = []
        names: list[str] = []
        for table in [part.resolve(shapes) for part in self.parts]:
            moves += [move._replace(members=move.members + n) for move in table.moves]
            names += table.names
            n += table.n
        return Table(n, tuple(moves), tuple(names))


class _Product(_Sum):
    def __repr__(self) -> str:
        return f"product({', '.join(map(repr, self.parts))})"

    def resolve(self, shapes: Shapes) -> Table:
        n, names = 1, [""]
        moves: list[Plain] = []
        for table in [part.resolve(shapes) for part in self.parts]:
            before = [_repeated(move, move.members[:, None] * table.n + torch.arange(table.n)) for move in moves]
            moves = before + [
                _repeated(move, move.members[:, None] + table.n * torch.arange(n)) for move in table.moves
            ]
            names = [f"{one} & {other}".removeprefix(" & ") for one in names for other in table.names]
            n *= table.n
        return Table(n, tuple(moves), tuple(names))


class _Together(_Sum):
    def __repr__(self) -> str:
        return f"together({', '.join(map(repr, self.parts))})"

    def resolve(self, shapes: Shapes) -> Table:
        tables = [part.resolve(shapes) for part in self.parts]
        if len({table.n for table in tables}) > 1:
            raise BadValue(
                "experiments together are as many of each", got=f"{[table.n for table in tables]}", needed="one number"
            )
        names = [" & ".join(several) for several in zip(*[table.names for table in tables], strict=True)]
        return Table(tables[0].n, tuple(move for table in tables for move in table.moves), tuple(names))


def _repeated(move: Plain, members: Tensor) -> Plain:
    k = members.shape[1]
    edits = tuple(edit for edit in move.edits for _ in range(k)) if len(move.edits) > 1 else move.edits
    return Plain(
        move.where, edits, {d: span.repeat_interleave(k, 0) for d, span in move.spans.items()}, members.reshape(-1)
    )


def _found(wheres: tuple[Where, ...], shapes: Shapes) -> Iterator[tuple[Where, torch.Size]]:
    for where in wheres:
        yield from shapes(where)


def _wheres(where: Where | list[Where]) -> tuple[Where, ...]:
    several = where if isinstance(where, list) else [where]
    if not several:
        raise BadValue("no site", needed="one site or entry, or more")
    return tuple(one if isinstance(one, Site) else as_key(one) for one in several)


def checked_edit_like(edit: Any) -> EditLike:
    """``edit`` if it is one, else an error."""
    if callable(edit) and not isinstance(edit, type):
        return edit
    raise BadType("not an edit", got=repr(edit), needed="Ablate(), Replace(...), or a callable (value, td) -> value")


def where_text(where: Where) -> str:
    """A site or an entry as experiments are named."""
    return str(where) if isinstance(where, Site) else key_text(where)


def reads(edit: EditLike) -> list[NestedKey]:
    """The entries that an edit says it reads."""
    return [as_key(key) for key in getattr(edit, "in_keys", ())]


def made(edit: EditLike, value: Tensor, td: TensorDictBase) -> Tensor:
    """What ``edit`` makes of ``value``; a callable may change a copy in place and return None."""
    if isinstance(edit, Edit):
        return edit(value, td)
    own = value.clone()
    new = edit(own, td)
    return own if new is None else new
