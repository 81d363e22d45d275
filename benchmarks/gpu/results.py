"""The file that a day's measurements on one GPU go to, a row at a time, and the bars they meet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import timing

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A bound on a number that the suite measures; one of the two is given.

    Attributes:
        stage: The stage that measures it.
        text: What is bounded, unique among the bars.
    """

    stage: str
    text: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        sign, bound = (">=", self.at_least) if self.at_most is None else ("<=", self.at_most)
        return f"{self.stage}: {self.text} {sign} {bound:g}"

    def met_by(self, value: float) -> bool:
        """Whether `value` is within the bound; NaN never is."""
        if self.at_most is None:
            return self.at_least is not None and value >= self.at_least
        return value <= self.at_most


@dataclass
class Results:
    """What was measured today on this machine, on disk as soon as it is known.

    Attributes:
        path: The file; rows that it holds already are kept.
        machine: What the results depend on.
        rehearsal: The rows prove the suite and nothing else: no bar is claimed.
        missing: What this run lacks, and why.
    """

    path: Path
    machine: dict[str, Any]
    rehearsal: bool
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            try:
                earlier = json.loads(self.path.read_text())
                rehearsal, self.rows = earlier["rehearsal"], earlier["rows"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{self.path} holds no results of the suite: move it away, or mend it"
                ) from error
            if rehearsal != self.rehearsal:
                raise ValueError(f"{self.path} is of a {'GPU' if self.rehearsal else 'rehearsal'}")

    def add(self, row: Row) -> None:
        """Append a row and write the file anew, in one step."""
        # JSON has no NaN and no infinity
        finite = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self.rows.append({"commit": self.machine["commit"], **finite})
        self._write()

    def judge(self, bar: Bar, value: float, row: Row) -> None:
        """Append `row` with what it says of a bar."""
        verdict = "met" if bar.met_by(value) else "missed"
        verdict = "rehearsed" if self.rehearsal else verdict
        self.add({**row, "bar": str(bar), "value": value, "verdict": verdict})

    def lacks(self, what: str, why: str) -> None:
        """Note a peer or a tool that is not here."""
        if self.missing.get(what) != why:
            print(f"  left out: {what}: {why}", flush=True)
            self.missing[what] = why
            self._write()

    def latest(self, **keys: Any) -> Row | None:
        """The last row with these entries."""
        for row in reversed(self.rows):
            if all(row.get(key) == value for key, value in keys.items()):
                return row
        return None

    def table(self, bars: Iterable[Bar]) -> str:
        """A line a bar: met, missed or not measured, and by what."""
        lines = []
        for bar in bars:
            row = self.latest(bar=str(bar)) or {"verdict": "not measured", "value": "-"}
            lines.append(f"{row['verdict']:<13}{_short(row['value']):>9}  {bar}")
        return "\n".join(lines)

    def _write(self) -> None:
        result = {
            "rehearsal": self.rehearsal,
            "machine": self.machine,
            "missing": self.missing,
            "rows": self.rows,
        }
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.path)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def file_name(gpu: str | None) -> str:
    """<gpu>-<date>.json, of the machine or of a rehearsal."""
    name = "-".join((gpu or "rehearsal").lower().split())
    return f"{name}-{date.today().isoformat()}.json"


def timed(timed: timing.Timing, calls: int) -> Row:
    """A candidate's time for one of the `calls` that each of its samples makes."""
    low, high = timed.p20_p80_ms
    return {
        "us": round(1e3 * timed.ms / calls, 3),
        "p20_us": round(1e3 * low / calls, 3),
        "p80_us": round(1e3 * high / calls, 3),
        "samples": len(timed.seconds),
    }
