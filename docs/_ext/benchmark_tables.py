"""Makes tables out of the files in benchmarks/results when the site is built.

    ```{benchmark} losses
    ```

shows all files `losses-MACHINE-DATE.json`, the newest first. Without a name it shows the files that
no directive above it on the page has shown.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# the columns that a table ends with, in this order; others stand before them as they come
_HEADINGS = {
    "impl": "implementation",
    "form": "form",
    "ms": "ms",
    "us": "µs",
    "over_clae_fast": "time / ours",
    "views_per_s": "views/s",
    "units_ratio": "units / plain",
    "time_ratio": "time / plain",
    "memory_ratio": "memory / plain",
    "peak_mib": "peak MiB",
    "share_of_mm": "of mm's rate",
    "error": "error",
    "quiet": "quiet",
    "knn": "kNN %",
    "linear": "linear %",
    "knn_over_none": "kNN - none",
    "linear_over_none": "linear - none",
}
# shown in the cell of another column
_INTERVALS = {"ms": ("p20_ms", "p80_ms"), "us": ("p20_us", "p80_us")}
_HIDDEN = {"samples", "stage", "commit", "knn_by_seed"}
_HIDDEN |= {name for pair in _INTERVALS.values() for name in pair}


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive to the site."""
    app.add_directive("benchmark", _Benchmark)
    return {"parallel_read_safe": True}


class _Benchmark(SphinxDirective):
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        shown = self.env.temp_data.setdefault("clae_fast_results", set())
        pattern = f"{self.arguments[0]}-*.json" if self.arguments else "*.json"
        files = sorted({*RESULTS.glob(pattern)} - shown, key=_date, reverse=True)
        if self.arguments and not files:
            raise self.error(f"there is no {pattern} in benchmarks/results")
        shown.update(files)
        found: list[nodes.Node] = []
        if not files:
            return [nodes.paragraph("", "None yet.")]
        for file in files:
            self.env.note_dependency(str(file))
            found += _measurement(file)
        return found


def _date(file: Path) -> tuple[str, str]:
    found = re.search(r"\d{4}-\d\d-\d\d", file.name)
    return found[0] if found else "", file.name


def _measurement(file: Path) -> Iterator[nodes.Node]:
    result = json.loads(file.read_text())
    yield nodes.rubric("", file.stem)
    # where the author kept the result is no part of the command
    command = re.sub(r" --json \S+", "", result.get("command", ""))
    if command:
        yield nodes.literal_block("", command, language="sh")
    machine = ", ".join(f"{key} {value}" for key, value in result.get("machine", {}).items())
    yield nodes.paragraph("", machine, classes=["machine"])
    # a file of the GPU suite has the rows of several stages
    stages: dict[str, list[dict[str, Any]]] = {}
    bars = dict(result.get("bars", {}))
    for row in result["rows"]:
        if "bar" in row:
            bars[row["bar"]] = f"{row['verdict']} ({_text(row['value'])})"
        else:
            stages.setdefault(row.get("stage", ""), []).append(row)
    for stage, rows in stages.items():
        if stage:
            yield nodes.paragraph("", "", nodes.strong("", stage))
        yield _table(rows)
    said = [f"{bar}: {verdict}" for bar, verdict in bars.items() if verdict != "not measured"]
    if said:
        yield nodes.bullet_list("", *(nodes.list_item("", nodes.paragraph("", s)) for s in said))


def _table(rows: list[dict[str, Any]]) -> nodes.table:
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if _is_shown(name) and any(_cell(row, name) for row in rows)]
    keys = [name for name in shown if name not in _HEADINGS]
    columns = keys + [name for name in _HEADINGS if name in shown]
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    headings = [_HEADINGS.get(name, name.replace("_", " ")) for name in columns]
    group += nodes.thead("", _row(headings))
    group += nodes.tbody("", *(_row([_cell(row, name) for name in columns]) for row in rows))
    return nodes.table("", group, classes=["wide"])


def _is_shown(name: str) -> bool:
    return name not in _HIDDEN and not name.endswith("_ci95")


def _row(cells: list[str]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))


def _cell(row: dict[str, Any], name: str) -> str:
    """The value as text, with its 20th and 80th percentile or its 95 % interval."""
    value = row.get(name)
    text = _text(value)
    if name == "quiet" and value is not None:
        return f"{value} of {row['samples']}" if "samples" in row else text
    low, high = (_text(row.get(end)) for end in _INTERVALS.get(name, ("", "")))
    if low and high:
        return f"{text} ({low} to {high})"
    interval = row.get(f"{name}_ci95")
    return f"{value:.1f} ± {interval:.1f}" if interval is not None else text


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
