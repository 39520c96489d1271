"""How sphinx builds these pages: `make docs`."""

import tdconcepts  # noqa: F401 - an environment without the package gives this error, not a page of them

project = "tdconcepts"
copyright = "The tdconcepts authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "TensorDict-native hooks for interpretability", "page_width": "1100px"}

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
myst_heading_anchors = 3
