"""One self-contained HTML page from sections of text, figures and tables."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdconcepts.errors import BadType, BadValue, import_extra
from tdconcepts.report.figures import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "page", "write_page"]

_NUMBER = re.compile(r"\s*[\[(]?[-+−±]?(\d|nan|inf)|\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Section:
    """One chapter of a page: a title, paragraphs, figures and tables; plain data, drawn in this order.

    Args:
        title: the heading. All text is plain text; it is escaped.
        paragraphs: under the heading.
        figures: pairs ``(figure, caption)``.
        tables: triples ``(headers, rows, caption)``, whose cells are printed with ``str``.
        summary: rows ``(what, value)`` for the short table on the terminal and at the head of the page.

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


def page(title: str, sections: Sequence[Section], *, intro: Sequence[str] = (), footer: str = "") -> str:
    """The text of an HTML page that needs no other file: style inside, figures as SVG data; it prints well.

    Args:
        title: of the page.
        sections: in their order; their ``summary`` rows are gathered at the head.
        intro: paragraphs under the title.
        footer: a last line.

    Raises:
        BadValue: a table whose rows have another number of cells than its headers.
        MissingExtra: matplotlib or jinja2 is not installed.

    Examples:
        >>> text = page("A & B", [Section("Returns", ["x < y"])])
        >>> "<h1>A &amp; B</h1>" in text, "x &lt; y" in text, "<script" in text
        (True, True, False)
    """
    wrong = [section for section in sections if not isinstance(section, Section)]
    if wrong:
        raise BadType("not a section", got=repr(wrong[0])[:80], needed="Sections", fix="[Section('Returns', [...])]")
    jinja2 = import_extra("jinja2", "report")
    template = resources.files("tdconcepts.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=title,
        intro=intro,
        footer=footer,
        summary=[row for section in sections for row in section.summary],
        sections=[_drawn(section) for section in sections],
    )


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], *, intro: Sequence[str] = (), footer: str = ""
) -> Path:
    """Write :func:`page` to ``path`` (its folders are made) and return the absolute path.

    Args:
        path: of the file.
        title, sections, intro, footer: as for :func:`page`.

    Raises:
        BadValue: a folder is at ``path``, or a file where a folder is needed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_page(f"{folder}/runs/first.html", "First run", [Section("Returns", ["All fell."])])
        ...     path.name, "All fell." in path.read_text(encoding="utf-8")
        ('first.html', True)
    """
    path, text = Path(path).resolve(), page(title, sections, intro=intro, footer=footer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadValue("the page can't be written", got=f"{path}: {error.strerror}", fix="another path") from error
    return path


def _drawn(section: Section) -> dict[str, Any]:
    tables = []
    for headers, rows, caption in section.tables:
        cells = [[str(cell) for cell in row] for row in rows]
        if any(len(row) != len(headers) for row in cells):
            got = f"{len(headers)} headers, rows of {sorted({len(row) for row in cells})} cells"
            raise BadValue(f"the table {caption!r} is ragged", got=got)
        numbers = [bool(cells) and all(_NUMBER.match(row[i]) for row in cells) for i in range(len(headers))]
        tables.append((headers, cells, caption, numbers))
    figures = [(_data_uri(figure), caption) for figure, caption in section.figures]
    return {"title": section.title, "paragraphs": section.paragraphs, "figures": figures, "tables": tables}


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure).encode()).decode()
