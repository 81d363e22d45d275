"""The role of a text in single backticks: code, and a link where it is a name of the package."""

import re
from collections.abc import Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole

_link = PyXRefRole()


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the role."""
    app.add_role("code", _code, override=True)
    return {"parallel_read_safe": True}


def _code(
    role: str,
    rawtext: str,
    text: str,
    lineno: int,
    inliner: Inliner,
    options: dict[str, Any] | None = None,
    content: Sequence[str] = (),
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """A role as docutils wants it."""
    if re.fullmatch(r"clae_fast\.[A-Za-z]\w*(\.[A-Za-z]\w*)*", text):
        return _link("py:obj", rawtext, text, lineno, inliner, options or {}, content)
    return [nodes.literal(rawtext, nodes.unescape(text, True))], []
