"""Formulas as MathML. Browsers draw it by themselves, without a script and without a download."""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

log = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the renderer "mathml"."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_render(node, as_block=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{_render(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _render(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    text = node.astext()
    try:
        drawn = tex2mathml(text, as_block=as_block)
        # otherwise the bars of a norm grow with a fraction beside them
        return drawn.replace("<mo>‖</mo>", '<mo stretchy="false">‖</mo>')
    except MathError as error:
        log.warning("formula %r: %s", text, error, location=node)
        return f"<code>{text}</code>"
