"""The types of a class's arguments, where autodoc takes those of attributes of the same names."""

import importlib
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation


def setup(app: Sphinx) -> dict[str, Any]:
    """Comes before autodoc writes what it has recorded."""
    app.connect("object-description-transform", _correct, priority=100)
    return {"parallel_read_safe": True}


def _correct(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    if (domain, kind) != ("py", "class"):
        return
    signature = content.parent[0]
    recorded = app.env.temp_data.get("annotations", {})
    found = recorded.get(f"{signature['module']}.{signature['fullname']}")
    cls = getattr(importlib.import_module(signature["module"]), signature["fullname"])
    if found and "__init__" in vars(cls):
        for name, hint in get_type_hints(cls.__init__).items():
            if name in found and name != "return":
                found[name] = stringify_annotation(hint, "smart")
