"""Atomic writes of files, and checkpoints, which load without executing pickled code."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from clae_fast.errors import CheckpointError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replaces the content of `path` at once.

    A reader finds the old content or the new one and never a part, even if this process is killed.

    Raises:
        OSError: The disk is full or not writable; `path` stays as it was.
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
    # so that the rename survives a power cut
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values to `path`, atomically.

    Raises:
        CheckpointError: It cannot be written, for example on a full disk; an older `path` stays.
    """
    # into memory first, since a write that fails inside torch.save loses its reason
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
        CheckpointError: The file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        # torch writes checksums, but does not check them
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # which error a file raises that is no checkpoint depends on its content
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read checkpoint {path}: it holds no dictionary")
    return state


def reason(error: Exception) -> str:
    """What an error says, in one short line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    if len(words) <= 150:
        return words
    # long messages of torch go on with advice, which is left out
    return words.partition(". ")[0] if ". " in words[:150] else f"{words[:150]} ..."
