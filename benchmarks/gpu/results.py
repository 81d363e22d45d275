"""The file that a day's measurements on one GPU go to. Several runs add up in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.results import UNMEASURED, Bar, Results, Row


class DayResults(Results):
    """What was measured today on this machine; the rows that the file holds already are kept.

    Attributes:
        machine: What the results depend on.
        rehearsal: Whether the rows prove the suite and nothing else, so that no bar is claimed.
        missing: What this run lacks, and why.

    Raises:
        ValueError: The file is of a rehearsal and this run is not, or the other way round, or it
            holds no results.
    """

    def __init__(self, path: Path, machine: dict[str, Any], rehearsal: bool) -> None:
        self.machine, self.rehearsal = machine, rehearsal
        self.missing: dict[str, str] = {}
        head = {"rehearsal": rehearsal, "machine": machine, "missing": self.missing}
        super().__init__(path, head)
        if path.exists():
            try:
                earlier = json.loads(path.read_text())
                kind, self.rows = earlier["rehearsal"], earlier["rows"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path} holds no results of the suite: move it away, or mend it"
                ) from error
            if kind != rehearsal:
                raise ValueError(f"{path} is of a {'GPU' if rehearsal else 'rehearsal'}")

    def add(self, *rows: Row) -> None:
        """Append rows, each with the commit that it was measured at, and write the file anew."""
        super().add(*({"commit": self.machine["commit"], **row} for row in rows))

    def judge(self, bar: Bar | None, value: float, row: Row) -> None:
        """Append `row` with what it says of a bar, if there is one."""
        if bar is None:
            return self.add(row)
        verdict = "met" if bar.met_by(value) else "missed"
        verdict = "rehearsed" if self.rehearsal else verdict
        self.add({**row, "bar": bar.text, "value": value, "verdict": verdict})

    def lacks(self, what: str, why: str) -> None:
        """Note a peer or a tool that is not here."""
        if self.missing.get(what) != why:
            print(f"  left out: {what}: {why}", flush=True)
            self.missing[what] = why
            self.write()

    def latest(self, **keys: Any) -> Row | None:
        """The last row with these entries."""
        for row in reversed(self.rows):
            if all(row.get(key) == value for key, value in keys.items()):
                return row
        return None

    def table(self, bars: Iterable[Bar]) -> str:
        """A line for each bar: met, missed or not measured, and by what."""
        lines = []
        for bar in bars:
            row = self.latest(bar=bar.text) or {"verdict": UNMEASURED, "value": "-"}
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.3g}"
            lines.append(f"{row['verdict']:<13}{value:>9}  {bar.text}")
        return "\n".join(lines)


def file_name(gpu: str | None) -> str:
    """<gpu>-<date>.json, of the machine or of a rehearsal."""
    name = "-".join((gpu or "rehearsal").lower().split())
    return f"{name}-{date.today().isoformat()}.json"
