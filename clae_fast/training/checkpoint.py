"""Files that are whole or absent: atomic writes, and checkpoints that load without pickled code."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from clae_fast.errors import CheckpointError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Puts `data` in the place of `path` in one step.

    A reader, or a process killed at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    # the rename itself must survive a power cut
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values to `path`, atomically.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; an older `path` is untouched.
    """
    # in memory first: a failed write inside torch.save loses its reason
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        kept = "; the one before it is intact" if any(path.parent.glob("*.pt")) else ""
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}{kept}") from error


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU, without executing anything in the file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        # torch does not look at the checksums that it writes
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # what a file holds that is no checkpoint decides which error comes up
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read checkpoint {path}: it holds no dictionary")
    return state


def reason(error: Exception) -> str:
    """What an error of torch says, in one short line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    if len(words) <= 150:
        return words
    # the advice that follows is not for the reader of one line
    return words.partition(". ")[0] if ". " in words[:150] else f"{words[:150]} ..."
