"""What the benchmark commands share: one-line errors, argument types, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, `error: ...`, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message alone, without the usage text, and exit."""
        self.exit(2, f"error: {message}\n")


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, "a whole number >= 1", lambda value: value >= 1)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, "a number > 0", lambda value: 0 < value < float("inf"))


def int_list(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    return [positive_int(part) for part in text.split(",")]


def name_list(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A type for names out of `known`, separated by commas and each given once."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown {name!r}, choose from {', '.join(known)}"
                )
        return list(dict.fromkeys(names))

    return parse


def json_path(text: str) -> Path:
    """A file that can be written, found out before the measurement and not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the result beside `path` and rename it, so that a file is whole or absent.

    The command that made it is added under `command`.
    """
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    result = {"command": " ".join([program, *sys.argv[1:]]), **result}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        sys.exit(f"error: {path} cannot be written: {error.strerror}")
    print(f"wrote {path}")


def _number(text: str, kind: type, wanted: str, valid: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
