"""How Sphinx builds the site: `sphinx-build -W --keep-going -b html docs build/docs`. Needs no network."""

import os
import re
import tomllib
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, while the reference imports them

HERE = Path(__file__).parent

project = "resofilter_trainer"
author = "the authors of resofilter_trainer"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = False  # types of other libraries have no page here
default_role = "code"  # docstrings write names as Markdown does

html_theme = "furo"
html_title = f"{project} {release}"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a56a0", "color-brand-content": "#1a56a0"},
    "dark_css_variables": {"color-brand-primary": "#8ab8f5", "color-brand-content": "#8ab8f5"},
}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4  # links to headings are written as on a git host
nb_execution_mode = "off"  # outputs are kept in the notebooks; a test executes them
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "__init__"}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_custom_sections = [("Columns", "params_style")]


def plain_stars(app, what, name, obj, options, lines):
    """Keep `**options` in a list of arguments from being read as bold text."""
    lines[:] = [re.sub(r"(?<![`\w*])\*\*(?=\w)", r"\\*\\*", line) for line in lines]


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", plain_stars, priority=0)
