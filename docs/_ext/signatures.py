"""Corrects signatures that autodoc writes differently from their authors.

If an argument of a class has the name of an attribute, autodoc shows the attribute's type. It also
shows a default that is a class as <class ...>. autodoc_preserve_defaults would mend the latter, but
it replaces defaults in the running package by text.
"""

import importlib
import re
from operator import attrgetter
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

from clae_fast.steps.options import ALONE


def setup(app: Sphinx) -> dict[str, Any]:
    """Corrects both."""
    app.connect("autodoc-process-signature", _shorten)
    # before autodoc writes what it has recorded
    app.connect("object-description-transform", _correct, priority=100)
    return {"parallel_read_safe": True}


def _shorten(
    app: Sphinx, kind: str, name: str, of: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    if not signature:
        return None
    found = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", signature)
    return found.replace("=<factory>", "=...").replace(f"={tuple(ALONE)}", "=ALONE"), returns


def _correct(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    if (domain, kind) != ("py", "class"):
        return
    signature = content.parent[0]
    recorded = app.env.temp_data.get("annotations", {})
    found = recorded.get(f"{signature['module']}.{signature['fullname']}")
    cls = attrgetter(signature["fullname"])(importlib.import_module(signature["module"]))
    if found and "__init__" in vars(cls):
        for name, hint in get_type_hints(cls.__init__).items():
            if name in found and name != "return":
                found[name] = stringify_annotation(hint, "smart")
