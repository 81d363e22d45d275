"""What decides a run's numbers besides its settings: code, versions, processor and data.

versions.json holds what a run started with and, under "resumed", what changed when it was resumed,
each time with the step.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clae_fast import _impl, _native, _version, data
from clae_fast.training.run_folder import RunFolder

_FILE = "versions.json"
_PACKAGE = Path(_version.__file__).parent
# these are recorded, although the numbers do not depend on them
_HARMLESS = ("machine", "cpus", "gpu")


def describe(device: torch.device, splits: data.Splits) -> dict[str, Any]:
    """What the numbers of a run on `device` that reads `splits` depend on, as plain values."""
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
    # in most sets the labeled images are the training images, which need no second reading
    parts = splits._asdict()
    if splits.labeled is splits.train:
        del parts["labeled"]
    return {name: split.fingerprint()[:16] for name, split in parts.items()}


def record(
    folder: RunFolder, now: dict[str, Any], *, global_step: int, allow_changed_data: bool = False
) -> list[str]:
    """Records what a run starts or continues with.

    Args:
        folder: The run.
        now: What `describe` says.
        global_step: How many steps are done.
        allow_changed_data: Whether the run may continue with other images or labels than before.

    Returns:
        A line for each thing that has changed.

    Raises:
        ValueError: The data has changed.
        RunFolderError: The record is damaged.
    """
    recorded = folder.read_json(_FILE)
    before = _current(recorded)
    other_data = _data_changes(before, now["data"])
    if other_data and not allow_changed_data:
        raise ValueError(f"{'; '.join(other_data)}: restore it, or add --allow-changed-data")
    new = {name: value for name, value in now.items() if before.get(name, ...) != value}
    if not recorded:
        folder.write_json(_FILE, now)
    elif new:
        recorded.setdefault("resumed", []).append({"step": global_step} | new)
        folder.write_json(_FILE, recorded)
    changed = [name for name in new if name in before and name not in (*_HARMLESS, "data")]
    return [_line(name, before[name], now[name]) for name in changed] + other_data


def current(folder: RunFolder) -> dict[str, Any]:
    """What the run last continued with; empty where it has recorded nothing.

    Raises:
        RunFolderError: The record is damaged.
    """
    return _current(folder.read_json(_FILE))


def data_changes(folder: RunFolder, splits: data.Splits) -> list[str]:
    """A line for each split that is no longer what the run last read.

    Raises:
        RunFolderError: The record is damaged.
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


def _current(recorded: dict[str, Any]) -> dict[str, Any]:
    """What the run last continued with."""
    current = {name: value for name, value in recorded.items() if name != "resumed"}
    for changes in recorded.get("resumed", []):
        current |= {name: value for name, value in changes.items() if name != "step"}
    return current


def _roots() -> list[Path]:
    """The folders of Python files; an editable install has the kernels elsewhere."""
    kernels = find_spec("clae_fast.kernels")
    return [_PACKAGE, *map(Path, (kernels and kernels.submodule_search_locations) or [])]


def _digest(paths: Iterable[Path]) -> str:
    """A digest of the files' names and contents, which does not depend on where they are."""
    files = sorted((f"{path.parent.name}/{path.name}", path) for path in set(paths))
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """The git commit of the checkout, with "-dirty" after changes; None outside a checkout."""
    checkout = _PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
