"""The role of text in single backticks: code, and a link if it names a part of the package."""

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
    """The role, in the form that docutils calls."""
    if re.fullmatch(r"clae_fast\.[A-Za-z]\w*(\.[A-Za-z]\w*)*", text):
        return _link("py:obj", rawtext, text, lineno, inliner, options or {}, content)
    return [nodes.literal(rawtext, nodes.unescape(text, True))], []
