"""Renders the page of a report: one HTML file that loads nothing from elsewhere."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from clae_fast._version import __version__
from clae_fast.data import Splits
from clae_fast.errors import DataError
from clae_fast.evaluation.summary import NOT_PER_CENT, flat
from clae_fast.reporting import figures
from clae_fast.reporting.images import Pictures, Twins, look
from clae_fast.reporting.runs import ACCURACIES, Run
from clae_fast.training.checkpoint import reason, write_atomically
from clae_fast.training.cost import step_units

# the names of results.json, and those on the page
_NAMES = {"knn": "kNN", "corrupt": "unreadable images"}
_NONE = ""


@dataclass(frozen=True)
class Table:
    """A table of plain text: the columns' names, and rows of a name and one cell a column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        id: The name by which page.js finds it. Its PNG has the same name.
        title: The text above it.
        caption: The text below it, which says how it was made.
        wide: Whether it takes the whole width of the page.
    """

    id: str
    title: str
    caption: str
    wide: bool = False


class _Page:
    """Collects the figures of a page in order, with the data that page.js draws."""

    def __init__(self) -> None:
        self.plots: dict[str, Any] = {}

    def figure(
        self, plot: go.Figure | None, id: str, title: str, caption: str, *, wide: bool = False
    ) -> list[Figure]:
        """Adds a figure, unless there is nothing to draw."""
        if plot is None:
            return []
        self.plots[id] = json.loads(plot.to_json())
        return [Figure(id, title, caption, wide)]


def write(path: Path, runs: Sequence[Run], *, splits: Splits | None = None) -> None:
    """Writes a report.

    Args:
        path: The file to write.
        runs: The runs that it shows.
        splits: The data set of all runs, if it is loaded already.

    Raises:
        CheckpointError: A checkpoint is damaged or of another run.
        OSError: The file cannot be written; `path` stays as it was.
    """
    page = render(runs, [_pictures(run, splits) for run in runs])
    write_atomically(path, page.encode())


def _pictures(run: Run, splits: Splits | None) -> Pictures | str:
    """What the encoder makes of images, or why that cannot be shown."""
    path = run.folder.best_or_last
    if not path.exists():
        return f"{path.name} is not there any more"
    try:
        return look(run, splits)
    # a data set, a GPU or a package may be missing here
    except (DataError, ValueError, RuntimeError) as error:
        return reason(error)


def render(runs: Sequence[Run], pictures: Sequence[Pictures | str]) -> str:
    """Renders the page of runs. Each has pictures, or a text that says why it has none."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_file),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = _Page()
    names = [run.name for run in runs]
    both = list(zip(runs, pictures, strict=True))
    settings = _table(names, [run.config.to_dict() for run in runs])
    return environment.get_template("page.html").render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        headlines=[(run.name, _headline(run)) for run in runs],
        results=_table(names, [_results(run.results) for run in runs]),
        training=_training(page, runs),
        cost=_cost(runs),
        parts=[_part(page, at, *each) for at, each in enumerate(both)],
        differences=_differences(settings),
        settings=settings,
        versions=_table(names, [dict(flat(run.versions)) for run in runs]),
        version=__version__,
        # a script ends at the first "</script", even inside a string
        plots=Markup(json.dumps(page.plots).replace("<", "\\u003c")),
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        plotly=Markup(get_plotlyjs()),
    )


def _file(name: str) -> str:
    return resources.files("clae_fast.reporting").joinpath(name).read_text(encoding="utf-8")


def _headline(run: Run) -> str:
    """Describes a run in one line."""
    config, kind = run.config, run.config.adversary.attack
    attack = "no attack" if kind == "none" else f"{kind} attack"
    done = f"{run.epochs:g} of {config.optimization.epochs} epochs"
    method, dataset = config.objective.method, config.data.dataset
    return " · ".join((method, attack, dataset, config.encoder.arch, done))


def _training(page: _Page, runs: Sequence[Run]) -> list[Figure]:
    kinds = [ACCURACIES[name] for name in ACCURACIES if any(run.accuracy == name for run in runs)]
    what = f"By {'; '.join(kinds)}."
    timed = "Time of training steps alone, from the logged rates."
    return [
        *page.figure(
            figures.losses(runs),
            "losses",
            "Losses",
            "Means between log points; the adversarial loss is before its weight.",
        ),
        *page.figure(figures.accuracy(runs, over_time=False), "accuracy", "Accuracy", what),
        *page.figure(
            figures.accuracy(runs, over_time=True), "accuracy-time", "Accuracy over time", timed
        ),
        *page.figure(
            figures.throughput(runs),
            "throughput",
            "Throughput",
            "Images a second between log points, all processes together.",
        ),
    ]


def _cost(runs: Sequence[Run]) -> Table:
    """A table of the encoder work in a step and of the rates that were logged."""
    rows = []
    for run in runs:
        units = step_units(run.config)
        rate = f"{statistics.median(run.rates):,.0f}" if len(run.rates) else _NONE
        cells = [f"{units['plain']:g}", f"{units['mean']:.3g}"]
        rows.append((run.name, [*cells, f"{units['mean'] / units['plain']:.2f}", rate]))
    return Table(("plain step, units", "its step, units", "over plain", "images/s"), rows)


def _part(page: _Page, at: int, run: Run, seen: Pictures | str) -> dict[str, Any]:
    """The part of the page that shows one run at a time."""
    if isinstance(seen, str):
        return {"run": run.name, "source": "", "figures": [], "notes": [f"No pictures: {seen}."]}
    notes = []
    shown = []
    if isinstance(seen.twins, Twins):
        change = f"{seen.twins.largest * 255:.1f}/255"
        shown += page.figure(
            figures.twins(seen.twins),
            f"attack-{at}",
            "Adversarial views",
            "Training views by the run's own recipe, attacked in a step of its own. Differences "
            f"are gray where there is none, black and white where it is {change} down and up.",
            wide=True,
        )
    elif seen.twins is not None:
        notes.append(f"No adversarial views: {seen.twins}.")
    if seen.places is None:
        notes.append("No map of the embedding: test images are few, or their features all alike.")
    shown += page.figure(
        figures.embedding(seen),
        f"embedding-{at}",
        "Map of the embedding",
        f"Features of {len(seen.labels):,} test images by t-SNE, begun with their principal "
        "components; distances between clusters mean little. Point at an image to see it.",
        wide=True,
    )
    shown += page.figure(
        figures.similarities(seen),
        f"similarities-{at}",
        "Positives and hardest negatives",
        f"Projections of the views of {len(seen.positives)} training images, in eval mode; the "
        "hardest negative is the most similar view of another image among these.",
    )
    shown += page.figure(
        figures.neighbors(seen),
        f"neighbors-{at}",
        "Nearest neighbors",
        f"Test images and the nearest of {seen.neighbors.among:,} training images by the cosine "
        "of features; those of another class are framed.",
    )
    source = f"Checkpoint {seen.checkpoint}, step {seen.step:,}."
    return {"run": run.name, "source": source, "figures": shown, "notes": notes}


def _results(results: Mapping[str, Any]) -> dict[str, str]:
    """The rows of results.json as text, in which nested values have rows of their own."""
    found = {}
    for path, value in flat(results):
        name = " ".join(_NAMES.get(word, word) for word in path.split(" "))
        if not isinstance(value, float):
            found[name] = _text(value)
        elif name.split()[-1] in NOT_PER_CENT:
            found[name] = f"{value:.3f}"
        else:
            found[f"{name} accuracy"] = f"{value:.1f} %"
    return found


def _table(columns: Sequence[str], values: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a row for each name that any column has a value for."""
    names = dict.fromkeys(name for each in values for name in each)
    cells = [[_text(each[name]) if name in each else _NONE for each in values] for name in names]
    return Table(columns, list(zip(names, cells, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(settings: Table) -> Table:
    rows = [(name, cells) for name, cells in settings.rows if len(set(cells)) > 1]
    return Table(settings.columns, rows)
