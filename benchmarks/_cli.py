"""What the benchmark commands share: complaints of one line, argument types, the run over cases."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import machine
from benchmarks.case import UnavailableError
from benchmarks.results import Results, Row, command
from benchmarks.setting import Setting
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


def name_list(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for names out of `known`, separated by commas and each given once."""
    known = tuple(known)

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


def add_json(parser: Parser) -> None:
    """Add the flag that every command has."""
    parser.add_argument(
        "--json", type=json_path, metavar="FILE", help="write the results there too"
    )


def add_cases(parser: Parser, names: Iterable[str]) -> None:
    """Add the flag that chooses among cases."""
    names = tuple(names)
    help = ", ".join(names)
    parser.add_argument("--case", type=name_list(names), default=list(names), help=help)


def add_timing(parser: Parser, *, rounds: int, threads: str | None = None) -> None:
    """Add the flags of a command that times cases on the CPU and holds them to bars."""
    add = parser.add_argument
    add("--threads", type=positive_int, default=2, help=threads)
    add("--rounds", type=positive_int, default=rounds)
    add_json(parser)
    add("--bars", action="store_true", help="exit with status 1 when a bar is missed")


def parse_training(
    parser: Parser, argv: list[str] | None, *, batch_size: int, rounds: int
) -> tuple[argparse.Namespace, Setting]:
    """The arguments of a benchmark of training steps, checked, and the setting among them."""
    add = parser.add_argument
    add("--arch", default="resnet18", help="resnet18 ... resnet152, resnet-narrow or timm/NAME")
    add("--batch-size", type=positive_int, default=batch_size)
    add("--image-size", type=positive_int, default=32)
    add("--device", default="cpu")
    add("--rounds", type=positive_int, default=rounds)
    add_json(parser)
    args = parser.parse_args(argv)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
        nn.build_encoder(args.arch, args.image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    return args, Setting(args.arch, args.batch_size, args.image_size, device)


def run_cases(
    args: argparse.Namespace,
    cases: Mapping[str, Any],
    measure: Callable[[Any, argparse.Namespace], list[Row]],
    judge: Callable[[list[Row], argparse.Namespace], dict[str, str]],
    setting: dict[str, Any],
) -> int:
    """Measure the cases, write their rows as they come, print the bars, return the exit status.

    `measure` returns the rows of one of the `cases`, or raises an `UnavailableError` where ours is
    wrong; `judge` returns the verdict on every bar; `setting` is what the file says besides.
    """
    torch.set_num_threads(args.threads)
    facts = machine.shown()
    results = Results(args.json, {"command": command(), "machine": facts, **setting})
    for name, case in cases.items():
        try:
            results.add(*measure(case, args))
        except UnavailableError as error:
            print(f"error: clae_fast at {name}: {error}", file=sys.stderr)
            return 1
    verdicts = judge(results.rows, args)
    results.write(bars=verdicts)
    print_bars(verdicts)
    if args.json:
        print(f"wrote {args.json}")
    missed = any(verdict.startswith("missed") for verdict in verdicts.values())
    return 1 if args.bars and missed else 0


def print_bars(verdicts: Mapping[str, str]) -> None:
    """Print a line for every bar."""
    print("\nbars:")
    for text, verdict in verdicts.items():
        print(f"  {verdict:<24} {text}")


def _number(text: str, kind: type, wanted: str, valid: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
