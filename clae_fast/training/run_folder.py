"""The folder of a run: its configuration, versions, metrics and checkpoints.

config.json           every setting
versions.json         what it ran with and where, `clae_fast.training.provenance`
metrics.jsonl         one line a log point; a pure function of the configuration on a CPU
events.out.tfevents.* the same and images per second, for TensorBoard
checkpoints/last.pt   state after the last epoch, or after the last --checkpoint-every steps
checkpoints/best.pt   state after the epoch that did best on the --val-size images
checkpoints/epoch-0010.pt  states that --keep-every leaves
results.json          accuracies of the finished run
report.html           all of it as a page, `clae_fast.report`

Every checkpoint is whole; each replaces the one of its name, and nothing else is deleted.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from clae_fast.config import Config
from clae_fast.errors import RunFolderError
from clae_fast.training.checkpoint import write_atomically


class RunFolder:
    """A run on disk.

    Attributes:
        path: the folder.
        config: its settings.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Makes the folder of a new run.

        Raises:
            RunFolderError: `path` exists.
            OSError: it cannot be written.
        """
        require_free(path)
        (path / "checkpoints").mkdir(parents=True)
        folder = cls(path, config)
        try:
            folder.write_json("config.json", config.to_dict())
        except BaseException:
            # half a run could be neither continued nor begun again
            shutil.rmtree(path)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens an existing run.

        Raises:
            RunFolderError: there is no run in `path`, or not one of this version.
        """
        try:
            settings = json.loads((path / "config.json").read_text())
            if not isinstance(settings, dict):
                raise ValueError("not a JSON object")
            return cls(path, Config.from_dict(settings))
        except FileNotFoundError as error:
            raise RunFolderError(f"{path} is no run folder: it has no config.json") from error
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{path / 'config.json'}: {error}") from error

    @property
    def checkpoint(self) -> Path:
        """Where the state of training is kept."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """Where the state that did best in validation is kept."""
        return self.path / "checkpoints" / "best.pt"

    @property
    def best_or_last(self) -> Path:
        """The state to use: the best in validation, or the last where none is held out."""
        return self.best if self.best.exists() else self.checkpoint

    def find(self, name: str | None) -> Path:
        """The checkpoint that `--checkpoint` names; `best_or_last` by default.

        Raises:
            ValueError: there is no such checkpoint; the message has those that there are.
        """
        if name is None:
            return self.best_or_last
        kept = self.checkpoint.parent / f"{name}.pt"
        if kept.exists() or Path(name).exists():
            return kept if kept.exists() else Path(name)
        if name == "best":
            raise ValueError(f"{self.path} keeps no best checkpoint: only --val-size makes one")
        names = ", ".join(sorted(path.stem for path in kept.parent.glob("*.pt")))
        raise ValueError(f"{name!r} is neither a file nor a checkpoint of {self.path}: {names}")

    def kept(self, epoch: int) -> Path:
        """Where the state after an epoch stays."""
        return self.path / "checkpoints" / f"epoch-{epoch:04}.pt"

    def change(self, config: Config) -> None:
        """Goes on with other settings than before."""
        if config != self.config:
            self.write_json("config.json", config.to_dict())
            self.config = config

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes `values` to the file `name`, atomically."""
        write_atomically(self.path / name, (json.dumps(values, indent=2) + "\n").encode())


def require_free(path: Path) -> None:
    """Raises RunFolderError where `path` exists: a run never overwrites another."""
    if path.exists():
        raise RunFolderError(f"{path} exists: choose another --out, or continue it with --resume")


class MetricsLog:
    """Writes log points to metrics.jsonl and TensorBoard.

    Args:
        folder: the run.
        step: steps already done.
        size: bytes of metrics.jsonl that belong to them; what follows is dropped.
        also: takes the step and what TensorBoard has of each log point, too.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        step: int,
        size: int,
        also: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = str(folder.path / "metrics.jsonl")
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        # never longer, which would fill it with zeros
        self._file.truncate(min(size, self._file.tell()))
        self._events = SummaryWriter(str(folder.path), purge_step=step)
        self._also = also

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # on a full disk closing fails too, after the error that says so
        with contextlib.suppress(*([OSError] if error else [])):
            self._file.close()
            self._events.close()

    def write(self, step: int, values: dict[str, float], images_per_second: float) -> None:
        """Adds a log point; the rate, which no rerun repeats, goes to TensorBoard alone.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        try:
            self._file.write((json.dumps({"step": step} | values) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        values = values | {"images_per_second": images_per_second}
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._also is not None:
            self._also(step, values)

    def sync(self) -> int:
        """Makes the lines so far durable and returns their size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()
