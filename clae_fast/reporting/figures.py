"""The figures of a report, drawn by plotly. Their colors come from the page.

`meta["color"]` is the number of a trace's color in the page's palette. `layout.meta` has whatever
else page.js needs. plotly reads the texts of a figure as HTML, so names are escaped.
"""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from clae_fast.reporting.images import Pictures, Twins
from clae_fast.reporting.runs import Run

COLORS = 8
# the most points that a curve has; if there are more, neighbors are averaged
_POINTS = 500
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
# this many classes have a color and a symbol each; all others are gray
_CLASSES = 20
_THUMBNAIL = 48
# the side of a picture in a grid and the gap between two, in pixels
_TILE, _GAP = 96, 8


def losses(runs: Sequence[Run]) -> go.Figure | None:
    """Clean and adversarial losses over epochs."""
    figure = go.Figure()
    for color, run in enumerate(runs):
        for name, label, dash in (("loss", "clean", "solid"), ("adv_loss", "adversarial", "dot")):
            _, epochs, values = run.curve(name)
            if len(values):
                alone = len(runs) == 1
                _line(
                    figure,
                    *_thinned(epochs, values),
                    name=label if alone else f"{run.name}, {label}",
                    color=color + (alone and name == "adv_loss"),
                    line={"dash": dash},
                    hovertemplate="%{y:.4f}",
                )
    return _axes(figure, "epoch", "loss")


def accuracy(runs: Sequence[Run], *, over_time: bool) -> go.Figure | None:
    """Accuracy during training, over epochs or over the time that its steps took."""
    figure = go.Figure()
    unit, seconds = _time_unit(max((run.duration for run in runs), default=0.0))
    for color, run in enumerate(runs):
        name = run.accuracy
        if name is None or (over_time and not run.duration):
            continue
        steps, epochs, values = run.curve(name)
        _line(
            figure,
            run.seconds(steps) / seconds if over_time else epochs,
            values,
            name=run.name,
            color=color,
            mode="lines+markers",
            showlegend=len(runs) > 1,
            hovertemplate="%{y:.1f} %",
        )
    return _axes(figure, f"training time, {unit}" if over_time else "epoch", "accuracy, %")


def throughput(runs: Sequence[Run]) -> go.Figure | None:
    """Images per second over epochs."""
    figure = go.Figure()
    for color, run in enumerate(runs):
        if len(run.rates) and len(run.log):
            steps, epochs, _ = run.curve("epoch")
            epochs = np.interp(run.rate_steps, steps, epochs)
            _line(
                figure,
                *_thinned(epochs, run.rates),
                name=run.name,
                color=color,
                showlegend=len(runs) > 1,
                hovertemplate="%{y:,.0f} images/s",
            )
    figure.update_yaxes(rangemode="tozero")
    return _axes(figure, "epoch", "images per second")


def similarities(pictures: Pictures) -> go.Figure:
    """Histograms of the cosines of positives, adversarial positives and hardest negatives."""
    sets = [("positives", pictures.positives, 0, "solid")]
    if isinstance(pictures.twins, Twins):
        sets.append(("adversarial positives", pictures.twins.similarity, 0, "dot"))
    sets.append(("hardest negatives", pictures.negatives, 1, "solid"))
    low = math.floor(10 * min(float(values.min()) for _, values, _, _ in sets)) / 10
    edges = np.linspace(min(low, 0.9), 1.0, 41)
    figure = go.Figure()
    for name, values, color, dash in sets:
        # rounding can bring a cosine above 1
        counts, _ = np.histogram(values.clip(max=1.0), edges)
        _line(
            figure,
            (edges[:-1] + edges[1:]) / 2,
            100 * counts / len(values),
            name=name,
            color=color,
            line={"dash": dash, "shape": "hvh"},
            fill="tozeroy",
            hovertemplate="%{y:.1f} %",
        )
    figure.update_xaxes(hoverformat=".2f")
    figure.update_layout(meta={"height": 380})
    return _axes(figure, "cosine similarity of projections", "images, %")


def embedding(pictures: Pictures) -> go.Figure | None:
    """The map of test images, in the colors of their classes."""
    if pictures.places is None:
        return None
    figure = go.Figure()
    labels = pictures.labels
    present = np.unique(labels)
    for at, label in enumerate(present[:_CLASSES]):
        _cloud(
            figure,
            pictures,
            np.flatnonzero(labels == label),
            name=_name(pictures, label),
            color=at % COLORS,
            symbol=_SYMBOLS[at // COLORS],
        )
    if len(present) > _CLASSES:
        rest = np.flatnonzero(~np.isin(labels, present[:_CLASSES]))
        others = f"{len(present) - _CLASSES} other classes"
        _cloud(figure, pictures, rest, name=others, color=COLORS, symbol=_SYMBOLS[0])
    # the numbers of a t-SNE map mean nothing
    bare = {"showticklabels": False, "showgrid": False, "zeroline": False}
    figure.update_xaxes(**bare).update_yaxes(**bare)
    figure.update_layout(
        hovermode="closest", meta={"aspect": 0.62, "sprite": _sprite(pictures.images)}
    )
    return _axes(figure, "t-SNE 1", "t-SNE 2")


def twins(found: Twins) -> go.Figure:
    """Three rows of pictures: views, their adversarial views, and the difference."""
    rows = np.stack((found.views, found.adversarial, found.change))
    return _grid(rows, names=("view", "adversarial", "difference"))


def neighbors(pictures: Pictures) -> go.Figure:
    """A row for each query: the test image, then the training images nearest to it."""
    found = pictures.neighbors
    figure = _grid(
        found.pictures,
        names=[_name(pictures, label) for label in found.labels[:, 0]],
        columns=["query", *(str(1 + at) for at in range(found.similarity.shape[1]))],
    )
    row, column = (index.ravel() for index in np.indices(found.similarity.shape))
    other = found.labels[:, 1:] != found.labels[:, :1]
    figure.add_scatter(
        x=column + 1.5,
        y=row + 0.5,
        mode="markers",
        marker={"opacity": 0, "size": 24},
        showlegend=False,
        text=[
            f"{_name(pictures, found.labels[r, c + 1])}, cosine {found.similarity[r, c]:.3f}"
            for r, c in zip(row, column, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
    )
    edge = _GAP / (2 * (_TILE + _GAP))
    for r, c in zip(*np.nonzero(other), strict=True):
        figure.add_shape(
            type="rect",
            x0=c + 1 + edge / 2,
            x1=c + 2 - edge / 2,
            y0=r + edge / 2,
            y1=r + 1 - edge / 2,
            line={"width": 3},
            name="other class",
        )
    return figure


def _line(
    figure: go.Figure, x: np.ndarray, y: np.ndarray, *, name: str, color: int, **more: Any
) -> None:
    more = {"mode": "lines", "showlegend": True} | more
    figure.add_scatter(x=x, y=y, name=escape(name), meta={"color": color % COLORS}, **more)


def _axes(figure: go.Figure, x: str, y: str) -> go.Figure | None:
    """Names the axes; returns None if there is nothing to show."""
    if not figure.data:
        return None
    if x == "epoch" or x.startswith("training time"):
        figure.update_xaxes(rangemode="tozero")
    return figure.update_xaxes(title_text=x).update_yaxes(title_text=y)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` points, each the mean of as many neighbors."""
    each = -(-len(x) // _POINTS)
    starts = np.arange(0, len(x), each)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _time_unit(longest: float) -> tuple[str, float]:
    """The unit to show a time in, and how many seconds that is."""
    for unit, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 3 * seconds:
            return unit, seconds
    return "seconds", 1.0


def _name(pictures: Pictures, label: int) -> str:
    """The name of a class, escaped for plotly's texts."""
    return escape(pictures.classes[label]) if label < len(pictures.classes) else str(label)


def _cloud(
    figure: go.Figure,
    pictures: Pictures,
    at: np.ndarray,
    *,
    name: str,
    color: int,
    symbol: str,
) -> None:
    assert pictures.places is not None
    figure.add_scatter(
        x=pictures.places[at, 0],
        y=pictures.places[at, 1],
        mode="markers",
        name=name,
        # the place in the sprite, and the class
        customdata=[[int(index), pictures.classes[pictures.labels[index]]] for index in at],
        marker={"size": 6, "symbol": symbol, "opacity": 0.85},
        meta={"color": color},
        hoverinfo="none",
        showlegend=True,
    )


def _grid(
    pictures: np.ndarray,  # [R, C, H, H, 3]
    *,
    names: Sequence[str],
    columns: Sequence[str] = (),
) -> go.Figure:
    """Pictures in rows and columns of squares, one unit of the axes each."""
    height, width = pictures.shape[:2]
    figure = go.Figure()
    figure.add_layout_image(
        source=_mosaic(pictures),
        xref="x",
        yref="y",
        x=0,
        y=0,
        sizex=width,
        sizey=height,
        sizing="stretch",
        layer="below",
    )
    # plotly draws no axes without a trace
    figure.add_scatter(x=[0, width], y=[0, height], mode="none", hoverinfo="skip", showlegend=False)
    shared = {"showgrid": False, "showline": False, "zeroline": False, "fixedrange": True}
    figure.update_xaxes(
        range=[0, width],
        side="top",
        tickvals=[0.5 + at for at in range(len(columns))],
        ticktext=list(columns),
        **shared,
    )
    figure.update_yaxes(
        range=[height, 0],
        tickvals=[0.5 + at for at in range(height)],
        ticktext=list(names),
        automargin=True,
        **shared,
    )
    return figure.update_layout(hovermode="closest", meta={"aspect": height / width, "grid": True})


def _mosaic(pictures: np.ndarray) -> str:  # [R, C, H, H, 3]
    """One PNG of all pictures, transparent between them. Small ones are enlarged pixel by pixel."""
    times = -(-_TILE // pictures.shape[2])
    tiles = pictures.repeat(times, axis=2).repeat(times, axis=3)
    rows, columns, side = tiles.shape[:3]
    gap = max(1, round(_GAP * side / _TILE / 2))
    opaque = np.full((*tiles.shape[:-1], 1), 255, np.uint8)
    edges = ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0))
    padded = np.pad(np.concatenate((tiles, opaque), axis=-1), edges)
    whole = padded.swapaxes(1, 2).reshape(rows * (side + 2 * gap), columns * (side + 2 * gap), 4)
    return _uri(Image.fromarray(whole), "png")


def _sprite(pictures: np.ndarray) -> dict[str, Any]:  # [N, H, H, 3]
    """One picture that holds all pictures in rows. page.js cuts single ones out of it."""
    side = min(pictures.shape[1], _THUMBNAIL)
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * side, rows * side))
    for at, picture in enumerate(pictures):
        thumbnail = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
        whole.paste(thumbnail, (at % columns * side, at // columns * side))
    uri = _uri(whole, "jpeg", quality=90, subsampling=0)
    return {"uri": uri, "side": side, "columns": columns, "rows": rows}


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
