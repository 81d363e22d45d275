"""What the benchmark commands share: one-line errors, argument types, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import timing
from clae_fast import nn


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


def parse_training(
    parser: Parser, argv: list[str] | None, *, batch_size: int, rounds: int
) -> argparse.Namespace:
    """Parse `argv` with the arguments of a benchmark of training steps, and check them."""
    add = parser.add_argument
    add("--arch", default="resnet18", help="resnet18 ... resnet152, resnet-narrow or timm/NAME")
    add("--batch-size", type=positive_int, default=batch_size)
    add("--image-size", type=positive_int, default=32)
    add("--device", default="cpu")
    add("--rounds", type=positive_int, default=rounds)
    add("--json", type=json_path, metavar="FILE", help="write the results there too")
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
        nn.build_encoder(args.arch, args.image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def run_cases(
    args: argparse.Namespace,
    measure: Callable[[str, argparse.Namespace], list[dict[str, Any]]],
    judge: Callable[[list[dict[str, Any]]], dict[str, tuple[str, bool]]],
    setting: dict[str, Any],
) -> int:
    """Measure the cases of `args`, print the bars, write the file; the exit status.

    Args:
        args: With `threads`, `case`, `json` and `bars`.
        measure: Makes the rows of a case, none where ours is wrong.
        judge: Gives every bar its verdict, and whether it was missed.
        setting: What the file says of the measurement besides.
    """
    torch.set_num_threads(args.threads)
    machine = timing.machine()
    print(timing.header(machine))
    rows: list[dict[str, Any]] = []
    for name in args.case:
        measured = measure(name, args)
        if not measured:
            return 1
        rows += measured
    verdicts = judge(rows)
    print("\nbars:")
    for bar, (verdict, _) in verdicts.items():
        print(f"  {verdict:<24} {bar}")
    if args.json:
        bars = {bar: verdict for bar, (verdict, _) in verdicts.items()}
        write_json(args.json, {"machine": machine, **setting, "rows": rows, "bars": bars})
    return 1 if args.bars and any(missed for _, missed in verdicts.values()) else 0


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

    The command that made it is added under `command`, with paths as seen from this folder.
    """
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    command = " ".join([program, *sys.argv[1:]]).replace(f"{Path.cwd()}/", "")
    result = {"command": command, **result}
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
