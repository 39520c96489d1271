"""One self-contained HTML page from sections of text, figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section"]


@dataclass(frozen=True)
class Section:
    """One chapter of a page: a title, paragraphs, figures and tables; plain data, drawn in this order.

    All text is plain text (it is escaped). ``figures`` are ``(figure, caption)`` pairs, ``tables`` are
    ``(headers, rows, caption)`` triples whose cells are printed with ``str``. ``summary`` holds ``(what, value)`` rows
    for the short table on the terminal and at the head of the page.

    Examples:
        >>> table = (["policy", "return"], [["greedy", 500]], "Means")
        >>> section = Section("Returns", ["Sixteen episodes."], tables=[table])
        >>> section.title, section.tables[0][1]
        ('Returns', [['greedy', 500]])
    """

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[tuple[Figure, str]] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]], str]] = ()
    summary: Sequence[tuple[str, str]] = ()
