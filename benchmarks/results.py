"""Where measurements go: the bars that they are held to, and the file that they are written to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Bar:
    """A bound that a measured number is held to; exactly one of the two bounds is given.

    Attributes:
        text: What is bounded and by how much, unique among the bars.
        at_least: The lower bound.
        at_most: The upper bound.
        form: How a verdict shows the number.
    """

    text: str
    at_least: float | None = None
    at_most: float | None = None
    form: str = "{:.2f}x"

    def met_by(self, value: float) -> bool:
        """Whether `value` is within the bound; NaN never is."""
        if self.at_most is None:
            return self.at_least is not None and value >= self.at_least
        return value <= self.at_most

    def verdict(self, value: float | None) -> str:
        """`met` or `missed` with the number, or `not measured`."""
        if value is None:
            return UNMEASURED
        return f"{'met' if self.met_by(value) else 'missed'} ({self.form.format(value)})"


def verdicts(values: Mapping[Bar, float | None]) -> dict[str, str]:
    """The verdict on every bar, by its text."""
    return {bar.text: bar.verdict(value) for bar, value in values.items()}


def table(rows: list[Row], name: str, keys: str) -> str:
    """Aligned lines of the entry `name`, the entries `keys`, and how many samples were quiet."""
    shown = [(key, *_COLUMNS[key]) for key in keys.split()]
    lines = [["", *(heading for _, heading, _ in shown), "quiet"]]
    for row in rows:
        values = [(row.get(key), form) for key, _, form in shown]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        lines.append([row[name], *cells, f"{row['quiet']}/{row['samples']}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"  {line[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


# the heading and the format of an entry that tables show
_COLUMNS = {
    "ms": ("ms", ".2f"),
    "p20_ms": ("p20", ".2f"),
    "p80_ms": ("p80", ".2f"),
    "over_clae_fast": ("x ours", ".2f"),
    "views_per_s": ("views/s", ".0f"),
    "images_per_second": ("images/s", ".0f"),
    "over_plain": ("x plain", ".3f"),
    "units": ("units", ".2f"),
    "units_ratio": ("x units", ".3f"),
    "time_ratio": ("x time", ".3f"),
    "memory_ratio": ("x memory", ".3f"),
    "tflops": ("TFLOP/s", ".1f"),
    "share_of_mm": ("of mm", ".1%"),
    "peak_mib": ("MiB", ".1f"),
    "error": ("error", ".0e"),
    "form": ("form", ""),
}


@dataclass
class Results:
    """What was measured, on disk as soon as it is known.

    `path` may be None; `head` is what the file says before the rows, such as the machine.
    """

    path: Path | None
    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, *rows: Row) -> None:
        """Append rows, NaN and infinity as text, which JSON does not have, and write the file."""
        for row in rows:
            self.rows.append(
                {
                    name: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                    for name, v in row.items()
                }
            )
        self.write()

    def write(self, **tail: Any) -> None:
        """Write the file anew, with `tail` after the rows."""
        if self.path:
            write(self.path, {**self.head, "rows": self.rows, **tail})


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result beside `path` and rename it, so that a file is whole or absent.

    The process ends with one line where the file cannot be written.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        sys.exit(f"error: {path} cannot be written: {error.strerror}")


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a command's result with the command that made it, and say so."""
    write(path, {"command": command(), **result})
    print(f"wrote {path}")


def command() -> str:
    """The command that runs, with paths as seen from this folder."""
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return " ".join([program, *sys.argv[1:]]).replace(f"{Path.cwd()}/", "")
