"""How sphinx builds these pages: `make docs`."""

import inspect
import re

import tdconcepts  # noqa: F401 - an environment without the package gives this error, not a page of them

project = "tdconcepts"
copyright = "The tdconcepts authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "TensorDict-native hooks for interpretability",
    "page_width": "1300px",
    "body_max_width": "none",
    "code_font_size": "0.8em",  # lines of code have up to 120 characters
}

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]


def tables(app, what, name, obj, options, lines: list[str]) -> None:
    """A markdown table in a docstring, which help() shows as it is, becomes a list-table."""
    out: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line.strip().strip("|"))]
        if line.lstrip().startswith("|") and re.fullmatch(r"\s*\|[-:| ]+\|\s*", following):
            out += [".. list-table::", "   :header-rows: 1", ""]
        elif re.fullmatch(r"\s*\|[-:| ]+\|\s*", line):
            continue
        if re.fullmatch(r"\s*\|.*\|\s*", line):
            out += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
        else:
            out.append(line)
    lines[:] = out


def fields(app, what, name, obj, skip, options) -> bool | None:
    """The fields of a named tuple are described by its arguments; "Alias for field number 0" says nothing."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def constructor(app, what, name, obj, options, signature: str | None, returns) -> tuple[str, str] | None:
    """The arguments of a TensorDictModule, which its metaclass hides."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    given = list(inspect.signature(obj.__init__).parameters.values())[1:]
    return str(inspect.Signature([one.replace(annotation=one.empty) for one in given])), returns


def setup(app) -> None:
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-process-docstring", tables)
    app.connect("autodoc-skip-member", fields)
