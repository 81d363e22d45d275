"""What the command lines share: bad input is one line on stderr and an exit code."""

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from clae_fast import distributed
from clae_fast.checkpoint import CheckpointError
from clae_fast.config import Config, hints, nearest
from clae_fast.data import DataError
from clae_fast.run_folder import RunFolderError
from clae_fast.settings import scalar
from clae_fast.trainer import NonFiniteError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
TERMINATED = 143


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing its usage."""

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            ValueError: they are wrong; where there is no such flag, with the nearest one.
        """
        found, unknown = self.parse_known_args(argv)
        flags = [arg[2:].partition("=")[0] for arg in unknown if arg.startswith("--")]
        if flags:
            known = [name[2:] for action in self._actions for name in action.option_strings]
            nearest_one = nearest(flags[0], known)
            raise ValueError(f"unknown flag --{flags[0]}, the nearest is --{nearest_one}")
        if unknown:
            raise ValueError(f"unexpected argument {unknown[0]!r}")
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(message)


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Gives `parser` a flag for each of these settings of a run."""
    for field in dataclasses.fields(Config):
        if field.name in names:
            known = field.default is not dataclasses.MISSING
            parser.add_argument(
                flag(field.name),
                help=field.metadata["help"] + f" (digits: {field.default})" * known,
                **_argument(hints()[field.name], field.metadata["choices"]),
            )


def _argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is dict:
        return {"action": _Pairs, "nargs": "+", "metavar": "NAME=VALUE"}
    inner = [t for t in typing.get_args(hint) if t not in (type(None), ...)]
    if typing.get_origin(hint) is tuple:
        count = "*" if ... in typing.get_args(hint) else len(inner)
        return {"type": inner[0], "nargs": count, "metavar": "X"}
    kind = inner[0] if inner else hint
    return {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}


class _Pairs(argparse.Action):
    """Takes NAME=VALUE, several at a time and several times."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs = dict(getattr(namespace, self.dest, {}))
        for text in values:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise argparse.ArgumentError(self, f"must be NAME=VALUE, got {text!r}")
            pairs[name] = scalar(value)
        setattr(namespace, self.dest, pairs)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def warn(message: str) -> None:
    """Says something that does not stop the command."""
    print(f"warning: {message}", file=sys.stderr)


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit code, with one line for each way it is known to fail."""
    with _terminable() as signals:
        return _run(command, signals)


def _run(command: Callable[[], None], signals: Sequence[int]) -> int:
    try:
        command()
    except KeyboardInterrupt as interrupt:
        what, code = ("terminated", TERMINATED) if signals else ("interrupted", INTERRUPTED)
        _say("; ".join((what, *interrupt.args)))
        return code
    except (NonFiniteError, CheckpointError, distributed.LostWorkerError) as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)
    except DataError as error:
        # a loader process sends its traceback along, and the message last
        return _fail(str(error).rpartition("DataError: ")[2], BAD_INPUT)
    except (ValueError, RunFolderError) as error:
        return _fail(error, BAD_INPUT)
    except RuntimeError as error:
        # torch's words, wherever the training was when the signal came
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).strip().rstrip(".").replace("\n", " ")
        return _fail(f"{reason}: is memory short? --resume with fewer --workers", FAILED)
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Makes SIGTERM, which job schedulers send, a KeyboardInterrupt; gives the signals that came.

    Only the main thread may; in others SIGTERM does what it did.
    """
    signals: list[int] = []

    def terminate(number: int, _: object) -> None:
        signals.append(number)
        # loader processes that die of the same signal are no error to report
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        # without a SIGTERM it is torch's by now, which stays
        if signals:
            signal.signal(signal.SIGCHLD, before[signal.SIGCHLD])


def _fail(message: object, code: int) -> int:
    _say(f"error: {str(message).strip()}")
    return code


def _say(line: str) -> None:
    """Prints why a command ends, once for all processes of a run."""
    if distributed.reports_first():
        print(line, file=sys.stderr)
