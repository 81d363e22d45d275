"""The settings of Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build`.

Neither the build nor a reader's browser fetches anything: formulas are MathML and figures are SVG.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the checkout's Python files are documented; the compiled module comes from the installed package
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import clae_fast  # noqa: E402

project = "clae_fast"
author = "the authors of clae_fast"
release = version = clae_fast.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "benchmark_tables",
    "code_role",
    "signatures",
    "mathml",
    "catalogue",
    "schedule_figure",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"clae_fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

# text in single backticks is code, as in Markdown, and names of the package become links
default_role = "code"
# dashes are beautified and quotes are not, because those in docstrings belong to code
smartquotes_action = "D"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
toc_object_entries = False
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# types such as "fp32 or fp64" are prose
napoleon_preprocess_types = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

nitpicky = True
# other projects are not linked, so that nothing is fetched
nitpick_ignore_regex = [("py:.*", r"(?!clae_fast).*")]
