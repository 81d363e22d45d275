"""The figure of the schedules: a bar for each schedule and a box for each pass of the encoder.

    ```{schedules}
    ```

draws all four schedules into a page of the site, where text takes the color of the reader's theme.
`python docs/_ext/schedule_figure.py` draws the two that the README compares into files, one for
light and one for dark pages.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from clae_fast.methods import PairMethod


class Box(NamedTuple):
    """A pass of the encoder.

    Attributes:
        text: What stands in the box.
        view: The view that the pass is over, p, q or a; it decides the color.
        cells: One letter for each unit of cost: f is the forward pass, a the gradient of the
            activations, w that of the weights. A capital marks a unit whose result nobody uses.
        attacks: Whether the adversarial view is known after this pass.
    """

    text: str
    view: str
    cells: str
    attacks: bool = False


# the passes stand in the order in which the schedules run them
SCHEDULES = {
    "none": (
        Box("f(p)", "p", "f"),
        Box("f(q)", "q", "f"),
        Box("back q", "q", "aw"),
        Box("back p", "p", "aw"),
    ),
    "pair": (
        Box("f(p)", "p", "f"),
        Box("f(q)", "q", "f"),
        Box("back q", "q", "aw", attacks=True),
        Box("f'(a)", "a", "f"),
        Box("back a", "a", "aw"),
        Box("back p", "p", "aw"),
    ),
    "self": (
        Box("f'(p)", "p", "f"),
        Box("back", "p", "a", attacks=True),
        Box("f(p)", "p", "f"),
        Box("f(q)", "q", "f"),
        Box("back q", "q", "aw"),
        Box("f'(a)", "a", "f"),
        Box("back a", "a", "aw"),
        Box("back p", "p", "aw"),
    ),
    "released": (
        Box("f(p)", "p", "f"),
        Box("f'(p)", "p", "F"),
        Box("f'(p)", "p", "f"),
        Box("back p", "p", "AW"),
        Box("back p", "p", "aW", attacks=True),
        Box("f(q)", "q", "f"),
        Box("f'(a)", "a", "f"),
        Box("back a", "a", "aw"),
        Box("back q", "q", "aw"),
        Box("back p", "p", "aw"),
    ),
}
_NAMES = {"none": "plain", "pair": "pair attack", "self": "self attack", "released": "as released"}
_README = {"released": "CLAE's code", "pair": "clae_fast"}
# what text and lines are drawn in where the page does not say it
_INKS = {"light": "#1f2328", "dark": "#e6edf3"}
_STATIC = Path(__file__).resolve().parents[1] / "_static"
_COLORS = {"p": "#4f86e8", "q": "#2f9e77", "a": "#e2703a"}
# how solid a cell is drawn
_OPACITY = {"f": 0.75, "a": 0.45, "w": 0.25}
# two lines of entries: the swatches of an entry, each with how solid it is, and what they mean
_LEGEND = (
    (
        ([(_COLORS["p"], 0.75)], "view p"),
        ([(_COLORS["q"], 0.75)], "view q"),
        ([(_COLORS["a"], 0.75)], "adversarial view a"),
    ),
    (
        ([("currentColor", _OPACITY["f"])], "forward"),
        ([("currentColor", _OPACITY[cell]) for cell in "aw"], "backward: activations, weights"),
        ([("url(#waste)", 1)], "computed but never used"),
    ),
)
_UNIT, _HEIGHT, _ROW, _LEFT, _TOP = 46, 30, 74, 124, 14


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("schedules", _Schedules)
    return {"parallel_read_safe": True}


class _Schedules(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return [nodes.raw("", f'<div class="schedules">{draw()}</div>', format="html")]


def units(kind: str) -> int:
    """The units of a schedule as it is drawn."""
    return sum(len(box.cells) for box in SCHEDULES[kind])


def files() -> dict[Path, str]:
    """The README's picture for each of the two color schemes: paths and their SVG."""
    return {_STATIC / f"step-{name}.svg": draw(_README, ink) + "\n" for name, ink in _INKS.items()}


def draw(names: Mapping[str, str] = _NAMES, ink: str = "") -> str:
    """The figure as SVG.

    Args:
        names: The schedules to draw, from top to bottom, and what each is called.
        ink: The color of text and lines; by default they take that of the page around them.
    """
    assert {kind: units(kind) for kind in SCHEDULES} == PairMethod.units
    longest = max(map(units, names))
    width = _LEFT + longest * _UNIT + 8
    height = _TOP + len(names) * _ROW + 62
    own = f'color="{ink}" font-family="system-ui, sans-serif"' if ink else 'font-family="inherit"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="schedules-title" font-size="13" fill="currentColor" {own}>',
        '<title id="schedules-title">Passes of the encoder in a step: '
        + ", ".join(f"{name} {units(kind)}" for kind, name in names.items())
        + " units</title>",
        '<defs><pattern id="waste" width="7" height="7" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="7" stroke="currentColor" '
        'stroke-width="2.4" stroke-opacity="0.55"/></pattern></defs>',
    ]
    bottom = _TOP + len(names) * _ROW - 18
    for unit in range(0, longest + 1, 3):
        x = _LEFT + unit * _UNIT
        parts += [
            f'<line x1="{x}" y1="{_TOP - 8}" x2="{x}" y2="{bottom}" stroke="currentColor" '
            'stroke-opacity="0.18"/>',
            _text(x, bottom + 15, f"{unit}", anchor="middle", size=11, opacity=0.7),
        ]
    for row, (kind, name) in enumerate(names.items()):
        parts += _schedule(kind, name, _TOP + row * _ROW)
    parts += _legend(bottom + 34)
    return "".join(parts) + "</svg>"


def _schedule(kind: str, name: str, y: float) -> list[str]:
    total, plain = units(kind), units("none")
    ratio = "" if kind == "none" else f", {total / plain:.3g}x plain"
    parts = [
        _text(0, y + 13, name, weight=600),
        _text(0, y + 29, f"{total} units{ratio}", size=11, opacity=0.75),
    ]
    x: float = _LEFT
    for box in SCHEDULES[kind]:
        for i, cell in enumerate(box.cells):
            parts += _cell(x + i * _UNIT, y, cell, box.view)
        wide = len(box.cells) * _UNIT
        parts += [
            f'<rect x="{x}" y="{y}" width="{wide}" height="{_HEIGHT}" rx="3" fill="none" '
            f'stroke="{_COLORS[box.view]}" stroke-width="1.4"/>',
            _text(x + wide / 2, y + 20, box.text, anchor="middle"),
        ]
        x += wide
        if box.attacks:
            parts += [
                f'<path d="M{x} {y + _HEIGHT + 1} l-5 8 h10 z" fill="{_COLORS["a"]}"/>',
                _text(x, y + _HEIGHT + 21, "a is known", anchor="middle", size=11),
            ]
    return parts


def _cell(x: float, y: float, cell: str, view: str) -> list[str]:
    place = f'x="{x}" y="{y}" width="{_UNIT}" height="{_HEIGHT}"'
    opacity = _OPACITY[cell.lower()]
    drawn = [f'<rect {place} fill="{_COLORS[view]}" fill-opacity="{opacity}"/>']
    if cell.isupper():
        drawn.append(f'<rect {place} fill="url(#waste)"/>')
    return drawn


def _legend(y: float) -> list[str]:
    parts = []
    for line in _LEGEND:
        x: float = _LEFT
        for swatches, text in line:
            for fill, opacity in swatches:
                parts.append(
                    f'<rect x="{x}" y="{y}" width="14" height="14" fill="{fill}" '
                    f'fill-opacity="{opacity}" stroke="currentColor" stroke-opacity="0.5"/>'
                )
                x += 16
            parts.append(_text(x + 3, y + 12, text, size=12))
            x += 30 + 6.3 * len(text)
        y += 22
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
    opacity: float = 1.0,
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill-opacity="{opacity}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    for path, svg in files().items():
        path.write_text(svg)
