"""What decides a run's numbers besides its settings: code, versions, processor and data.

versions.json holds what a run began with and, under "resumed", what was different from some step
on.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clae_fast import _impl, _native, _version, data
from clae_fast.errors import RunFolderError
from clae_fast.training.run_folder import RunFolder

_FILE = "versions.json"
_PACKAGE = Path(_version.__file__).parent
# recorded, but the numbers do not depend on them
_HARMLESS = ("machine", "cpus", "gpu")


def describe(device: torch.device, splits: data.Splits) -> dict[str, Any]:
    """What a run on `device` that reads `splits` gets its numbers from, as plain values."""
    found: dict[str, Any] = {
        "clae_fast": _version.__version__,
        "commit": _commit(),
        "source": _digest(path for root in _roots() for path in root.rglob("*.py")),
        "native": _digest(_native.files()),
    }
    for package in ("torch", "torchvision", "triton", "numpy", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "python": platform.python_version(),
        "device": device.type,
        "ops": _impl.describe(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": fingerprints(splits),
    }


def fingerprints(splits: data.Splits) -> dict[str, str]:
    """What identifies the images and labels of each split."""
    # the labelled images are the training images of most sets: no need to read them twice
    parts = splits._asdict()
    if splits.labelled is splits.train:
        del parts["labelled"]
    return {name: split.fingerprint()[:16] for name, split in parts.items()}


def record(
    folder: RunFolder, now: dict[str, Any], *, step: int, allow_changed_data: bool = False
) -> list[str]:
    """Writes down what a run goes on with.

    Args:
        folder: the run.
        now: what `describe` says.
        step: where it goes on.
        allow_changed_data: whether to go on with other images or labels than before.

    Returns:
        A line for each thing that is no longer as it was.

    Raises:
        ValueError: the data changed.
        RunFolderError: the record is damaged.
    """
    recorded = _read(folder)
    before = _current(recorded)
    other_data = _data_changes(before, now["data"])
    if other_data and not allow_changed_data:
        raise ValueError(f"{'; '.join(other_data)}: restore it, or add --allow-changed-data")
    new = {name: value for name, value in now.items() if before.get(name, ...) != value}
    if not recorded:
        folder.write_json(_FILE, now)
    elif new:
        recorded.setdefault("resumed", []).append({"step": step} | new)
        folder.write_json(_FILE, recorded)
    changed = [name for name in new if name in before and name not in (*_HARMLESS, "data")]
    return [_line(name, before[name], now[name]) for name in changed] + other_data


def current(folder: RunFolder) -> dict[str, Any]:
    """What the run last went on with; empty where it has recorded nothing.

    Raises:
        RunFolderError: the record is damaged.
    """
    return _current(_read(folder))


def data_changes(folder: RunFolder, splits: data.Splits) -> list[str]:
    """A line for each split that is no longer what the run last read.

    Raises:
        RunFolderError: the record is damaged.
    """
    return _data_changes(current(folder), fingerprints(splits))


def _data_changes(before: dict[str, Any], now: dict[str, str]) -> list[str]:
    then = before.get("data", {})
    return [
        _line(f"the data set's {name} part", then[name], now[name])
        for name in now
        if then.get(name, now[name]) != now[name]
    ]


def _line(name: str, before: Any, now: Any) -> str:
    return f"{name} changed since this run last went on: it was {before}, now it is {now}"


def _read(folder: RunFolder) -> dict[str, Any]:
    """The record, empty for a run that has none yet."""
    path = folder.path / _FILE
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunFolderError(f"{path}: {error}") from error
    if not isinstance(recorded, dict):
        raise RunFolderError(f"{path}: not a JSON object")
    return recorded


def _current(recorded: dict[str, Any]) -> dict[str, Any]:
    """What the run last went on with."""
    current = {name: value for name, value in recorded.items() if name != "resumed"}
    for changes in recorded.get("resumed", []):
        current |= {name: value for name, value in changes.items() if name != "step"}
    return current


def _roots() -> list[Path]:
    """The folders of Python files: an editable install keeps the kernels elsewhere."""
    kernels = find_spec("clae_fast.kernels")
    return [_PACKAGE, *map(Path, (kernels and kernels.submodule_search_locations) or [])]


def _digest(paths: Iterable[Path]) -> str:
    """Of the files' names and contents, wherever they are installed."""
    files = sorted((f"{path.parent.name}/{path.name}", path) for path in set(paths))
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """The git commit of the checkout that runs, "-dirty" if it was changed; None elsewhere."""
    checkout = _PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
