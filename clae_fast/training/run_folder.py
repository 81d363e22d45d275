"""The folder of a run: its configuration, versions, metrics and checkpoints.

config.json                every setting
versions.json              what the run computed with and where, `clae_fast.training.provenance`
metrics.jsonl              one line per log point; on a CPU it depends on the settings alone
events.out.tfevents.*      the same and images per second, for TensorBoard
checkpoints/last.pt        state after the last epoch, or the last --checkpoint-every steps
checkpoints/best.pt        state after the epoch with the best accuracy on the --val-size images
checkpoints/epoch-0010.pt  states that --keep-every leaves
results.json               accuracies of the finished run, `clae_fast.training.results`
report.html                all of it as a page, `clae_fast.report`

Every checkpoint is whole. A new one replaces the one of the same name; nothing else is deleted.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from clae_fast.config import Config
from clae_fast.errors import RunFolderError
from clae_fast.training.checkpoint import write_atomically


class RunFolder:
    """A run on disk.

    Attributes:
        path: The folder.
        config: Its settings.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Makes the folder of a new run.

        Raises:
            RunFolderError: `path` exists.
            OSError: The folder cannot be written.
        """
        require_free(path)
        (path / "checkpoints").mkdir(parents=True)
        folder = cls(path, config)
        try:
            folder.write_json("config.json", config.to_dict())
        except BaseException:
            # half a run could neither be continued nor be started again
            shutil.rmtree(path)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens an existing run.

        Raises:
            RunFolderError: There is no run in `path`, or this version cannot read it.
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
        """The path of the last state."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The path of the state with the best accuracy in validation."""
        return self.path / "checkpoints" / "best.pt"

    @property
    def best_or_last(self) -> Path:
        """The path of the best state in validation, or of the last one without validation."""
        return self.best if self.best.exists() else self.checkpoint

    def find(self, name: str | None) -> Path:
        """The checkpoint that `--checkpoint` names; `best_or_last` by default.

        Raises:
            ValueError: There is no such checkpoint; the message lists those that there are.
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
        """The path of the state after an epoch, where --keep-every keeps it."""
        return self.path / "checkpoints" / f"epoch-{epoch:04}.pt"

    def change(self, config: Config) -> None:
        """Records the settings that the run continues with."""
        if config != self.config:
            self.write_json("config.json", config.to_dict())
            self.config = config

    def read_json(self, name: str) -> dict[str, Any]:
        """The values in the file `name`; none where there is no such file.

        Raises:
            RunFolderError: The file is damaged.
        """
        path = self.path / name
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunFolderError(f"{path}: {error}") from error
        return found

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes `values` to the file `name`, atomically."""
        write_atomically(self.path / name, (json.dumps(values, indent=2) + "\n").encode())


def require_free(path: Path) -> None:
    """Raises RunFolderError where `path` exists: a run never overwrites another."""
    if path.exists():
        raise RunFolderError(f"{path} exists: choose another --out, or continue it with --resume")
