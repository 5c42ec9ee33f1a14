"""The site: Sphinx with furo, Markdown and executed notebooks; nothing of it is fetched from a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

project = "cayley-interp"
author = "the cayley-interp authors"
copyright = "2026, " + author
html_title = "cayley-interp"
html_theme = "furo"
html_static_path = ["static"]
html_extra_path = ["_dashboards"]  # built by `make docs`, copied to the root of the site
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#c2571b", "color-brand-content": "#c2571b"},
    "dark_css_variables": {"color-brand-primary": "#ef8a50", "color-brand-content": "#ef8a50"},
    "source_repository": "",
}
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "figures",
    "saved_notebooks",
    "plain_docstrings",
]

# Notebooks are shown as they were saved; a test executes them.
nb_execution_mode = "off"
# Formulas in Markdown.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"
exclude_patterns = ["_build", "_dashboards", "extensions", "results/*/README.md"]
nitpicky = False
