"""Reads what a report shows from a run folder, without the data set and the encoder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clae_fast.config import Config
from clae_fast.errors import RunFolderError
from clae_fast.training import provenance
from clae_fast.training.run_folder import RunFolder

# the accuracies that a run may have logged, the preferred one first, and their names on the page
ACCURACIES = {
    "val_knn": "kNN on the images held out for validation",
    "train_knn": "leave-one-out kNN among training images",
}


@dataclass(frozen=True)
class Run:
    """The contents of a run folder, checked as far as a report relies on them.

    Attributes:
        name: What the report calls it. No other run of the report has this name.
        folder: The run folder.
        log: The log points, each with "step" and "epoch".
        rate_steps: Steps at which a rate was logged.
        rates: Images per second, each over the steps since the rate before it.
        results: The contents of results.json, empty before the first evaluation.
        versions: What it ran with last; empty if nothing is recorded.
    """

    name: str
    folder: RunFolder
    log: list[dict[str, float]]
    rate_steps: np.ndarray  # [L]
    rates: np.ndarray  # [L]
    results: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """Its settings."""
        return self.folder.config

    @property
    def accuracy(self) -> str | None:
        """Which one of `ACCURACIES` it has logged; None if it has logged none."""
        return next((name for name in ACCURACIES if any(name in at for at in self.log)), None)

    @property
    def epochs(self) -> float:
        """The epoch that it has reached."""
        return self.log[-1]["epoch"] if self.log else 0.0

    @property
    def duration(self) -> float:
        """How many seconds all of its steps took."""
        return float(self.seconds(self.rate_steps[-1:])[0]) if len(self.rates) else 0.0

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, epochs and values of the log points that have `name`."""
        points = [(at["step"], at["epoch"], at[name]) for at in self.log if name in at]
        steps, epochs, values = np.array(points, dtype=float).reshape(-1, 3).T
        return steps, epochs, values

    def seconds(self, steps: np.ndarray) -> np.ndarray:
        """How many seconds training took up to these steps, without evaluation and checkpoints.

        A rate belongs to the steps since the log point before, so these times add up.
        """
        images = np.diff(self.rate_steps, prepend=0) * self.config.optimization.batch_size
        ends = np.concatenate(([0.0], np.cumsum(images / self.rates)))
        return np.interp(steps, np.concatenate(([0], self.rate_steps)), ends)


def read(paths: list[Path]) -> list[Run]:
    """Reads run folders and names each by as much of its path as tells it from the others.

    Raises:
        RunFolderError: A path is not a run folder, is given twice, or is damaged.
    """
    names = _names(paths)
    return [_read(RunFolder.open(path), name) for path, name in zip(paths, names, strict=True)]


def _names(paths: list[Path]) -> list[str]:
    parts = [path.absolute().resolve().parts for path in paths]
    for path, same in zip(paths, parts, strict=True):
        if parts.count(same) > 1:
            raise RunFolderError(f"{path} is given twice")
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: RunFolder, name: str) -> Run:
    steps, rates = _rates(folder.path)
    return Run(
        name=name,
        folder=folder,
        log=_log(folder.path / "metrics.jsonl"),
        rate_steps=steps,
        rates=rates,
        results=folder.read_json("results.json"),
        versions=provenance.current(folder),
    )


def _log(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    points: list[dict[str, float]] = []
    # a last line without its newline is still being written
    for number, line in enumerate(lines[:-1], start=1):
        try:
            point = json.loads(line)
            if not {"step", "epoch"} <= point.keys():
                raise ValueError("no log point")
            points.append({key: float(value) for key, value in point.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path}, line {number}: {error}") from error
    return points


def _rates(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images per second that TensorBoard has recorded, and their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # by default it would load a sample
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    name = "images_per_second"
    found = events.Scalars(name) if name in events.Tags()["scalars"] else []
    steps = np.array([rate.step for rate in found], dtype=float)
    return steps, np.array([rate.value for rate in found], dtype=float)
